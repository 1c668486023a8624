"""Attention over lineages in NumPy float64, and its gradients by hand: what every path is compared with."""

import jax.numpy as jnp
import numpy as np

from dialog_jax.attention.mask import Mask
from tests.model import forests


def visible(parents, window=None):
    """[T, T], true where the second token is the first or one of its `window` - 1 nearest ancestors: by walking."""
    seen = np.zeros((len(parents), len(parents)), bool)
    for token in range(len(parents)):
        seen[token, forests.lineage(parents, token)[-window if window else 0 :]] = True
    return seen


def attention(q, k, v, rows, d_output, *, window=None, cap=None, sinks=None):
    """(output, dq, dk, dv), the gradients of sum(output * d_output), row by row and head by head; d_sinks if given."""
    q, k, v, d_output = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_output))
    output, dq, dk, dv = np.zeros(q.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    d_sinks = np.zeros(q.shape[2])
    scale, group = q.shape[3] ** -0.5, q.shape[2] // k.shape[2]
    for b, parents in enumerate(rows):
        seen = visible(parents, window)
        for n in range(q.shape[2]):
            shared = n // group
            score, slope = q[b, :, n] @ k[b, :, shared].T * scale, scale
            if cap is not None:
                score, slope = cap * np.tanh(score / cap), scale / np.cosh(score / cap) ** 2
            # The sink is one more key, with the value zero.
            sink = np.full((len(parents), 1), -np.inf if sinks is None else np.float64(sinks[n]))
            score = np.concatenate([np.where(seen, score, -np.inf), sink], axis=1)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            dp = np.pad(d_output[b, :, n] @ v[b, :, shared].T, ((0, 0), (0, 1)))
            ds = weight * (dp - np.sum(weight * dp, axis=1, keepdims=True))
            d_sinks[n] += ds[:, -1].sum()
            weight, ds = weight[:, :-1], ds[:, :-1] * slope
            output[b, :, n] = weight @ v[b, :, shared]
            dq[b, :, n] = ds @ k[b, :, shared]
            dk[b, :, shared] += ds.T @ q[b, :, n]
            dv[b, :, shared] += weight.T @ d_output[b, :, n]
    return (output, dq, dk, dv) if sinks is None else (output, dq, dk, dv, d_sinks)


def make_mask(rows, window=None):
    """The mask of rows of parents."""
    position, ends = (jnp.asarray(np.stack(arrays)) for arrays in zip(*map(forests.arrays, rows), strict=True))
    return Mask(ends) if window is None else Mask(ends, position, window)


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
