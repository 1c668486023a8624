"""The loss of every response of every dialogue: dialogues in, one record per dialogue out, in the same order.

Each dialogue is one tree, read once; a tree larger than the model's context is divided. `tree_scores` scores trees.
"""

import collections
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from dialog_jax.dialogues import holdout
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.evaluation import contexts as contexts_lib
from dialog_jax.evaluation import scored_trees, tree_scores
from dialog_jax.evaluation.scored_trees import ScoredTree
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training import score_steps
from dialog_jax.training.loss import TargetScores
from dialog_jax.trees import dataset, teacher_file
from dialog_jax.trees.teacher_file import Signal

_WINDOW = 1024  # dialogues that are packed together

_TURN_FIELDS = ("turn", "message", "tokens", "nll", "nll_last", "nll_none", "none_follows")


class Score(NamedTuple):
    """The scores of one dialogue."""

    record: dict[str, Any]
    """What `make_record` returns."""
    name: str
    """Of the dialogue, as in messages to the user."""
    tokens_read: int
    """Tokens that went through the model."""
    token_nll: Sequence[Float[np.ndarray, " _"]] = ()
    """The loss of each token of each scored response behind its full history, in the order of "turns"; empty from K
    passes."""
    signals: Sequence[Signal] = ()
    """The likeliest tokens at each token of each scored response, in the order of "turns"; empty for top_k = 0."""


def make_record(dialogue: Dialogue, turns: Sequence[dict[str, Any]], turns_cut: int) -> dict[str, Any]:
    """Returns the record of a dialogue's scores.

        {"id": "a1", "content": "93f1c2d47a60b58e", "tokens": 19, "nll": 61.2,
         "turns": [{"turn": 0, "message": 1, "tokens": 19, "nll": 61.2, "nll_last": 61.2, "nll_none": 70.4}]}

    `content` is a hash of what the template reads of the dialogue, by which `select` and training recognize it. `nll`
    is in nats, summed over the `tokens` of the response including its end of turn. `nll_last` and `nll_none` are there
    if asked for, and "turns_cut" if responses exceed the context.
    """
    record: dict[str, Any] = {
        "id": dialogue.id,
        "content": holdout.format_hash(dialogue),
        "tokens": sum(turn["tokens"] for turn in turns),
        "nll": math.fsum(turn["nll"] for turn in turns),
        "turns": list(turns),
    }
    if turns_cut:
        record["turns_cut"] = turns_cut
    return record


def score_dialogues(
    dialogues: Iterable[Dialogue],
    renderer: Renderer,
    model: DecoderConfig,
    parameters: dict,
    *,
    compute_dtype: jax.typing.DTypeLike,
    contexts: Sequence[str] = (),
    top_k: int = 0,
    skipped: list[str] | None = None,
) -> Iterator[Score]:
    """Yields the scores of `dialogues`, in their order.

    Assistant messages of weight above 0 are scored; the weight does not scale their loss. A response that exceeds the
    model's context together with one of its prompts is left out and counted in "turns_cut".

    Args:
      compute_dtype: of the forward pass; log-probabilities are float32, sums over a response float64.
      contexts: behind what else than its full history each response is scored: `last`, `none` (`contexts.CONTEXTS`).
      top_k: number of likeliest tokens in `signals`.
      skipped: where to append the error of each dialogue that the chat template refuses, which is then left out; None
        to raise it.

    Raises:
      UserError: what `Renderer.render` raises; `top_k` exceeds the vocabulary; or a loss is not finite.
    """
    if not 0 <= top_k <= model.vocab_size:
        raise UserError(f"top_k is {top_k:,}; it must be 0 to {model.vocab_size:,}, the size of the vocabulary.")
    score_step = score_steps.make_score_step(model, compute_dtype=compute_dtype, top_k=top_k)
    remaining = iter(dialogues)
    while window := list(itertools.islice(remaining, _WINDOW)):
        turns: list[dict[int, dict[str, Any]]] = [collections.defaultdict(dict) for _ in window]
        token_nll: list[dict[int, np.ndarray]] = [{} for _ in window]
        signals: list[list[Signal]] = [[] for _ in window]
        tokens_read = [0] * len(window)
        trees, turns_cut, errors = scored_trees.build_trees(window, renderer, model.context, contexts)
        for error in errors.values():
            if skipped is None:
                raise error
            skipped.append(str(error))
        columns = dataset.concatenate_trees(
            [tree.tree for tree in trees],
            shared_prefix_lengths=[tree.variants[0].sequence.virtual for tree in trees],
        )
        for number, node_scores in tree_scores.score_trees(columns, model.context, score_step, parameters):
            tree = trees[number]
            tokens_read[tree.dialogue] += len(tree.tree.tokens)
            for message, fields, losses in _list_turns(window[tree.dialogue], tree, np.asarray(node_scores.nll)):
                turns[tree.dialogue][message].update(fields)
                if "nll" in fields:
                    token_nll[tree.dialogue][message] = losses
            if top_k:
                signals[tree.dialogue] += _list_signals(tree, node_scores)
        for index, dialogue in enumerate(window):
            if index in errors:
                continue
            signals[index].sort(key=lambda signal: signal.message)
            ordered = [
                {name: fields[name] for name in _TURN_FIELDS if name in fields}
                for _, fields in sorted(turns[index].items())
            ]
            record = make_record(dialogue, ordered, turns_cut[index])
            nll = [token_nll[index][turn["message"]] for turn in ordered]
            yield Score(record, dialogue.name, tokens_read[index], nll, signals[index])


def _list_turns(
    dialogue: Dialogue, scored_tree: ScoredTree, nll: Float[np.ndarray, " nodes"]
) -> Iterator[tuple[int, dict[str, Any], Float[np.ndarray, " _"]]]:
    """Yields (message index, fields of its entry, loss of each token) for each response and context of a tree.

    A token that two responses share is counted in both.
    """
    for variant, nodes in zip(scored_tree.variants, scored_tree.nodes, strict=True):
        sequence = variant.sequence
        response = nodes[max(sequence.start, 1) :]
        value = math.fsum(nll[response])
        if not math.isfinite(value):
            raise UserError(
                f"{dialogue.name}: the loss of message {sequence.message_index} is {value}. The model's weights are "
                "damaged or overflow the type they are computed in; try float32."
            )
        message = sequence.message_index
        fields: dict[str, Any]
        if variant.context == "full":
            fields = {"turn": sequence.turn, "message": message, "tokens": len(response), "nll": value}
        else:
            fields = {f"nll_{variant.context}": value}
            if variant.follows_empty_message:
                fields["none_follows"] = contexts_lib.EMPTY_MESSAGE
        yield message, fields, nll[response]


def _list_signals(scored_tree: ScoredTree, scores: TargetScores) -> list[Signal]:
    """Returns one entry per response, behind its full history."""
    assert scores.top_token is not None and scores.top_log_probability is not None
    signals = []
    for (sequence, context, _), nodes in zip(scored_tree.variants, scored_tree.nodes, strict=True):
        if context != "full":
            continue
        # Without a soft prompt, so that the signals also serve a student with another one or none.
        start = max(sequence.start, sequence.virtual + 1)
        response = nodes[start:]
        signals.append(
            Signal(
                message=sequence.message_index,
                prompt=teacher_file.checksum(sequence.tokens[sequence.virtual : start]),
                token=sequence.tokens[start:],
                top_token=np.asarray(scores.top_token)[response],
                top_log_probability=np.asarray(scores.top_log_probability)[response],
            )
        )
    return signals
