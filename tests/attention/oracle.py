"""Attention over lineages in NumPy float64, and its gradients by hand: what every path is compared with."""

import numpy as np

from tests.model import forests


def visible(parents):
    """[T, T], true where the second token is an ancestor of the first, or itself: found by walking."""
    seen = np.zeros((len(parents), len(parents)), bool)
    for token in range(len(parents)):
        seen[token, forests.lineage(parents, token)] = True
    return seen


def attention(q, k, v, rows, d_output):
    """(output, dq, dk, dv), the gradients of sum(output * d_output), row by row and head by head."""
    q, k, v, d_output = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_output))
    output, dq, dk, dv = np.zeros(q.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    scale, group = q.shape[3] ** -0.5, q.shape[2] // k.shape[2]
    for b, parents in enumerate(rows):
        seen = visible(parents)
        for n in range(q.shape[2]):
            shared = n // group
            score = np.where(seen, q[b, :, n] @ k[b, :, shared].T * scale, -np.inf)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            output[b, :, n] = weight @ v[b, :, shared]
            dp = d_output[b, :, n] @ v[b, :, shared].T
            ds = weight * (dp - np.sum(weight * dp, axis=1, keepdims=True)) * scale
            dq[b, :, n] = ds @ k[b, :, shared]
            dk[b, :, shared] += ds.T @ q[b, :, n]
            dv[b, :, shared] += weight.T @ d_output[b, :, n]
    return output, dq, dk, dv


def rows_of(rng, length, *, branching, padding=0):
    """Parents of two rows, trees or paths, the second of which ends in `padding` tokens that see only themselves."""
    branch = 0.2 if branching else 0.0
    full = forests.random_parents(rng, length, root=0.04, branch=branch)
    cut = forests.random_parents(rng, length - padding, root=0.04, branch=branch) + [-1] * padding
    return [full, cut]


def inputs(rng, rows, *, heads, kv_heads, head_dim, dtype=np.float32):
    """(q, k, v, subtree_end, d_output), normal."""
    length = len(rows[0])
    sizes = (heads, kv_heads, kv_heads, heads)
    q, k, v, d_output = (rng.standard_normal((len(rows), length, size, head_dim)).astype(dtype) for size in sizes)
    return q, k, v, np.stack([forests.arrays(parents)[1] for parents in rows]), d_output
