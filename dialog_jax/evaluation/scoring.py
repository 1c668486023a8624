"""The loss of every response of every dialogue: dialogues in, one record per dialogue out, in the same order.

Each dialogue is one tree, read once and packed into rows with others. A tree larger than the model's context is
divided. Rows have one of a few lengths, so that short dialogues are cheap, memory is bounded by the model's context,
and few programs are compiled.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from dialog_jax.batching import batches, packing
from dialog_jax.dialogues import holdout
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.evaluation import contexts as contexts_lib
from dialog_jax.evaluation import scored_trees
from dialog_jax.evaluation.scored_trees import ScoredTree
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training import score_steps
from dialog_jax.training.loss import TargetScores
from dialog_jax.trees import dataset, prefix_tree, teacher_file
from dialog_jax.trees.teacher_file import Signal

_WINDOW = 1024  # dialogues that are packed together
_SHORTEST_ROW = 256
_PACKED_ROW = 1024  # rows of shorter dialogues are filled up to this length
_BATCH_TOKENS = 8192  # of a batch of several rows, on accelerators; on CPU a batch is one row

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
    on_cpu = all(device.platform == "cpu" for device in jax.tree.leaves(parameters)[0].devices())
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
        for row, scores in _score_rows(trees, model.context, 1 if on_cpu else _BATCH_TOKENS, score_step, parameters):
            for tree, node_scores in _split_row(row, scores):
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


def _score_rows(
    scored_trees: Sequence[ScoredTree],
    context: int,
    batch_tokens: int,
    score_step: Callable[[dict, batches.Batch], TargetScores],
    parameters: dict,
) -> Iterator[tuple[list[ScoredTree], TargetScores]]:
    """Yields (the trees of each row, the scores [S, ...] of its targets)."""
    if not scored_trees:
        return
    # A row has a soft prompt once. None of its tokens is a target, so the targets of a row are in the trees' order.
    trees = dataset.concatenate_trees(
        [scored_tree.tree for scored_tree in scored_trees],
        shared_prefix_lengths=[scored_tree.variants[0].sequence.virtual for scored_tree in scored_trees],
    )

    def start(length: int, rows: list[list[int]]) -> tuple[list[list[int]], TargetScores]:
        return rows, score_step(parameters, batches.fill_rows(trees, rows, max_length=length))

    def finish(rows: list[list[int]], scores: TargetScores) -> Iterator[tuple[list[ScoredTree], TargetScores]]:
        scores = jax.device_get(scores)
        for b, row in enumerate(rows):
            yield [scored_trees[number] for number in row], jax.tree.map(lambda array, b=b: array[b], scores)

    # One batch ahead: the device works on the next batch while this one is read back.
    running = None
    for length, rows in _make_batches(trees, context, batch_tokens):
        started = start(length, rows)
        if running is not None:
            yield from finish(*running)
        running = started
    assert running is not None
    yield from finish(*running)


def _make_batches(trees: dataset.Trees, context: int, batch_tokens: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Yields (length of the rows, the rows of a batch), longest rows first, so that a lack of memory shows at once.

    Trees longer than half of a row get rows of that length, filled up with shorter trees; row lengths halve from the
    context down to `_PACKED_ROW`. A row that is not full runs at the shortest length that holds it.
    """
    tokens, targets = trees.sizes()
    shared_prefix = int(trees.shared_prefix_length[0])
    remaining = np.arange(len(trees))
    length = context
    rows_by_length: dict[int, list[list[int]]] = collections.defaultdict(list)
    while len(remaining):
        next_length = length // 2 if length // 2 >= _PACKED_ROW else 0
        packed = packing.pack_trees(
            tokens[remaining],
            targets[remaining],
            max_length=length,
            rng=np.random.default_rng(0),
            shared_prefix_length=trees.shared_prefix_length[remaining],
            shared_prefix_id=trees.shared_prefix_id[remaining],
        )
        rows = [remaining[indices].tolist() for indices in packed]
        rows = [row for row in rows if tokens[row].max() > next_length]
        for row in rows:
            size = int(tokens[row].sum()) - (len(row) - 1) * shared_prefix
            rows_by_length[_find_row_length(size, length)].append(row)
        remaining = np.setdiff1d(remaining, list(itertools.chain(*rows)))
        length = next_length
    for length, rows in sorted(rows_by_length.items(), reverse=True):
        batch_size = max(1, batch_tokens // length)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            yield length, batch + [[] for _ in range(batch_size - len(batch))]


def _find_row_length(tokens: int, longest: int) -> int:
    """Returns the shortest of `longest`, half of it, a quarter, ... down to `_SHORTEST_ROW` that holds the tokens."""
    length = longest
    while length // 2 >= max(tokens, _SHORTEST_ROW):
        length //= 2
    return length


def _split_row(row: Sequence[ScoredTree], scores: TargetScores) -> Iterator[tuple[ScoredTree, TargetScores]]:
    """Yields (each tree of a row, the scores of its nodes, 0 where a node is no target).

    A row of two trees with three nodes each, of which nodes 1 and 2 and node 2 are targets, has nll [5, 6, 7, 0, ...].
    The first tree gets [0, 5, 6] and the second [0, 0, 7].
    """
    start = 0
    for scored_tree in row:
        node_count = len(scored_tree.tree.tokens)
        _, nodes = prefix_tree.find_targets(scored_tree.tree)
        stop = start + len(nodes)

        def spread(array, node_count=node_count, nodes=nodes, part=slice(start, stop)):
            values = np.zeros((node_count, *array.shape[1:]), array.dtype)
            values[nodes] = array[part]
            return values

        yield scored_tree, jax.tree.map(spread, scores)
        start = stop


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
