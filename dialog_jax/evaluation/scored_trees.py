"""Dialogues to the trees that are scored: every response once in each context, in trees that fit the model's context.

Knows no rows and no model.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.evaluation import contexts as contexts_lib
from dialog_jax.evaluation.contexts import ContextSequence
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import division, fitting, prefix_tree, refusals
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree

_RENDER_BATCH = 128  # paths that are rendered by one call

_ALL = ObjectiveConfig()  # trains on every response


class ScoredTree(NamedTuple):
    """Sequences of one dialogue that share a tree."""

    dialogue: int  # index in the window
    tree: Tree
    variants: list[ContextSequence]  # message_index is that of the dialogue
    nodes: list[Int[np.ndarray, " _"]]  # of each sequence in the tree


def build_trees(
    window: Sequence[Dialogue], renderer: Renderer, context: int, contexts: Sequence[str]
) -> tuple[list[ScoredTree], list[int], dict[int, UserError]]:
    """Returns the trees of the window's dialogues, and what is left out.

    That is for each dialogue the number of its responses that exceed the context, and by index in the window the errors
    of dialogues that the chat template refuses.
    """
    errors: dict[int, UserError] = {}
    render = functools.partial(_render_fitting, renderer=renderer, context=context, contexts=contexts)
    paths = [(index, path) for index, dialogue in enumerate(window) for path in fitting.unfold(dialogue, _ALL)]
    paths = [(index, path) for index, path in paths if path.supervised_messages]
    variants: list[list[ContextSequence]] = [[] for _ in window]
    turns_cut = [0] * len(window)
    for start in range(0, len(paths), _RENDER_BATCH):
        part = paths[start : start + _RENDER_BATCH]
        rendered = refusals.call_with_each(render, [path for _, path in part])
        for (index, path), selected in zip(part, rendered, strict=True):
            if isinstance(selected, UserError):
                errors.setdefault(index, selected)
                continue
            turns_cut[index] += len(path.supervised_messages) - len(selected)
            for variant in itertools.chain(*selected):
                message_index = path.original_indices[variant.sequence.message_index]
                sequence = variant.sequence._replace(message_index=message_index)
                variants[index].append(variant._replace(sequence=sequence))
    trees = []
    for index, dialogue_variants in enumerate(variants):
        if index not in errors and dialogue_variants:
            trees += _divide(index, dialogue_variants, context)
    return trees, turns_cut, errors


def _render_fitting(
    paths: Sequence[Excerpt], *, renderer: Renderer, context: int, contexts: Sequence[str]
) -> list[list[list[ContextSequence]]]:
    """Returns for each path its responses of at most `context` tokens with each prompt, behind all of these."""
    rendered = renderer.render([path.dialogue for path in paths], max_length=context)
    variants = [
        contexts_lib.add_contexts(path.dialogue, list(sequences), renderer, contexts)
        for path, sequences in zip(paths, rendered, strict=True)
    ]
    return [
        [response for response in path if all(len(one.sequence.tokens) <= context for one in response)]
        for path in variants
    ]


def _divide(dialogue: int, variants: Sequence[ContextSequence], context: int) -> list[ScoredTree]:
    """Returns trees of at most `context` tokens in which each of a dialogue's sequences is scored once."""
    sequences = [variant.sequence for variant in variants]
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
            ScoredTree(dialogue, part_tree._replace(weight=weight), [variants[number] for number in group], nodes)
        )
    return trees
