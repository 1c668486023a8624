"""Paths of a dialogue to its weighted tree: what is trained on of each sequence, and the trie of it all.

Knows no file, and nothing of lengths or rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.rendering.sequences import RenderedSequence
from dialog_jax.trees import fitting, objectives, prefix_tree
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Span, Tree


class SupervisedSequence(NamedTuple):
    """A sequence with its supervised spans, of which there is at least one; turns are those of the whole dialogue."""

    piece: Excerpt
    sequence: RenderedSequence
    spans: list[Span]

    @property
    def message(self) -> int:
        """The response's number in the whole dialogue; -1 in a whole rendering."""
        return self.piece.messages[self.sequence.message_index] if self.sequence.message_index >= 0 else -1

    @property
    def tokens(self) -> Int32[np.ndarray, " n"]:
        """Those of the sequence up to the last that is trained on; what follows costs, and teaches nothing."""
        return self.sequence.tokens[: max(span.stop for span in self.spans)]


def select_supervised(
    dialogue: Dialogue, groups: Sequence[Sequence[Excerpt]], objective: ObjectiveConfig
) -> list[list[SupervisedSequence]]:
    """Returns the sequences of each group of pieces of which something is trained on.

    Args:
      groups: all pieces of the dialogue that are kept: which turn is the last one depends on all of them.
    """
    factors = iter(fitting.compute_factors(dialogue, [piece for group in groups for piece in group], objective))
    found: list[list[SupervisedSequence]] = []
    for group in groups:
        found.append([])
        for piece in group:
            spans = objectives.supervise(
                piece.sequences, piece.dialogue, objective, next(factors), trained=piece.trained
            )
            for sequence, own in zip(piece.sequences, spans, strict=True):
                if max((span.stop for span in own), default=0) > 1:  # the first token is nobody's target
                    turned = [s if s.turn < 0 else s._replace(turn=s.turn + piece.first_turn) for s in own]
                    found[-1].append(SupervisedSequence(piece, sequence, turned))
    return found


def select_responses(sequences: Sequence[SupervisedSequence]) -> dict[int, SupervisedSequence]:
    """Those that train a response, by its number in the whole dialogue."""
    return {one.message: one for one in sequences if any(span.turn >= 0 for span in one.spans)}


def build_trees(groups: Sequence[Sequence[SupervisedSequence]], objective: ObjectiveConfig) -> list[Tree | None]:
    """Returns the weighted tree of each group of a dialogue; None where there is nothing to train on.

    Every token is a target of weight above 0, or an ancestor of one.
    """
    built: list[Tree | None] = []
    for sequences in groups:
        built.append(None)
        if sequences:
            paths = [one.piece.path if objective.merge_weights == "sum" else 0 for one in sequences]
            tree = prefix_tree.build_tree([(one.tokens, one.spans) for one in sequences], paths)
            built[-1] = tree if tree.weight.any() else None
    normalised = iter(prefix_tree.normalise([tree for tree in built if tree is not None], objective.normalise))
    return [None if tree is None else next(normalised) for tree in built]
