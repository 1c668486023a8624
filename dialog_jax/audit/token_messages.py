"""Which message each token of a tree belongs to."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import prefix_tree
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.weighting import SupervisedSequence


def find_messages(
    tree: Tree, sequences: Sequence[SupervisedSequence], renderer: Renderer
) -> tuple[list[int], list[UserError]]:
    """Returns for each node of a tree the index of the message it belongs to, -1 for what the chat template adds.

    Also returns an error for each message of a history whose tokens cannot be found, because the template changes more
    than the message's own place when the message changes. Its tokens there have -1.

    Args:
      sequences: those of the tree.
    """
    messages = [-1] * len(tree.tokens)
    errors: dict[int, UserError] = {}
    _, nodes_of_sequences = prefix_tree.build_trie([one.tokens for one in sequences])
    before: np.ndarray = np.zeros(0, np.int32)  # the tokens of the previous sequence, and the spans of its messages
    spans: dict[int, tuple[int, int]] = {}
    for one, nodes in zip(sequences, nodes_of_sequences, strict=True):
        shared = prefix_tree.common_prefix_length(before, one.sequence.tokens) if len(before) else 0
        spans = {message: span for message, span in spans.items() if span[1] <= shared}
        history = one.excerpt.original_indices[: one.sequence.message_index if one.original_index >= 0 else None]
        unknown = [message for message in history if message not in spans]
        try:
            spans |= _locate_messages(one, unknown, renderer)
        except UserError:  # of one of them; the others have a place
            for message in unknown:
                try:
                    spans |= _locate_messages(one, [message], renderer)
                except UserError as error:
                    errors.setdefault(message, error)
        if one.original_index >= 0:
            spans[one.original_index] = one.sequence.start, len(one.sequence.tokens)
        for message, (start, stop) in spans.items():
            for node in nodes[start:stop]:
                messages[node] = message
        before = one.sequence.tokens
    return messages, list(errors.values())


def _locate_messages(
    one: SupervisedSequence, numbers: Collection[int], renderer: Renderer
) -> dict[int, tuple[int, int]]:
    """Returns the spans in a sequence of some messages before its response, by their index in the dialogue.

    Raises:
      UserError: the template changes more than a message's own place when the message changes.
    """
    messages = one.excerpt.dialogue.messages
    stop = one.sequence.message_index + 1 or len(messages)
    # Only the response has a weight, so that the renderer yields no sequence for other messages.
    weighted = tuple(
        dataclasses.replace(message, weight=float(index == one.sequence.message_index), parts=())
        for index, message in enumerate(messages[:stop])
    )
    wanted = [
        message for message, number in zip(weighted, one.excerpt.original_indices, strict=False) if number in numbers
    ]
    (rendered,) = renderer.render(
        [dataclasses.replace(one.excerpt.dialogue, messages=weighted)],
        full=one.sequence.turn < 0,
        locate=lambda message: any(message is other for other in wanted),
    )
    return {
        one.excerpt.original_indices[place.message_index]: (place.start, place.stop)
        for place in list(rendered)[-1].message_spans
    }
