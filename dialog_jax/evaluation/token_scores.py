"""The scores of every token of prefix trees, also of those that are not trained on.

In: complete trees of dialogues, and a model. Out: for each tree the loss of each of its tokens, and the likeliest
tokens at its place. Knows no dialogues and no weights of an objective.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Int32

from dialog_jax.errors import UserError
from dialog_jax.evaluation import tree_scores
from dialog_jax.inference.loading import Model
from dialog_jax.training import score_steps
from dialog_jax.trees import dataset, division
from dialog_jax.trees.prefix_tree import Tree


class TokenScores(NamedTuple):
    """The scores of the tokens of a tree."""

    nll: Float[np.ndarray, " N"]
    """-log p(token | ancestors), in nats; nan for a first token, which nothing predicts, and beyond the context."""
    top_token: Int[np.ndarray, "N K"]
    """The K likeliest tokens at the token's place, likeliest first."""
    top_probability: Float[np.ndarray, "N K"]


def score_tokens(
    trees: Sequence[Tree],
    model: Model,
    *,
    compute_dtype: jax.typing.DTypeLike,
    top_k: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TokenScores]:
    """Returns the scores of all tokens of each tree.

    Args:
      trees: without virtual tokens; those of the model are put in front. Weights are not read.
      progress: called with the number of tokens that are scored, and their total.

    Raises:
      UserError: a loss is not finite, or `top_k` exceeds the vocabulary.
    """
    if not 0 < top_k <= model.config.vocab_size:
        raise UserError(f"top_k is {top_k:,}; it must be 1 to {model.config.vocab_size:,}, the size of the vocabulary.")
    virtual = model.renderer.virtual_tokens.ids()
    parts, places = _divide_trees(trees, virtual, model.config.context)
    scores = [
        TokenScores(
            nll=np.full(len(tree.tokens), np.nan, np.float32),
            top_token=np.zeros((len(tree.tokens), top_k), np.int32),
            top_probability=np.zeros((len(tree.tokens), top_k), np.float32),
        )
        for tree in trees
    ]
    score_step = score_steps.make_score_step(model.config, compute_dtype=compute_dtype, top_k=top_k)
    columns = dataset.concatenate_trees(parts, shared_prefix_lengths=[len(virtual)] * len(parts))
    total, done = sum(len(part.tokens) for part in parts), 0
    for index, part_scores in tree_scores.score_trees(columns, model.config.context, score_step, model.parameters):
        number, nodes = places[index]
        scored = np.flatnonzero(parts[index].weight > 0)
        values = np.asarray(part_scores.nll)[scored]
        if not np.isfinite(values).all():
            raise UserError(
                f"{model.path.name}: the loss of a token is not finite. The model's weights are damaged or overflow "
                "the type they are computed in."
            )
        targets = nodes[scored - len(virtual)]
        scores[number].nll[targets] = values
        scores[number].top_token[targets] = np.asarray(part_scores.top_token)[scored]
        scores[number].top_probability[targets] = np.exp(np.asarray(part_scores.top_log_probability)[scored])
        done += len(parts[index].tokens)
        progress(done, total)
    return scores


def _divide_trees(
    trees: Sequence[Tree], virtual: Int32[np.ndarray, " P"], context: int
) -> tuple[list[Tree], list[tuple[int, Int[np.ndarray, " n"]]]]:
    """Returns trees of at most `context` tokens in which every token is a target once; and the tree and nodes of each.

    Tokens at a position beyond the context are left out.
    """
    parts: list[Tree] = []
    places: list[tuple[int, np.ndarray]] = []
    room = context - len(virtual)
    for number, tree in enumerate(trees):
        within = np.flatnonzero(tree.position < room)
        (whole,) = division.select_nodes(tree, [within])
        whole = whole._replace(weight=(whole.parent >= 0).astype(np.float32))
        divided = division.divide_tree(whole, room)
        for nodes, part in zip(divided, division.select_nodes(whole, divided), strict=True):
            parts.append(_prepend(part, virtual))
            places.append((number, within[nodes]))
    return parts, places


def _prepend(tree: Tree, virtual: Int32[np.ndarray, " P"]) -> Tree:
    """Returns the tree behind a path of virtual tokens, which are no targets."""
    count = len(virtual)
    if not count:
        return tree
    size = count + len(tree.tokens)
    path = Tree(
        tokens=virtual,
        parent=np.arange(-1, count - 1, dtype=np.int32),
        position=np.arange(count, dtype=np.int32),
        subtree_end=np.full(count, size, np.int32),
        weight=np.zeros(count, np.float32),
        turn=np.full(count, -1, np.int32),
    )
    shifted = tree._replace(
        parent=np.where(tree.parent < 0, count - 1, tree.parent + count).astype(np.int32),
        position=tree.position + np.int32(count),
        subtree_end=tree.subtree_end + np.int32(count),
    )
    return Tree(*(np.concatenate(columns) for columns in zip(path, shifted, strict=True)))
