"""The loss of every response of every dialogue: dialogues in, one record per dialogue out, in the same order.

Each dialogue is one tree, read once; a tree larger than the model's context is divided. `tree_scores` scores trees.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.evaluation import tree_scores
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.rendering.rendered_sequence import RenderedSequence
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training import score_steps
from dialog_jax.training.loss import TargetScores
from dialog_jax.trees import dataset, division, fitting, prefix_tree, refusals, teacher_file
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.teacher_file import Signal

_WINDOW = 1024  # dialogues that are packed together
_RENDER_BATCH = 128  # paths that are rendered by one call

_ALL = ObjectiveConfig()  # trains on every response


class Score(NamedTuple):
    """The scores of one dialogue."""

    record: dict[str, Any]
    """{"id", "tokens", "nll", "turns": [{"turn", "message", "tokens", "nll"}]}; nll in nats, summed over the
    `tokens` of the response including its end of turn. Also "turns_cut", if responses exceed the context: how many."""
    name: str
    """Of the dialogue, as in messages to the user."""
    tokens_read: int
    """Tokens that went through the model."""
    signals: Sequence[Signal] = ()
    """The likeliest tokens at each token of each scored response, in the order of "turns"; empty for top_k = 0."""


class _ScoredTree(NamedTuple):
    """Sequences of one dialogue that share a tree."""

    dialogue: int  # index in the window
    tree: Tree
    sequences: list[RenderedSequence]  # message_index is that of the dialogue
    nodes: list[Int[np.ndarray, " _"]]  # of each sequence in the tree


def score_dialogues(
    dialogues: Iterable[Dialogue],
    renderer: Renderer,
    model: DecoderConfig,
    parameters: dict,
    *,
    compute_dtype: jax.typing.DTypeLike,
    top_k: int = 0,
    skipped: list[str] | None = None,
) -> Iterator[Score]:
    """Yields the scores of `dialogues`, in their order.

    Assistant messages of weight above 0 are scored; the weight does not scale their loss. A response that exceeds the
    model's context together with its prompt is left out and counted in "turns_cut".

    Args:
      compute_dtype: of the forward pass; log-probabilities are float32, sums over a response float64.
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
        turns: list[list[dict[str, Any]]] = [[] for _ in window]
        signals: list[list[Signal]] = [[] for _ in window]
        tokens_read = [0] * len(window)
        trees, turns_cut, errors = _build_trees(window, renderer, model.context)
        for error in errors.values():
            if skipped is None:
                raise error
            skipped.append(str(error))
        columns = dataset.concatenate_trees(
            [tree.tree for tree in trees], shared_prefix_lengths=[tree.sequences[0].virtual for tree in trees]
        )
        for number, node_scores in tree_scores.score_trees(columns, model.context, score_step, parameters):
            tree = trees[number]
            tokens_read[tree.dialogue] += len(tree.tree.tokens)
            turns[tree.dialogue] += _list_turns(window[tree.dialogue], tree, np.asarray(node_scores.nll))
            if top_k:
                signals[tree.dialogue] += _list_signals(tree, node_scores)
        for index, dialogue in enumerate(window):
            if index in errors:
                continue
            turns[index].sort(key=lambda turn: turn["message"])
            signals[index].sort(key=lambda signal: signal.message)
            record: dict[str, Any] = {
                "id": dialogue.id,
                "tokens": sum(turn["tokens"] for turn in turns[index]),
                "nll": math.fsum(turn["nll"] for turn in turns[index]),
                "turns": turns[index],
            }
            if turns_cut[index]:
                record["turns_cut"] = turns_cut[index]
            yield Score(record, dialogue.name, tokens_read[index], signals[index])


def _build_trees(
    window: Sequence[Dialogue], renderer: Renderer, context: int
) -> tuple[list[_ScoredTree], list[int], dict[int, UserError]]:
    """Returns the trees of the window's dialogues, and what is left out.

    That is for each dialogue the number of its responses that exceed the context, and by index in the window the errors
    of dialogues that the chat template refuses.
    """
    errors: dict[int, UserError] = {}
    render = functools.partial(_render_fitting, renderer=renderer, context=context)
    paths = [(index, path) for index, dialogue in enumerate(window) for path in fitting.unfold(dialogue, _ALL)]
    paths = [(index, path) for index, path in paths if path.supervised_messages]
    sequences: list[list[RenderedSequence]] = [[] for _ in window]
    turns_cut = [0] * len(window)
    for start in range(0, len(paths), _RENDER_BATCH):
        part = paths[start : start + _RENDER_BATCH]
        rendered = refusals.call_with_each(render, [path for _, path in part])
        for (index, path), selected in zip(part, rendered, strict=True):
            if isinstance(selected, UserError):
                errors.setdefault(index, selected)
                continue
            turns_cut[index] += len(path.supervised_messages) - len(selected)
            sequences[index] += [
                sequence._replace(message_index=path.original_indices[sequence.message_index]) for sequence in selected
            ]
    trees = []
    for index, dialogue_sequences in enumerate(sequences):
        if index not in errors and dialogue_sequences:
            trees += _divide(index, dialogue_sequences, context)
    return trees, turns_cut, errors


def _render_fitting(paths: Sequence[Excerpt], *, renderer: Renderer, context: int) -> list[list[RenderedSequence]]:
    """Returns for each path its sequences of at most `context` tokens."""
    rendered = renderer.render([path.dialogue for path in paths], max_length=context)
    return [list(sequences) for sequences in rendered]


def _divide(dialogue: int, sequences: Sequence[RenderedSequence], context: int) -> list[_ScoredTree]:
    """Returns trees of at most `context` tokens in which each of a dialogue's sequences is scored once."""
    tree, all_nodes = prefix_tree.build_trie([sequence.tokens for sequence in sequences])
    parts = division.divide_tree(tree, context)
    groups: list[list[int]] = [[] for _ in parts]
    for number, sequence_nodes in enumerate(all_nodes):
        next(group for group, part in zip(groups, parts, strict=True) if sequence_nodes[-1] in part).append(number)
    trees = []
    for group, part, part_tree in zip(groups, parts, division.select_nodes(tree, parts), strict=True):
        nodes = [np.searchsorted(part, all_nodes[number]) for number in group]
        weight = np.zeros(len(part), np.float32)
        for number, sequence_nodes in zip(group, nodes, strict=True):
            weight[sequence_nodes[max(sequences[number].start, 1) :]] = 1  # nothing predicts a first token
        trees.append(
            _ScoredTree(dialogue, part_tree._replace(weight=weight), [sequences[number] for number in group], nodes)
        )
    return trees


def _list_turns(dialogue: Dialogue, scored_tree: _ScoredTree, nll: Float[np.ndarray, " nodes"]) -> list[dict[str, Any]]:
    """Returns one entry per response; a token that two responses share is counted in both."""
    turns = []
    for sequence, nodes in zip(scored_tree.sequences, scored_tree.nodes, strict=True):
        response = nodes[max(sequence.start, 1) :]
        value = math.fsum(nll[response])
        if not math.isfinite(value):
            raise UserError(
                f"{dialogue.name}: the loss of message {sequence.message_index} is {value}. The model's weights are "
                "damaged or overflow the type they are computed in; try float32."
            )
        turns.append({"turn": sequence.turn, "message": sequence.message_index, "tokens": len(response), "nll": value})
    return turns


def _list_signals(scored_tree: _ScoredTree, scores: TargetScores) -> list[Signal]:
    """Returns one entry per response."""
    assert scores.top_token is not None and scores.top_log_probability is not None
    signals = []
    for sequence, nodes in zip(scored_tree.sequences, scored_tree.nodes, strict=True):
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
