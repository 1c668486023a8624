"""Keys that say how much a record, message or part of a message counts in the loss, in the spellings of several tools.

What such a key plainly says is done; a key that speaks of loss or weights in another way is refused by name.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from dialog_jax.dialogues.json_values import quote
from dialog_jax.errors import UserError

WEIGHTS = ("weight", "loss_weight", "loss_scale")
"""Keys with a number that multiplies the loss."""
SWITCHES = ("train", "training", "trainable", "loss", "loss_mask")
"""Keys that are true or 1 if something is trained on, false or 0 if not."""
OPPOSITES = ("masked",)
"""Keys that are true or 1 if something is not trained on."""
KEYS = frozenset({*WEIGHTS, *SWITCHES, *OPPOSITES})

_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1e-30, 1e30
# Words of keys that speak of the loss, and words that keys of this kind combine with them.
_LOSS_WORDS = frozenset(
    re.findall(
        r"\w+",
        """loss losses mask masks masked masking unmasked train trains trained training trainable untrained untrainable
        weight weights weighted weighting reweight supervise supervised supervision unsupervised""",
    )
)
_OTHER_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a all and apply as assistant assistants attention be calculate calculated calculation coefficient completion
        completions compute computed content conversation detail details dialog dialogue do dont each every example
        examples exclude excluded factor factors false first flag flags for from function give gpt has history human id
        ids ignore ignored in include included index indexes indices input inputs is it item last level levels list map
        matrix message messages multiplier no not of off on only output outputs part parts per pos position positions
        prompt prompts ratio reasoning record response responses role roles sample samples scale scales score sequence
        should skip skipped span spans step steps system target
        targets the this to token tokens tool tools true turn turns use user users value values will with without""",
    )
)


def parse_weight(item: Mapping[str, Any], where: str) -> float:
    """Returns the weight that the keys of a record, message or part give; 1 if there are none.

        {"weight": 0.5}  0.5        {"loss": false}  0        {"train": true, "weight": 0.25}  0.25

    Args:
      where: the name of the item, for errors.

    Raises:
      UserError: a value is not what its key needs, or two keys contradict each other.
    """
    if not has_weight(item):
        return 1.0
    switches = {key: _read_switch(item, key, where) for key in (*SWITCHES, *OPPOSITES) if item.get(key) is not None}
    numbers = {key: _read_number(item, key, where) for key in WEIGHTS if item.get(key) is not None}
    for values in (switches, numbers):
        if len(set(values.values())) > 1:
            given = " and ".join(f"{key} {item[key]!r}" for key in values)
            raise UserError(f"{where} has {given}, which contradict each other. Remove one of them.")
    weight = next(iter(numbers.values()), 1.0)
    return weight if next(iter(switches.values()), True) else 0.0


def has_weight(item: Mapping[str, Any]) -> bool:
    """Returns whether a key of the item gives its weight."""
    return any(item[key] is not None for key in KEYS & item.keys())


def multiply(weight: float, factor: float, where: str) -> float:
    """Returns the product, which is 0 or a float32 number as each of them is; raises UserError if it is not."""
    return _check_range(weight * factor, f"{where} has weight {weight:g} in a record of weight {factor:g}")


def check_keys(item: Mapping[str, Any], where: str, *, is_record: bool = False) -> None:
    """Raises UserError if a key speaks of loss or weights, but is none of those that are read.

    A record may have keys such as `training_set` or `weight_kg`, so that there all words of the key must be of this
    kind: `mask_history`, `assistant_masks`, `sample_weight`. Its `labels` are of tokens if they are
    integers.
    """
    for key, value in item.items():
        if not isinstance(key, str) or key in KEYS or value is None:
            continue
        words = _split_words(key)
        if (is_record and key == "labels" and _are_token_ids(value)) or (
            words & _LOSS_WORDS and (not is_record or words <= _LOSS_WORDS | _OTHER_WORDS)
        ):
            raise UserError(
                f"{where} has {key!r} {quote(value)}, which speaks of the loss and is not supported. Write "
                f"{', '.join(WEIGHTS[:1])} (a number), or train (true or false), for a record, a message, or a part of "
                "a message's content; or rename it if it means something else."
            )


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)


@functools.lru_cache(maxsize=4096)
def _split_words(key: str) -> frozenset[str]:
    """Returns the words of a key, in small letters: those of `lossMask` and `loss_mask` are loss and mask."""
    return frozenset(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", key))


def _read_switch(item: Mapping[str, Any], key: str, where: str) -> bool:
    value = item[key]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(
            f"{where} has {key} {quote(value)}; needed true or false, or 1 or 0. For a number, use weight; for parts "
            "of a message, give each part of its content a weight."
        )
    return bool(value) != (key in OPPOSITES)


def _read_number(item: Mapping[str, Any], key: str, where: str) -> float:
    weight = item[key]
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or (isinstance(weight, float) and not math.isfinite(weight)) or weight < 0:
        raise UserError(
            f"{where} has {key} {quote(weight)}; needed a finite number >= 0. "
            'Write 1 for what is trained on, 0 (or "train": false) for what is not.'
        )
    return _check_range(weight, f"{where} has {key} {quote(weight)}")


def _check_range(weight: int | float, what: str) -> float:
    """Returns the weight as a float; as a float32 it must be neither infinite nor rounded to 0."""
    if weight and not _SMALLEST_WEIGHT <= weight <= _LARGEST_WEIGHT:
        raise UserError(
            f"{what}; needed 0, or a number from {_SMALLEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}. Scale the weights."
        )
    return float(weight)
