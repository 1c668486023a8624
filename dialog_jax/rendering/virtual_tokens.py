"""The ids by which sequences name the tokens of a soft prompt, which no tokenizer has.

A soft prompt of P tokens is a prefix of the ids V, V + 1, ..., V + P - 1 in front of every sequence, with V the number
of rows of the model's embedding; the model maps these ids to the rows of the soft prompt.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32


@dataclasses.dataclass(frozen=True)
class VirtualTokens:
    """The ids `first`, `first + 1`, ..., `count` of them; without a soft prompt `count` is 0.

    first 100, count 2: `ids()` is [100, 101], and `prepend([7, 8])` is [100, 101, 7, 8].
    """

    first: int = 0
    count: int = 0

    def ids(self) -> Int32[np.ndarray, " P"]:
        """Returns the ids in their order."""
        return np.arange(self.first, self.first + self.count, dtype=np.int32)

    def prepend(self, tokens: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " m"]:
        """Returns the ids and then `tokens`; `tokens` itself if there are no ids."""
        return np.concatenate([self.ids(), tokens]) if self.count else tokens

    def contain(self, token: int) -> bool:
        """Returns whether a token is one of them."""
        return self.first <= token < self.first + self.count

    def describe(self, token: int) -> str:
        """Returns the text to show for one of the ids: "<soft prompt 0>" for the first."""
        return f"<soft prompt {token - self.first}>"


NONE = VirtualTokens()
