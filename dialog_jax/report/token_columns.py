"""The tokens of dialogues as text that a page can hold: columns of integers, compressed, in base64.

`tokens.js` reads them. Texts are stored once for all dialogues and are referred to by number.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from dialog_jax.evaluation.token_scores import TokenScores
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.report.dialogue_views import DialogueView

NATS = 10_000
"""Losses are stored in units of 1 / NATS nats."""
SHARES = 10_000
"""Probabilities are stored in units of 1 / SHARES."""
_NOT_SCORED = 0xFFFFFFFF


class Texts:
    """Texts and tokens by number, each once."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._strings: dict[str, int] = {}
        self._tokens: dict[int, int] = {}

    def add_strings(self, texts: Sequence[str]) -> Int64[np.ndarray, " N"]:
        """Returns the numbers of texts."""
        return np.array([self._strings.setdefault(text, len(self._strings)) for text in texts], np.int64)

    def add_tokens(self, tokens: Int[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        """Returns the numbers of tokens."""
        values, places = np.unique(tokens, return_inverse=True)
        numbers = [self._tokens.setdefault(token, len(self._tokens)) for token in values.tolist()]
        return np.array(numbers, np.int64)[places]

    def pack(self) -> str:
        """Returns {"strings": [...], "ids": [...], "spellings": [...]}: the ids and the spellings of the tokens."""
        ids = list(self._tokens)
        return pack_json({"strings": list(self._strings), "ids": ids, "spellings": self._spell(ids)})

    def _spell(self, tokens: Sequence[int]) -> list[str]:
        """Returns the text of each token; of an incomplete character the vocabulary's spelling."""
        tokenizer = self._renderer.tokenizer
        decoded = tokenizer.backend_tokenizer.decode_batch([[one] for one in tokens], skip_special_tokens=False)
        return [
            str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
            for token, text in zip(tokens, decoded, strict=True)
        ]


def pack_json(value: Any) -> str:
    """Returns a JSON value as UTF-8, gzip and base64."""
    return _compress(json.dumps(value, ensure_ascii=False).encode())


def pack_dialogue(view: DialogueView, scores: Sequence[TokenScores], texts: Texts) -> str:
    """Returns the columns of a dialogue, one after the other, as little-endian integers and floats.

    uint32: node - parent (0 at a root), text, token, message + 1, turn + 1; float32: weight; then for each model
    uint32: loss, and K columns of its likeliest tokens and K of their probabilities. Byte 0 of all numbers of a column
    comes before byte 1 of all, because most upper bytes are 0.
    """
    tree = view.tree
    size = len(tree.tokens)
    columns = [
        np.where(tree.parent < 0, 0, np.arange(size) - tree.parent),
        texts.add_strings(view.texts),
        texts.add_tokens(tree.tokens),
        np.array(view.messages) + 1,
        tree.turn + 1,
        tree.weight.astype("<f4").view("<u4"),
    ]
    for one in scores:
        scored = np.isfinite(one.nll)
        losses = np.rint(np.where(scored, one.nll, 0).astype(np.float64) * NATS)
        columns.append(np.where(scored, losses.astype(np.int64), _NOT_SCORED))
        for place in range(one.top_token.shape[1]):
            columns += [texts.add_tokens(one.top_token[:, place]), np.rint(one.top_probability[:, place] * SHARES)]
    planes = [column.astype("<u4").view(np.uint8).reshape(size, 4).T.tobytes() for column in columns]
    return _compress(b"".join(planes))


def _compress(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
