"""Random forests in depth-first order, drawn as parents: ancestors are found by walking, not by masks."""

import numpy as np


def random_parents(rng: np.random.Generator, length: int, root: float = 0.05, branch: float = 0.2) -> list[int]:
    """The parent of each token, -1 for a root: mostly the token before, sometimes an earlier one of its path."""
    parents, path = [], []
    for token in range(length):
        draw = rng.random()
        if draw < root:
            path = []
        elif draw < root + branch and path:
            path = path[: rng.integers(1, len(path) + 1)]
        parents.append(path[-1] if path else -1)
        path = [*path, token]
    return parents


def lineage(parents: list[int], token: int) -> list[int]:
    """The ancestors of `token` from its root on, itself last."""
    path = []
    while token >= 0:
        path.append(token)
        token = parents[token]
    return path[::-1]


def arrays(parents: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """`position` and `subtree_end` of one row, int32."""
    position = np.array([len(lineage(parents, token)) - 1 for token in range(len(parents))], np.int32)
    subtree_end = np.arange(1, len(parents) + 1, dtype=np.int32)
    for token in range(len(parents)):
        for ancestor in lineage(parents, token):
            subtree_end[ancestor] = max(subtree_end[ancestor], token + 1)
    return position, subtree_end
