"""Which message each token of a tree belongs to."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from dialog_jax.rendering.sequences import MessageSpan, Renderer
from dialog_jax.trees import prefix_tree
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.weighting import SupervisedSequence


def find_messages(tree: Tree, sequences: Sequence[SupervisedSequence], renderer: Renderer) -> list[int]:
    """Returns for each node of a tree the index of the message it belongs to; -1 for what the chat template adds.

    Args:
      sequences: those of the tree.

    Raises:
      UserError: the template changes more than a message's own place when the message changes.
    """
    messages = [-1] * len(tree.tokens)
    _, nodes_of_sequences = prefix_tree.build_trie([one.tokens for one in sequences])
    before: np.ndarray = np.zeros(0, np.int32)  # the tokens of the previous sequence, and the spans of its messages
    spans: dict[int, tuple[int, int]] = {}
    for one, nodes in zip(sequences, nodes_of_sequences, strict=True):
        shared = prefix_tree.common_prefix_length(before, one.sequence.tokens) if len(before) else 0
        spans = {message: span for message, span in spans.items() if span[1] <= shared}
        spans |= {
            one.excerpt.original_indices[place.message_index]: (place.start, place.stop)
            for place in _locate_messages(one, spans, renderer)
        }
        if one.original_index >= 0:
            spans[one.original_index] = one.sequence.start, len(one.sequence.tokens)
        for message, (start, stop) in spans.items():
            for node in nodes[start:stop]:
                messages[node] = message
        before = one.sequence.tokens
    return messages


def _locate_messages(one: SupervisedSequence, known: Collection[int], renderer: Renderer) -> tuple[MessageSpan, ...]:
    """Returns the spans in a sequence of the messages before its response, without the `known` ones."""
    messages = one.excerpt.dialogue.messages
    stop = one.sequence.message_index + 1 or len(messages)
    # Only the response has a weight, so that the renderer yields no sequence for other messages.
    weighted = tuple(
        dataclasses.replace(message, weight=float(index == one.sequence.message_index), parts=())
        for index, message in enumerate(messages[:stop])
    )
    unknown = [
        message for message, number in zip(weighted, one.excerpt.original_indices, strict=False) if number not in known
    ]
    (rendered,) = renderer.render(
        [dataclasses.replace(one.excerpt.dialogue, messages=weighted)],
        full=one.sequence.turn < 0,
        locate=lambda message: any(message is other for other in unknown),
    )
    return list(rendered)[-1].message_spans
