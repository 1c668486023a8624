"""`OptimizerConfig`: the optimizer and its learning rate. Imports no JAX."""

import dataclasses
import math

from dialog_jax.errors import UserError

OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
LEARNING_RATE, LORA_LEARNING_RATE, SOFT_PROMPT_LEARNING_RATE = 2e-5, 3e-4, 3e-2  # defaults


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer after clipping by the global norm."""

    name: str = "adamw"
    """adamw; adafactor, whose second moments are a row and a column per matrix; or muon, which orthogonalizes the
    updates of the layers' matrices, with AdamW for other parameters."""
    learning_rate: float = -1.0
    """Peak of the schedule; -1 for 2e-5, or 3e-4 with LoRA, or 3e-2 for a soft prompt alone."""
    schedule: str = "cosine"
    """`cosine` and `linear` fall to `final_fraction` of the peak after the warm-up; `warmup_stable_decay` stays, then
    falls linearly in the last `decay_fraction` of the steps; `constant` stays."""
    warmup_steps: int = -1
    """Steps in which the learning rate rises to its peak; -1 for 3% of the steps."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak; read by `cosine` and `linear`."""
    decay_fraction: float = 0.2
    """Fraction of the steps in which `warmup_stable_decay` decays."""
    weight_decay: float = 0.0
    """Applies to matrices; not to norms, biases, the embedding, adapters and a soft prompt."""
    b1: float = 0.9
    """Decay of AdamW's first moment; with muon, for what AdamW updates."""
    b2: float = 0.99
    """Decay of AdamW's second moment; with muon, for what AdamW updates."""
    epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 for no clipping."""
    moments_dtype: str = "float32"
    """Type in which moments are stored: float32 or bfloat16."""
    ema_decay: float = 0.0
    """In [0, 1). Decay of an exponential moving average of the trained parameters, for export --ema; 0 for none."""

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise UserError(f"optimizer.name is {self.name!r}; it must be one of {', '.join(OPTIMIZERS)}.")
        if self.moments_dtype not in ("float32", "bfloat16"):
            raise UserError(f"optimizer.moments_dtype is {self.moments_dtype!r}; it must be float32 or bfloat16.")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"optimizer.ema_decay is {self.ema_decay}; it must be at least 0 and below 1.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"optimizer.schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
        if not 0 < self.epsilon < math.inf:
            raise UserError(f"optimizer.epsilon is {self.epsilon}; it must be above 0, and finite.")
        if self.warmup_steps < -1:
            raise UserError(f"optimizer.warmup_steps is {self.warmup_steps}; it must be at least 0, or -1 for 3%.")
        if not 0 < self.learning_rate < math.inf and self.learning_rate != -1:
            raise UserError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be above 0, or -1 for the default."
            )
        for field in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UserError(f"optimizer.{field} is {getattr(self, field)}; it must be at least 0, and finite.")
        for field in ("final_fraction", "decay_fraction", "b1", "b2"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"optimizer.{field} is {getattr(self, field)}; it must be between 0 and 1.")
