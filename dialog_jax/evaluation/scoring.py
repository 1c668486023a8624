"""The loss of every response of every dialogue, by itself: dialogues in, a record each out, in the same order.

Each dialogue is one tree and is read once, packed into rows with others; where a template makes the tree larger than
the model's context, it is divided. Rows have one of a few lengths, so that short dialogues are cheap, memory is bounded
by the model's context, and there is one compilation a length.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from dialog_jax.batching import batches, packing
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.rendering.sequences import RenderedSequence, Renderer
from dialog_jax.training import train_step
from dialog_jax.training.loss import TargetScores
from dialog_jax.trees import dataset, prefix_tree, teacher
from dialog_jax.trees import fitting as fitting_lib
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.teacher import Signal

_WINDOW = 1024  # dialogues that are packed together
_RENDERED_TOGETHER = 128
_SHORTEST_ROW = 256
_PACKED_ROW = 1024  # rows of shorter dialogues are filled up to this length
_BATCH_TOKENS = 8192  # of a batch of several rows, on accelerators; on CPU a batch is one row

_ALL = ObjectiveConfig()  # every response


class Score(NamedTuple):
    """What is known of one dialogue."""

    record: dict[str, Any]
    """{"id", "tokens", "nll", "turns": [{"turn", "message", "tokens", "nll"}]}; nll in nats, summed over `tokens`,
    which are the response's, its end of turn included. With `turns_cut`, how many responses exceed the context."""
    name: str
    """The dialogue as messages to the user call it."""
    tokens_read: int
    """Tokens that went through the model."""
    signals: Sequence[Signal] = ()
    """The likeliest tokens at each token of the scored responses, in the order of `turns`; empty if not asked for."""


class _Piece(NamedTuple):
    """Sequences of one dialogue that share a tree."""

    dialogue: int  # index in the window
    tree: Tree
    sequences: list[RenderedSequence]  # with the numbers of their messages in the dialogue
    nodes: list[Int[np.ndarray, " _"]]  # of the tree, for each sequence


def score_dialogues(
    dialogues: Iterable[Dialogue],
    renderer: Renderer,
    model: DecoderConfig,
    parameters: dict,
    *,
    compute_dtype: jax.typing.DTypeLike,
    top_k: int = 0,
) -> Iterator[Score]:
    """Yields the scores of `dialogues`, in their order.

    Scored are the assistant messages of weight above 0; the weight does not scale them. A response that exceeds the
    model's context together with its prompt is left out and counted in `turns_cut`.

    Args:
      compute_dtype: of the forward pass; log-probabilities are float32, sums over a response float64.
      top_k: how many of the likeliest tokens to give in `signals`; 0 for none.

    Raises:
      UserError: what `Renderer.render` raises, or `top_k` exceeds the vocabulary.
      FloatingPointError: a loss is not finite; names the dialogue.
    """
    if not 0 <= top_k <= model.vocab_size:
        raise UserError(f"top_k is {top_k:,}; it must be 0 to {model.vocab_size:,}, the size of the vocabulary.")
    score_step = train_step.make_score_step(model, compute_dtype=compute_dtype, top_k=top_k)
    on_cpu = all(device.platform == "cpu" for device in jax.tree.leaves(parameters)[0].devices())
    remaining = iter(dialogues)
    while window := list(itertools.islice(remaining, _WINDOW)):
        turns: list[list[dict[str, Any]]] = [[] for _ in window]
        signals: list[list[Signal]] = [[] for _ in window]
        read = [0] * len(window)
        pieces, cut = _pieces(window, renderer, model.max_length)
        for row, scores in _rows(pieces, model.max_length, 1 if on_cpu else _BATCH_TOKENS, score_step, parameters):
            for piece, by_node in _by_node(row, scores):
                read[piece.dialogue] += len(piece.tree.tokens)
                turns[piece.dialogue] += _turns(window[piece.dialogue], piece, np.asarray(by_node.nll))
                if top_k:
                    signals[piece.dialogue] += _signals(piece, by_node)
        for dialogue, unordered, top, responses_cut, tokens_read in zip(window, turns, signals, cut, read, strict=True):
            ordered = sorted(unordered, key=lambda turn: turn["message"])
            record: dict[str, Any] = {
                "id": dialogue.id,
                "tokens": sum(turn["tokens"] for turn in ordered),
                "nll": math.fsum(turn["nll"] for turn in ordered),
                "turns": ordered,
            }
            if responses_cut:
                record["turns_cut"] = responses_cut
            yield Score(record, dialogue.name, tokens_read, sorted(top, key=lambda signal: signal.message))


def _pieces(window: Sequence[Dialogue], renderer: Renderer, context: int) -> tuple[list[_Piece], list[int]]:
    """(the trees of the window's dialogues, for each dialogue how many responses do not fit)."""
    paths = [(index, path) for index, dialogue in enumerate(window) for path in fitting_lib.unfold(dialogue, _ALL)]
    paths = [(index, path) for index, path in paths if path.wanted]
    sequences: list[list[RenderedSequence]] = [[] for _ in window]
    cut = [0] * len(window)
    for start in range(0, len(paths), _RENDERED_TOGETHER):
        part = paths[start : start + _RENDERED_TOGETHER]
        rendered = renderer.render([path.dialogue for _, path in part], max_length=context)
        for (index, path), some in zip(part, rendered, strict=True):
            fitting = _that_fit(path, list(some), renderer, context)
            cut[index] += len(path.wanted) - len(fitting)
            sequences[index] += [
                sequence._replace(message_index=path.messages[sequence.message_index]) for sequence in fitting
            ]
    pieces = []
    for index, of_dialogue in enumerate(sequences):
        for group in _groups(of_dialogue, context):
            tree, nodes = prefix_tree.build_trie([sequence.tokens for sequence in group])
            weight = np.zeros(len(tree.tokens), np.float32)
            for sequence, own in zip(group, nodes, strict=True):
                weight[own[max(sequence.start, 1) :]] = 1  # a first token has no context to be predicted from
            pieces.append(_Piece(index, tree._replace(weight=weight), group, nodes))
    return pieces, cut


def _that_fit(path: Excerpt, first: list[RenderedSequence], renderer: Renderer, context: int) -> list[RenderedSequence]:
    """All sequences of a path that have at most `context` tokens; `first` are those before one that has more.

    Where the template renders history as it was generated, later ones are longer still. Where it strips reasoning, one
    that fits may come after one that does not.
    """
    if len(first) == len(path.wanted):
        return first
    longer = path.wanted[len(first)]
    whole = renderer.render_text(path.dialogue, len(path.dialogue.messages))
    if whole.startswith(renderer.render_text(path.dialogue, longer + 1)):
        return first
    (sequences,) = renderer.render([path.dialogue])
    return [sequence for sequence in sequences if len(sequence.tokens) <= context]


def _groups(sequences: Iterable[RenderedSequence], context: int) -> Iterator[list[RenderedSequence]]:
    """The sequences in order, divided so that each group's tree has at most `context` tokens."""
    group: list[RenderedSequence] = []
    size = 0
    for sequence in sequences:
        new = fitting_lib.count_new_tokens(sequence, group)
        if group and size + new > context:
            yield group
            group, size, new = [], 0, len(sequence.tokens)
        group.append(sequence)
        size += new
    if group:
        yield group


def _rows(
    pieces: Sequence[_Piece],
    context: int,
    batch_tokens: int,
    score_step: Callable[[dict, batches.Batch], TargetScores],
    parameters: dict,
) -> Iterator[tuple[list[_Piece], TargetScores]]:
    """(the pieces of each row, the scores [S, ...] of its targets)."""
    if not pieces:
        return
    trees = dataset.concatenate_trees([piece.tree for piece in pieces])

    def start(length: int, rows: list[list[int]]) -> tuple[list[list[int]], TargetScores]:
        return rows, score_step(parameters, batches.fill_rows(trees, rows, max_length=length, max_targets=length))

    def finish(rows: list[list[int]], scores: TargetScores) -> Iterator[tuple[list[_Piece], TargetScores]]:
        scores = jax.device_get(scores)
        for place, row in enumerate(rows):
            yield [pieces[number] for number in row], jax.tree.map(lambda array, place=place: array[place], scores)

    running = None
    for length, rows in _batches(trees, context, batch_tokens):
        started = start(length, rows)
        if running is not None:  # while the device works on what was just started
            yield from finish(*running)
        running = started
    assert running is not None
    yield from finish(*running)


def _batches(trees: dataset.Trees, context: int, batch_tokens: int) -> Iterator[tuple[int, list[list[int]]]]:
    """(length of the rows, the rows of a batch): the longest first, so that too little memory shows at once.

    Trees longer than half a row's length get rows of that length, filled up with shorter ones; lengths halve from the
    context down to `_PACKED_ROW`. A row that stays emptier is run at the shortest length that holds it.
    """
    tokens, targets = trees.sizes()
    left = np.arange(len(trees))
    length = context
    by_length: dict[int, list[list[int]]] = collections.defaultdict(list)
    while len(left):
        below = length // 2 if length // 2 >= _PACKED_ROW else 0
        rng = np.random.default_rng(0)
        packed = packing.pack_trees(tokens[left], targets[left], max_length=length, max_targets=length, rng=rng)
        rows = [left[part].tolist() for part in packed]
        kept = [row for row in rows if tokens[row].max() > below]
        for row in kept:
            by_length[_row_length(int(tokens[row].sum()), length)].append(row)
        left = np.setdiff1d(left, list(itertools.chain(*kept)))
        length = below
    for length, rows in sorted(by_length.items(), reverse=True):
        together = max(1, batch_tokens // length)
        for start in range(0, len(rows), together):
            batch = rows[start : start + together]
            yield length, batch + [[] for _ in range(together - len(batch))]


def _row_length(used: int, longest: int) -> int:
    """The shortest of `longest`, half of it, a quarter, ... down to `_SHORTEST_ROW` that holds `used` tokens."""
    length = longest
    while length // 2 >= max(used, _SHORTEST_ROW):
        length //= 2
    return length


def _by_node(pieces: Sequence[_Piece], scores: TargetScores) -> Iterator[tuple[_Piece, TargetScores]]:
    """(each piece of a row, the scores of each of its nodes, 0 where there is no target)."""
    filled = 0
    for piece in pieces:
        count = len(piece.tree.tokens)
        _, nodes = prefix_tree.find_targets(piece.tree)

        def spread(array, count=count, nodes=nodes, filled=filled):
            by_node = np.zeros((count, *array.shape[1:]), array.dtype)
            by_node[nodes] = array[filled : filled + len(nodes)]
            return by_node

        filled += len(nodes)
        yield piece, jax.tree.map(spread, scores)


def _turns(dialogue: Dialogue, piece: _Piece, nll: Float[np.ndarray, " nodes"]) -> list[dict[str, Any]]:
    """One entry a response; a token that two responses share is counted in both."""
    turns = []
    for sequence, nodes in zip(piece.sequences, piece.nodes, strict=True):
        response = nodes[max(sequence.start, 1) :]
        value = math.fsum(nll[response])
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{dialogue.name}: the loss of message {sequence.message_index} is {value}. The model's weights are "
                "damaged, or too large for the type they are computed in: try float32."
            )
        turns.append({"turn": sequence.turn, "message": sequence.message_index, "tokens": len(response), "nll": value})
    return turns


def _signals(piece: _Piece, scores: TargetScores) -> list[Signal]:
    """One entry a response."""
    assert scores.top_token is not None and scores.top_log_probability is not None
    signals = []
    for sequence, nodes in zip(piece.sequences, piece.nodes, strict=True):
        start = max(sequence.start, 1)
        response = nodes[start:]
        signals.append(
            Signal(
                message=sequence.message_index,
                prompt=teacher.checksum(sequence.tokens[:start]),
                token=sequence.tokens[start:],
                top_token=np.asarray(scores.top_token)[response],
                top_log_probability=np.asarray(scores.top_log_probability)[response],
            )
        )
    return signals
