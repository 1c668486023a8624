"""`LoraConfig`: the low-rank updates of a model's matrices. Imports no JAX."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from dialog_jax.errors import UserError

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA: trains a low-rank update of frozen matrices, W + scale * A B. The scale is alpha / rank."""

    rank: int = 0
    """Rank of the updates; 0 for no LoRA."""
    alpha: float = 32.0
    """With the scale alpha / rank, the best learning rate hardly depends on the rank."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Matrices to adapt, by Hugging Face's names or their ends: q_proj, mlp.up_proj, layers.0.self_attn.q_proj,
    embed_tokens, lm_head; `all-linear` for all seven matrices of each layer that compute every token. With a mixture of
    experts, gate_proj, up_proj and down_proj are those of experts as well, and experts.up_proj of them alone."""
    dropout: float = 0.0
    """In [0, 1). Probability with which each input of A is set to 0."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    rank_pattern: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other ranks, as in PEFT: {regular expression of the end of a name: rank}; the first that matches holds."""
    alpha_pattern: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other values of alpha, by name as in `rank_pattern`."""
    learning_rate_ratio: float = 1.0
    """LoRA+: the learning rate of B divided by that of A."""

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"lora.rank is {self.rank}; it must be at least 1, or 0 for no LoRA.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if not self.targets:
            raise UserError(f"lora.targets is empty; name matrices, such as q_proj, or {ALL_LINEAR}.")
        for field in ("alpha", "learning_rate_ratio"):
            if not 0 < getattr(self, field) < math.inf:
                raise UserError(f"lora.{field} is {getattr(self, field)}; it must be above 0, and finite.")
        for field, pattern, value in (
            *(("rank_pattern", *entry) for entry in self.rank_pattern.items()),
            *(("alpha_pattern", *entry) for entry in self.alpha_pattern.items()),
        ):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf or (field == "rank_pattern" and value != int(value)):
                kind = "an integer of at least 1" if field == "rank_pattern" else "a finite number above 0"
                raise UserError(f"lora.{field}[{pattern!r}] is {value!r}; it must be {kind}.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"lora.{field} has {pattern!r}, which is no regular expression: {error}.") from None

    def list_changed(self) -> list[str]:
        """Returns the fields, other than the rank, that differ from their defaults."""
        default = LoraConfig()
        names = [field.name for field in dataclasses.fields(self) if field.name != "rank"]
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    def find_rank(self, module: str) -> int:
        """Returns the rank of the update of a module, such as "model.layers.0.self_attn.q_proj"."""
        return int(_find(self.rank_pattern, module, self.rank))

    def compute_scale(self, module: str) -> float:
        """Returns the factor of the update of a module. Source: `LoraLayer.update_layer` of PEFT 0.21."""
        rank = self.find_rank(module)
        return _find(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _find(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a name, as PEFT's `get_pattern_key` does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
