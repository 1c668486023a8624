"""`SoftPromptConfig`: trained embeddings in front of every dialogue. Imports no JAX."""

import dataclasses
import math

from dialog_jax.errors import UserError

INITS = ("vocabulary", "text", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftPromptConfig:
    """Trained embeddings of virtual tokens in front of every dialogue; the model is frozen."""

    tokens: int = 0
    """Number of virtual tokens, which count within data.max_length; 0 for no soft prompt."""
    init: str = "vocabulary"
    """Embeddings before training: of tokens of the vocabulary, drawn at random (`vocabulary`); of the tokens of `text`,
    cut or repeated (`text`); or normal with the standard deviation of the model's embedding (`random`)."""
    text: str = ""
    """For init = text: the prompt from which training starts."""
    learning_rate_ratio: float = 100.0
    """Together with LoRA: the learning rate of the soft prompt divided by that of A."""

    def __post_init__(self):
        if self.tokens < 0:
            raise UserError(f"soft_prompt.tokens is {self.tokens}; it must be at least 1, or 0 for no soft prompt.")
        if self.init not in INITS:
            raise UserError(f"soft_prompt.init is {self.init!r}; it must be one of {', '.join(INITS)}.")
        if not self.tokens and (self.text or self.init != "vocabulary"):
            raise UserError(
                f"soft_prompt.init is {self.init!r} and soft_prompt.text {self.text!r}, which have no effect without "
                "soft_prompt.tokens. Set it too."
            )
        if not 0 < self.learning_rate_ratio < math.inf:
            raise UserError(
                f"soft_prompt.learning_rate_ratio is {self.learning_rate_ratio}; it must be above 0, and finite."
            )
        if (self.init == "text") != bool(self.text):
            raise UserError(
                f"soft_prompt.init is {self.init!r} and soft_prompt.text is {self.text!r}; text is read with "
                "init = text, which needs it. Set both or neither."
            )
