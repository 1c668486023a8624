"""Excerpts of a dialogue to weighted trees: the supervised tokens of each sequence, and the prefix tree of all.

Knows no files, lengths or rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.rendering.rendered_sequence import RenderedSequence
from dialog_jax.trees import fitting, objectives, prefix_tree
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Span, Tree


class SupervisedSequence(NamedTuple):
    """A sequence with at least one supervised span; the spans' turns are those of the complete dialogue."""

    excerpt: Excerpt
    sequence: RenderedSequence
    spans: list[Span]

    @property
    def original_index(self) -> int:
        """Index of the response in the complete dialogue; -1 for a full rendering, which has no response."""
        index = self.sequence.message_index
        return self.excerpt.original_indices[index] if index >= 0 else -1

    @property
    def tokens(self) -> Int32[np.ndarray, " n"]:
        """The tokens up to the last supervised one; those after it would cost time and train nothing."""
        return self.sequence.tokens[: max(span.stop for span in self.spans)]


def select_supervised(
    dialogue: Dialogue, groups: Sequence[Sequence[Excerpt]], objective: ObjectiveConfig
) -> list[list[SupervisedSequence]]:
    """Returns for each group of excerpts the sequences that have supervised tokens.

    With `conditional` and two turns, the second of weight 0, [[excerpt]] gives [[sequence of turn 0]].

    Args:
      groups: all excerpts of the dialogue that are kept; which turn is the last depends on all of them.
    """
    factors = iter(fitting.compute_factors(dialogue, [excerpt for group in groups for excerpt in group], objective))
    supervised: list[list[SupervisedSequence]] = []
    for group in groups:
        supervised.append([])
        for excerpt in group:
            span_lists = objectives.supervise(
                excerpt.sequences,
                excerpt.dialogue,
                objective,
                next(factors),
                context=excerpt.context,
            )
            for sequence, spans in zip(excerpt.sequences, span_lists, strict=True):
                if max((span.stop for span in spans), default=0) > 1:  # the first token is never a target
                    turn_spans = [s if s.turn < 0 else s._replace(turn=s.turn + excerpt.omitted_turns) for s in spans]
                    supervised[-1].append(SupervisedSequence(excerpt, sequence, turn_spans))
    return supervised


def select_responses(sequences: Sequence[SupervisedSequence]) -> dict[int, SupervisedSequence]:
    """Returns the sequences whose response is trained on, by the response's index in the complete dialogue."""
    return {one.original_index: one for one in sequences if any(span.turn >= 0 for span in one.spans)}


def build_trees(groups: Sequence[Sequence[SupervisedSequence]], objective: ObjectiveConfig) -> list[Tree | None]:
    """Returns the weighted tree of each group of a dialogue; None where there is nothing to train on.

    Every token is a target of weight above 0, or an ancestor of one. For a worked example see `prefix_tree.build_tree`.
    """
    trees: list[Tree | None] = []
    for sequences in groups:
        trees.append(None)
        if sequences:
            paths = [one.excerpt.path if objective.merge_weights == "sum" else 0 for one in sequences]
            tree = prefix_tree.build_tree([(one.tokens, one.spans) for one in sequences], paths)
            trees[-1] = tree if tree.weight.any() else None
    normalized = iter(prefix_tree.normalize([tree for tree in trees if tree is not None], objective.normalize))
    return [None if tree is None else next(normalized) for tree in trees]
