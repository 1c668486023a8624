"""`TrainConfig`, everything that determines a run, as a frozen dataclass and as the ConfigDict that flags override.

Imports no JAX, so that commands which only look at data start quickly. This is why the configs of loss and mesh are
here and not beside what they configure.
"""

import dataclasses
import math

import ml_collections

from dialog_jax.errors import UserError
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training import config_fields
from dialog_jax.training.data_config import DataConfig
from dialog_jax.training.optimizer_config import (
    LEARNING_RATE,
    LORA_LEARNING_RATE,
    SOFT_PROMPT_LEARNING_RATE,
    OptimizerConfig,
)
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig

REMAT = ("none", "attention", "dots", "full")
ATTENTION = ("auto", "blockwise", "pallas", "splash")
FROZEN_DTYPES = ("auto", "float32", "bfloat16", "int8", "nf4")
MESH_AXES = ("dcn_data", "data", "fsdp", "tensor")
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimized, for each target times its weight:

    (1 - distillation) * cross-entropy + distillation * KL(teacher || model) + z_loss * log(Z) ** 2
    """

    z_loss: float = 0.0
    """At least 0. Weight of log(Z) ** 2, with Z the sum of exp(logits); keeps logits in a range suited to bfloat16."""
    label_smoothing: float = 0.0
    """In [0, 1). Share of the target distribution that is spread evenly over the vocabulary."""
    distillation: float = 0.0
    """In [0, 1]. Share of the loss that is the KL divergence from the predictions in data.teacher."""

    def __post_init__(self):
        if not 0 <= self.z_loss < math.inf:
            raise UserError(f"loss.z_loss is {self.z_loss}; it must be at least 0.")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"loss.label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1.")
        if not 0 <= self.distillation <= 1:
            raise UserError(f"loss.distillation is {self.distillation}; it must be between 0 and 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the axes of the device mesh; one may be -1, for all devices that the others leave.

    `dcn_data` and `data` replicate parameters and divide rows, the first over slices or hosts that a slow network
    joins; `fsdp` divides rows, parameters and moments; `tensor` divides parameters and the work of a row.
    """

    dcn_data: int = 1
    """Replicates parameters and divides rows over slices or hosts that a slow network joins."""
    data: int = -1
    """Replicates parameters and divides rows."""
    fsdp: int = 1
    """Divides rows, parameters and moments."""
    tensor: int = 1
    """Divides parameters and the work of a row."""

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            asked = dict(zip(MESH_AXES, sizes, strict=True))
            raise UserError(f"mesh sizes are {asked}; each must be at least 1, and one may be -1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run; experiments/finetune.py is an example to copy."""

    model: str = ""
    """A directory with config.json and safetensors, a .gguf file, or a name on the Hugging Face Hub."""
    adapter: str = ""
    """An adapter for the model: a directory that PEFT or dialog_jax export wrote. Training continues it, with its
    ranks, scales and targets in place of those of `lora`; other commands apply it."""
    tokenizer: str = ""
    """A directory, .gguf file or Hub name to load the tokenizer from; empty for that in the adapter's directory, or
    else the model's own."""
    resize_embedding: bool = False
    """Add rows to embedding and unembedding, each the mean of the others, for tokens that the model has no row for."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    soft_prompt: SoftPromptConfig = dataclasses.field(default_factory=SoftPromptConfig)
    freeze: tuple[str, ...] = ()
    """Patterns of the paths of parameters that are not trained, such as embedding or layers/*attention/*."""
    train_only: tuple[str, ...] = ()
    """Patterns of the paths of the only parameters that are trained, in place of `freeze`."""
    frozen_dtype: str = "auto"
    """Type in memory of matrices that are not trained: auto (the compute type), float32 or bfloat16; int8 or nf4 for
    those of the layers, with embedding and unembedding in bfloat16."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rows: int = 1
    """Rows per micro-batch, over all devices: a multiple of mesh.dcn_data * mesh.data * mesh.fsdp."""
    gradient_accumulation: int = 8
    """Micro-batches per update."""
    steps: int = 0
    """Number of updates; 0 to derive it from `epochs`."""
    epochs: float = 1.0
    """Passes over the training data; read if steps is 0."""
    compute_dtype: str = "auto"
    """auto (bfloat16 on accelerators, float32 on CPU), float32 or bfloat16. Trained parameters are float32."""
    attention: str = "auto"
    """auto (the fastest kernel that the devices support), blockwise (any device), pallas (NVIDIA GPUs) or splash (TPUs,
    rows whose trees are all paths). A kernel named here that does not work is an error."""
    remat: str = "dots"
    """What the backward pass recomputes to save memory: none, attention, dots or full."""
    evaluate_every: int = 50
    """Updates between evaluations on held-out dialogues. There is also one before the first and after the last."""
    evaluate_rows: int = 64
    """Rows of held-out dialogues per evaluation, always the same; 0 for all."""
    checkpoint_every: int = 50
    """Updates between checkpoints, a multiple of evaluate_every. A run that a signal stops also saves one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, in case one is damaged. The best by held-out loss is kept as well."""
    max_bad_steps: int = 5
    """Consecutive steps with a loss or gradient that is not finite, each skipped, after which a run stops."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Experiment trackers to log to: tensorboard, wandb, trackio, or several. metrics.jsonl and evaluation.jsonl always
    have all figures."""
    seed: int = 0
    """Of the order of the data, of new adapters, and of dropout."""

    def __post_init__(self):
        if self.data.weights and self.objective.needs_full_rendering:
            raise UserError(
                f"data.weights chooses responses, and objective.name={self.objective.name!r} also trains on other "
                "tokens, whatever their weights. Use conditional or last, or leave data.weights empty."
            )
        if bool(self.data.teacher) != (self.loss.distillation > 0):
            raise UserError(
                f"data.teacher is {self.data.teacher!r} and loss.distillation is {self.loss.distillation}; set both (a "
                "teacher's file, and its share of the loss) or neither."
            )
        for field in (
            "rows",
            "gradient_accumulation",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
            "max_bad_steps",
        ):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        self.make_tree_config()
        if self.steps < 0 or (not self.steps and not 0 < self.epochs < math.inf):
            raise UserError(f"steps is {self.steps} and epochs {self.epochs}; one of them must be above 0, and finite.")
        if self.checkpoint_every % self.evaluate_every:
            raise UserError(
                f"checkpoint_every is {self.checkpoint_every}; it must be a multiple of evaluate_every = "
                f"{self.evaluate_every}, because the best checkpoint is chosen by held-out loss."
            )
        if self.evaluate_rows < 0:
            raise UserError(f"evaluate_rows is {self.evaluate_rows}; it must be at least 0 (0 for all).")
        if self.attention not in ATTENTION:
            raise UserError(f"attention is {self.attention!r}; it must be one of {', '.join(ATTENTION)}.")
        if self.remat not in REMAT:
            raise UserError(f"remat is {self.remat!r}; it must be one of {', '.join(REMAT)}.")
        if self.compute_dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"compute_dtype is {self.compute_dtype!r}; it must be auto, float32 or bfloat16.")
        if self.frozen_dtype not in FROZEN_DTYPES:
            raise UserError(f"frozen_dtype is {self.frozen_dtype!r}; it must be one of {', '.join(FROZEN_DTYPES)}.")
        unknown = [name for name in self.trackers if name not in TRACKERS]
        if unknown or len(set(self.trackers)) < len(self.trackers):
            raise UserError(
                f"trackers is {','.join(self.trackers)!r}; name each of {', '.join(TRACKERS)} at most once, or () for "
                "none."
            )
        if self.freeze and self.train_only:
            raise UserError("freeze and train_only are both set; the one says what is frozen, the other what is not.")
        if self.adapter and self.lora.rank:
            raise UserError(
                f"adapter is {self.adapter!r} and lora.rank is {self.lora.rank}; the adapter has its own ranks, scales "
                "and targets. Leave lora.rank at 0 to continue it, or leave adapter empty to start a new one."
            )
        # What an adapter brings itself, or what has no effect without a rank, is not left unread.
        applied = ("dropout", "learning_rate_ratio") if self.adapter else ()
        unread = [] if self.lora.rank else [name for name in self.lora.list_changed() if name not in applied]
        if unread:
            raise UserError(
                f"lora.{unread[0]} is {getattr(self.lora, unread[0])!r}, which has no effect "
                + ("on an adapter that is continued. Leave it out." if self.adapter else "without lora.rank. Set both.")
            )
        ratio = self.soft_prompt.learning_rate_ratio
        if ratio != SoftPromptConfig.learning_rate_ratio and not (self.lora.rank or self.adapter):
            raise UserError(
                f"soft_prompt.learning_rate_ratio is {ratio}, which has no effect without lora.rank. Set "
                "optimizer.learning_rate, which is that of a soft prompt alone."
            )
        for field, value in (
            ("adapter", self.adapter),
            ("lora.rank", self.lora.rank),
            ("soft_prompt.tokens", self.soft_prompt.tokens),
        ):
            if value and (self.freeze or self.train_only):
                raise UserError(
                    f"freeze or train_only is set with {field}, which freezes the model's own parameters. Leave them "
                    "empty."
                )
        if self.soft_prompt.tokens > self.data.max_length - 2:
            raise UserError(
                f"soft_prompt.tokens is {self.soft_prompt.tokens:,} and data.max_length is "
                f"{self.data.max_length:,}: a soft prompt as long as the row leaves no room for a prompt and a "
                "response. Lower soft_prompt.tokens or raise data.max_length."
            )

    def resolve(self) -> "TrainConfig":
        """Returns the config with the learning rate that -1 stands for."""
        if self.optimizer.learning_rate != -1:
            return self
        rate = SOFT_PROMPT_LEARNING_RATE if self.soft_prompt.tokens else LEARNING_RATE
        rate = LORA_LEARNING_RATE if self.lora.rank or self.adapter else rate
        return dataclasses.replace(self, optimizer=dataclasses.replace(self.optimizer, learning_rate=rate))

    def make_tree_config(self) -> TreeConfig:
        """Returns the part that says how dialogues become trees; raises UserError where it is not valid."""
        return TreeConfig(
            objective=self.objective,
            max_length=self.data.max_length,
            truncate=self.data.truncate,
            share_prefixes=self.data.share_prefixes,
            on_error=self.data.on_error,
        )


def require_fields(config: TrainConfig, user: str, *fields: str) -> None:
    """Raises UserError if one of the fields, such as `data.train`, is empty; `user` is what needs it."""
    values = {
        "model": config.model,
        "data.train": config.data.train or config.data.mix,
        "data.validation": config.data.validation,
    }
    for field in fields:
        if not values[field]:
            raise UserError(f"{field} is empty; {user} needs it: --config.{field}=...")


def set_template_time(config: TrainConfig, time: str) -> TrainConfig:
    """Returns the config with another data.template_time."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template_time=time))


def to_config_dict(config: TrainConfig) -> ml_collections.ConfigDict:
    """Returns the form that `--config.field=value` overrides; no field can be added to it."""
    # Patterns of `lora` have dots.
    return ml_collections.ConfigDict(config_fields.to_dict(config), allow_dotted_keys=True).lock()


def from_config_dict(overridden: ml_collections.ConfigDict) -> TrainConfig:
    """Returns the checked config.

    Raises:
      UserError: a field is unknown, or its value is of the wrong type, out of range, or contradicts another.
    """
    return config_fields.build(TrainConfig, overridden, "config")
