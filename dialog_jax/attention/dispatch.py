"""Which way to attend on the devices at hand: the fastest that computes the right thing there.

In: the mesh, the shape and type of queries and keys, and whether trees branch. Out: a function of q, k, v and
`subtree_end`, to be called under `jax.jit` on arrays laid out over the mesh; its name, and why it was chosen.

A kernel is trusted on a device once it has been tried there: on a small random forest, with the heads, the type and the
blocks that it is to be used with, what it reads and its three gradients must equal those of NumPy in float64 to
rounding. One that does not, or does not compile, is passed over, and the reason says so. Blockwise attention is the
last, and always there. On CPUs it is the only one, and nothing is tried.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from dialog_jax.attention import blockwise

Attend = Callable[[Array, Array, Array, Array], Array]

_TENSOR = "tensor"
# Three of splash's largest blocks, the last of them not full: longer rows have no larger ones, and with three there is
# one that nobody two blocks later sees, to be skipped.
_PROBE_LENGTH = 1100

# Of the norm of what is right. Rounding gives a third of these; a wrong mask, scale or type of product far more.
_TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}

# What a kernel that is not for this device or this version of JAX ends in: XLA's compiler and runtime raise
# JaxRuntimeError, a RuntimeError; JAX and Pallas the others, when they trace or lower it. ImportError: experimental
# modules come and go.
_NOT_HERE = (RuntimeError, NotImplementedError, ValueError, TypeError, ImportError)


class Kernel(NamedTuple):
    """A way to attend, and one line that says why."""

    name: str
    attend: Attend
    reason: str


class _Candidate(NamedTuple):
    """A kernel, imported when it is to be tried: no other device needs its part of JAX."""

    name: str
    platform: str
    branching: bool
    """Whether it can do trees that are not paths."""
    load: Callable[[], Attend]


def _load_pallas_gpu() -> Attend:
    from dialog_jax.attention import pallas_gpu

    return pallas_gpu.attend


def _load_splash() -> Attend:
    from dialog_jax.attention import splash

    return splash.attend


# For each platform, the first that works is taken.
_CANDIDATES = (
    _Candidate("pallas_gpu", "gpu", True, _load_pallas_gpu),
    _Candidate("splash", "tpu", False, _load_splash),
)


def select_kernel(
    mesh: Mesh, *, heads: int, kv_heads: int, head_dim: int, length: int, dtype: jax.typing.DTypeLike, branching: bool
) -> Kernel:
    """Returns how to attend in rows that are divided over the devices of `mesh`.

    Each process tries kernels on one of its own devices: alike devices and versions come to the same choice.

    Args:
      length: tokens of a row.
      dtype: of queries, keys and values.
      branching: whether some tree of some row may branch; if not, all of them are paths.
    """
    platform = mesh.devices.flat[0].platform
    passed = []
    for candidate in _CANDIDATES:
        if candidate.platform != platform:
            continue
        if branching and not candidate.branching:
            passed.append(f"{candidate.name} is for rows whose trees are all paths")
            continue
        attend, wrong = _tried(candidate, mesh, heads, kv_heads, head_dim, min(length, _PROBE_LENGTH), dtype, branching)
        if attend is not None:
            said = f"equal to float64 on {mesh.local_devices[0].device_kind} to {wrong}"
            return Kernel(candidate.name, sharded(attend, mesh), "; ".join([said, *passed]))
        passed.append(f"{candidate.name}: {wrong}")
    reason = "; ".join(passed) if passed else f"there is no kernel for {platform}"
    return Kernel("blockwise", sharded(blockwise.attend, mesh), reason)


def sharded(attend: Attend, mesh: Mesh) -> Attend:
    """Returns `attend` for arrays over all devices of `mesh`: each attends in its own rows, with its own heads.

    Rows are divided over all axes but `tensor`; heads over `tensor` if both kinds are divisible by it, and otherwise
    each of its devices computes all of them.
    """
    if mesh.size == 1:
        return attend
    row_axes = tuple(axis for axis in mesh.axis_names if axis != _TENSOR)

    def over_devices(q, k, v, subtree_end):
        divided = _divided(mesh, q.shape[2], k.shape[2])
        heads = PartitionSpec(row_axes, None, _TENSOR if divided > 1 else None, None)
        # Pallas does not say over which axes what it returns varies, so that cannot be checked.
        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(heads, heads, heads, PartitionSpec(row_axes, None)),
            out_specs=heads,
            check_vma=False,
        )(q, k, v, subtree_end)

    return over_devices


def _divided(mesh: Mesh, heads: int, kv_heads: int) -> int:
    """Over how many devices the heads of a row are divided."""
    size = mesh.shape.get(_TENSOR, 1)
    return 1 if heads % size or kv_heads % size else size


def _tried(
    candidate: _Candidate, mesh: Mesh, heads: int, kv_heads: int, head_dim: int, length: int, dtype, branching: bool
) -> tuple[Attend | None, str]:
    """(the candidate, its largest error) if it is right on a device of the mesh, otherwise (None, what is wrong)."""
    divided = _divided(mesh, heads, kv_heads)
    shape = (length, heads // divided, kv_heads // divided, head_dim)
    try:
        attend = candidate.load()
        errors = probe(attend, mesh.local_devices[0], *shape, dtype, branching)
    except _NOT_HERE as error:
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    largest = max(errors.values(), key=lambda error: np.inf if np.isnan(error) else error)
    tolerance = _TOLERANCE[jnp.dtype(dtype).name]
    if not largest <= tolerance:  # NaN is not
        return None, "off by " + ", ".join(f"{error:.1e} ({name})" for name, error in errors.items())
    return attend, f"{largest:.1e}"


def probe(
    attend: Attend,
    device: jax.Device,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    branching: bool,
) -> dict[str, float]:
    """Returns how far `attend` is off in a random row, for what is read and the gradients to queries, keys and values.

    That is the norm of the difference from NumPy's float64 over the norm of the latter; NaN where something is.
    """
    rng = np.random.default_rng(0)
    subtree_end = _random_forest(rng, length, branching)[None]
    sizes = (heads, kv_heads, kv_heads, heads)
    drawn = [rng.standard_normal((1, length, size, head_dim)).astype(jnp.dtype(dtype)) for size in sizes]

    @jax.jit
    def run(q, k, v, subtree_end, d_read):
        read, pull = jax.vjp(lambda q, k, v: attend(q, k, v, subtree_end), q, k, v)
        return read, *pull(d_read)

    got = jax.device_get(run(*jax.device_put((*drawn[:3], subtree_end, drawn[3]), device)))
    needed = reference(drawn[0], drawn[1], drawn[2], subtree_end, drawn[3])
    names = ("read", "to queries", "to keys", "to values")
    return {
        name: float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
        for name, a, b in zip(names, got, needed, strict=True)
    }


def _random_forest(rng: np.random.Generator, length: int, branching: bool) -> np.ndarray:
    """`subtree_end` [T] of trees of some 60 tokens; if they branch, one token in twenty does."""
    parent = np.full(length, -1)
    path: list[int] = []
    for token in range(length):
        draw = rng.random()
        if draw < 1 / 60:
            path = []
        elif branching and draw < 1 / 15 and path:
            path = path[: rng.integers(1, len(path) + 1)]
        parent[token] = path[-1] if path else -1
        path.append(token)
    subtree_end = np.arange(1, length + 1, dtype=np.int32)
    for token in reversed(range(length)):
        if parent[token] >= 0:
            subtree_end[parent[token]] = max(subtree_end[parent[token]], subtree_end[token])
    return subtree_end


def reference(q, k, v, subtree_end, d_read) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns what is read and the gradients of sum(read * d_read) to `q`, `k` and `v`, by NumPy in float64."""
    q, k, v, d_read = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_read))
    token = np.arange(q.shape[1])
    seen = (token[None] <= token[:, None]) & (token[:, None] < np.asarray(subtree_end)[:, None, :])  # [B, T, T]
    read, d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale, group = q.shape[3] ** -0.5, q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            queries, keys, values, out = q[b, :, n], k[b, :, n // group], v[b, :, n // group], d_read[b, :, n]
            score = np.where(seen[b], queries @ keys.T * scale, -np.inf)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            read[b, :, n] = weight @ values
            d_score = weight * (out @ values.T - np.sum(out * read[b, :, n], axis=1, keepdims=True)) * scale
            d_q[b, :, n] = d_score @ keys
            d_k[b, :, n // group] += d_score.T @ queries
            d_v[b, :, n // group] += weight.T @ out
    return read, d_q, d_k, d_v
