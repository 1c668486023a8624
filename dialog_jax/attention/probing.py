"""The errors of an attention kernel on a small random forest, against NumPy in float64.

In: a kernel, a device, the shape and type of its queries and keys, and what the model adds. Out: the relative errors of
its output and of its gradients. Knows neither meshes nor which error is too large.
"""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dialog_jax.attention.mask import Mask


def probe(
    attend: Callable[..., Array],
    device: jax.Device,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    branching: bool,
    additions: Collection[str] = (),
) -> dict[str, float]:
    """Returns the errors of `attend` on a random row: of its output and of its gradients dq, dk and dv, and d_sinks.

    An error is the norm of the difference from NumPy's float64 over the norm of the latter; NaN if there is a NaN.
    """
    rng = np.random.default_rng(0)
    # With a window, trees that are longer than it and than several blocks: some are skipped for the window alone.
    position, subtree_end = _random_forest(rng, length, 600 if "windows" in additions else 60, branching)
    mask = Mask(jnp.asarray(subtree_end[None]))
    if "windows" in additions:
        mask = mask._replace(position=jnp.asarray(position[None]), window=jnp.int32(min(150, length // 3)))
    sizes = (heads, kv_heads, kv_heads, heads)
    q, k, v, d_output = (rng.standard_normal((1, length, size, head_dim)).astype(jnp.dtype(dtype)) for size in sizes)
    sinks = rng.standard_normal(heads).astype(np.float32) if "sinks" in additions else None
    cap = 1.5 if "caps" in additions else None
    settings = {} if cap is None else {"cap": cap}

    @jax.jit
    def run(q, k, v, sinks, mask, d_output):
        given = (q, k, v) if sinks is None else (q, k, v, sinks)
        output, vjp = jax.vjp(lambda q, k, v, *sinks: attend(q, k, v, mask, *sinks, **settings), *given)
        return output, *vjp(d_output)

    arrays = q, k, v, sinks, mask, d_output
    results = jax.device_get(run(*jax.device_put(arrays, device)))
    exact = reference(*arrays, cap)
    return {
        name: float(np.linalg.norm(np.asarray(result, np.float64) - exact[name]) / np.linalg.norm(exact[name]))
        for name, result in zip(exact, results, strict=True)
    }


def _random_forest(
    rng: np.random.Generator, length: int, tree_length: int, branching: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (`position`, `subtree_end`) of trees of about `tree_length` tokens, [T] each.

    If `branching`, one token in twenty starts a branch.
    """
    parent = np.full(length, -1)
    position = np.zeros(length, np.int32)
    path: list[int] = []
    for token in range(length):
        draw = rng.random()
        if draw < 1 / tree_length:
            path = []
        elif branching and draw < 1 / tree_length + 1 / 20 and path:
            path = path[: rng.integers(1, len(path) + 1)]
        parent[token] = path[-1] if path else -1
        position[token] = len(path)
        path.append(token)
    subtree_end = np.arange(1, length + 1, dtype=np.int32)
    for token in reversed(range(length)):
        if parent[token] >= 0:
            subtree_end[parent[token]] = max(subtree_end[parent[token]], subtree_end[token])
    return position, subtree_end


def reference(q, k, v, sinks, mask: Mask, d_output, cap: float | None = None) -> dict[str, np.ndarray]:
    """Returns the attention output and the gradients of sum(output * d_output), by NumPy in float64."""
    q, k, v, d_output = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_output))
    token = np.arange(q.shape[1])
    visible = (token[None] <= token[:, None]) & (token[:, None] < np.asarray(mask.subtree_end)[:, None, :])  # [B, T, T]
    if mask.window is not None:
        position = np.asarray(mask.position)
        visible &= position[:, :, None] - position[:, None, :] < mask.window
    output, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    d_sinks = np.zeros(q.shape[2])
    scale, group = q.shape[3] ** -0.5, q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            queries, keys, values, do = q[b, :, n], k[b, :, n // group], v[b, :, n // group], d_output[b, :, n]
            s = queries @ keys.T * scale
            slope = scale
            if cap is not None:
                s = cap * np.tanh(s / cap)
                slope = scale * (1 - (s / cap) ** 2)
            p = np.where(visible[b], np.exp(s), 0)  # scores of normal arrays: no overflow in float64
            sink = 0.0 if sinks is None else np.exp(np.float64(sinks[n]))
            total = p.sum(axis=1, keepdims=True) + sink
            p /= total
            output[b, :, n] = p @ values
            delta = np.sum(do * output[b, :, n], axis=1, keepdims=True)
            ds = p * (do @ values.T - delta) * slope
            dq[b, :, n] = ds @ keys
            dk[b, :, n // group] += ds.T @ queries
            dv[b, :, n // group] += p.T @ do
            d_sinks[n] -= np.sum(sink / total * delta)
    gradients = {"output": output, "dq": dq, "dk": dk, "dv": dv}
    return gradients if sinks is None else gradients | {"d_sinks": d_sinks}
