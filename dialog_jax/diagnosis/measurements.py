"""What a diagnosis measures on a run's model and data: parameters that move, losses before and after, shared responses.

In: parameters and dialogues. Out: the records of `run_figures`. Knows no files.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dialog_jax.diagnosis.run_figures import HeldOutChange, Overlap, ParameterChange, ResponseLosses
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.evaluation.scoring import Score
from dialog_jax.model import adapters, parameter_trees

_SHORTEST = 40  # characters of a response that is compared; shorter ones, such as greetings, recur by themselves
_LEADING_NAMES = 10


def measure_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[ParameterChange]:
    """Returns the change of each trained parameter.

    The factors of LoRA are one parameter with the matrix that they adapt: the change is that of their product.

    Args:
      before: all parameters of the model, as one tree, with the scales of LoRA.
      after: the trained ones, as one tree.
    """
    old, new = parameter_trees.flatten(before), parameter_trees.flatten(after)
    changes = []
    for path in sorted(new):
        parent, _, name = path.rpartition("/")
        if name not in adapters.TRAINED:
            changes.append(ParameterChange(path, _norm(old[path]), _norm(new[path] - old[path])))
        elif name == adapters.TRAINED[0]:
            factors = [f"{parent}/{factor}" for factor in adapters.TRAINED]
            scale = old[f"{parent}/{adapters.SCALE}"]
            change = _measure_product([old[one] for one in factors], [new[one] for one in factors], scale)
            # The update of a tied unembedding has no matrix of its own.
            matrix = next(one for one in (f"{parent}/weight", "embedding/weight", "embedding") if one in old)
            changes.append(ParameterChange(parent, _norm(old[matrix]), change))
    return changes


def _measure_product(old: Sequence[Any], new: Sequence[Any], scale: Any) -> float:
    """Returns the norm of (A * scale) B - (A0 * scale) B0 for stacked factors, without the products.

    It is P Q with P = [A * scale, -A0 * scale] and Q = [B; B0], and its squared norm the trace of (P'P)(QQ').
    """
    if all(np.array_equal(one, two) for one, two in zip(old, new, strict=True)):
        return 0.0
    (a0, b0), (a, b) = ([np.asarray(factor, np.float64) for factor in factors] for factors in (old, new))
    # Experts have an axis that their scale lacks.
    scales = np.expand_dims(np.asarray(scale, np.float64), tuple(range(np.ndim(scale) - 1, a.ndim - 1)))
    p, q = np.concatenate([a * scales, -a0 * scales], axis=-1), np.concatenate([b, b0], axis=-2)
    grams = p.swapaxes(-1, -2) @ p, q @ q.swapaxes(-1, -2)
    return math.sqrt(max(float((grams[0] * grams[1]).sum()), 0.0))


def _norm(array: Any) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64)))


def measure_responses(scores: Iterable[Score], *, has_end: bool) -> ResponseLosses | None:
    """Returns the losses of parts of the responses; None if none of them has three tokens.

    Args:
      has_end: whether the last token of a response is one that the template writes.
    """
    responses = [np.asarray(nll) for score in scores for nll in score.token_nll if len(nll) >= 3]
    if not responses:
        return None
    middle = np.concatenate([nll[1:-1] for nll in responses])
    return ResponseLosses(
        responses=len(responses),
        first=float(np.mean([nll[0] for nll in responses])),
        middle=float(middle.mean()),
        end=float(np.mean([nll[-1] for nll in responses])) if has_end else math.nan,
    )


def measure_held_out_change(before: Sequence[Score], after: Sequence[Score]) -> HeldOutChange | None:
    """Returns the change of the loss per token over the same dialogues; None for fewer than two with responses.

    The error is that of a ratio of sums over dialogues, since long dialogues have more tokens and the turns of one are
    not independent: sqrt(sum((d_i - change * n_i)^2) * k / (k - 1)) / sum(n_i) with k dialogues of n_i tokens.
    """
    pairs = [(one.record, two.record) for one, two in zip(before, after, strict=True) if one.record["tokens"]]
    if len(pairs) < 2:
        return None
    tokens = np.array([one["tokens"] for one, _ in pairs], np.float64)
    difference = np.array([two["nll"] - one["nll"] for one, two in pairs])
    change = float(difference.sum() / tokens.sum())
    squares = float(((difference - change * tokens) ** 2).sum())
    error = math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / float(tokens.sum())
    return HeldOutChange(len(pairs), int(tokens.sum()), change, error)


def measure_overlap(training: Iterable[Dialogue], held_out: Iterable[Dialogue]) -> Overlap:
    """Returns how many held-out responses are in the training data behind the same user message.

    White space and case do not matter. Responses of under 40 characters are not compared.
    """
    known = {key for dialogue in training for key in _list_keys(dialogue)}
    responses = shared = 0
    first: list[str] = []
    for dialogue in held_out:
        keys = _list_keys(dialogue)
        count = sum(key in known for key in keys)
        responses += len(keys)
        shared += count
        if count and len(first) < _LEADING_NAMES:
            first.append(dialogue.name)
    return Overlap(responses, shared, first)


def _list_keys(dialogue: Dialogue) -> list[bytes]:
    """Returns a hash of each response that is long enough, with the message before it."""
    keys = []
    for index, message in enumerate(dialogue.messages):
        history = dialogue.ancestors(index)
        if message.role == "assistant" and message.weight and history and len(message.content) >= _SHORTEST:
            text = "\0".join(_normalize(one) for one in (dialogue.messages[history[-1]], message))
            keys.append(hashlib.blake2b(text.encode(), digest_size=8).digest())
    return keys


def _normalize(message: Message) -> str:
    return " ".join(message.content.casefold().split())
