"""Attention over lineages in NumPy float64, and its gradients by hand: what every path is compared with."""

import numpy as np

from tests.model import forests


def visible(parents):
    """[T, T], true where the second token is an ancestor of the first, or itself: found by walking."""
    seen = np.zeros((len(parents), len(parents)), bool)
    for token in range(len(parents)):
        seen[token, forests.lineage(parents, token)] = True
    return seen


def attention(q, k, v, rows, d_read):
    """(what is read, and the gradients of sum(read * d_read) to q, k and v), row by row and head by head."""
    q, k, v, d_read = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_read))
    read, d_q, d_k, d_v = np.zeros(q.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    scale, group = q.shape[3] ** -0.5, q.shape[2] // k.shape[2]
    for b, parents in enumerate(rows):
        seen = visible(parents)
        for n in range(q.shape[2]):
            shared = n // group
            score = np.where(seen, q[b, :, n] @ k[b, :, shared].T * scale, -np.inf)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            read[b, :, n] = weight @ v[b, :, shared]
            d_weight = d_read[b, :, n] @ v[b, :, shared].T
            d_score = weight * (d_weight - np.sum(weight * d_weight, axis=1, keepdims=True)) * scale
            d_q[b, :, n] = d_score @ k[b, :, shared]
            d_k[b, :, shared] += d_score.T @ q[b, :, n]
            d_v[b, :, shared] += weight.T @ d_read[b, :, n]
    return read, d_q, d_k, d_v


def rows_of(rng, length, *, branching, padding=0):
    """Parents of two rows, trees or paths, the second of which ends in `padding` tokens that see only themselves."""
    branch = 0.2 if branching else 0.0
    full = forests.random_parents(rng, length, root=0.04, branch=branch)
    cut = forests.random_parents(rng, length - padding, root=0.04, branch=branch) + [-1] * padding
    return [full, cut]


def inputs(rng, rows, *, heads, kv_heads, head_dim, dtype=np.float32):
    """(q, k, v, subtree_end, d_read), normal."""
    length = len(rows[0])
    sizes = (heads, kv_heads, kv_heads, heads)
    q, k, v, d_read = (rng.standard_normal((len(rows), length, size, head_dim)).astype(dtype) for size in sizes)
    return q, k, v, np.stack([forests.arrays(parents)[1] for parents in rows]), d_read
