"""Selects the attention kernel for the devices of a mesh.

In: the mesh, the shape and type of queries and keys, whether trees branch, what the model adds to attention, and the
name of a kernel or "auto". Out: a `Kernel`, a function of q, k, v and a `Mask` to be called under `jax.jit` on arrays
laid out over the mesh.

A kernel other than blockwise attention is used only after a probe on one device (`attention.probing`): on a small
random forest, with the run's heads, type and blocks, and with what the model adds, its output and its gradients must
equal NumPy's in float64 to rounding. A kernel that the device, the version of JAX or the shape does not support is
passed over under "auto", and the reason says so. Everything else that goes wrong is an error, never a slower path.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from dialog_jax.attention import blockwise, probing
from dialog_jax.attention.mask import Mask
from dialog_jax.errors import UserError

Attend = Callable[
    ..., Array
]  # of q, k, v and a mask; and of `sinks` and `cap`, as blockwise.attend, where a model has them

_TENSOR = "tensor"
# Three of splash's largest blocks, the last one partly filled: longer rows have no larger blocks, and queries of the
# third block can skip the first.
_PROBE_LENGTH = 1100

# Relative to the norm of the exact result. Rounding gives a third of these; a wrong mask, scale or type far more.
_TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}

# Messages of JAX and XLA, in exceptions of general classes, for a kernel that a device cannot run: this jaxlib has no
# Pallas for the device; Triton does not support so old a device; the blocks exceed the shared memory of a GPU or the
# vector memory of a TPU.
_UNSUPPORTED_MESSAGES = (
    "Cannot lower pallas_call on platform",
    "UNIMPLEMENTED",
    "Triton support is only enabled for",
    "Shared memory size limit exceeded",
    "in memory space vmem",
)


class Kernel(NamedTuple):
    """An attention kernel, and one line that says why it was selected."""

    name: str
    attend: Attend
    reason: str
    branching: bool
    """Whether it supports trees that are not paths."""


class _Candidate(NamedTuple):
    """A kernel for one platform, imported when it is tried: other platforms may lack its part of JAX."""

    name: str
    platform: str
    branching: bool
    """Whether it supports trees that are not paths."""
    load: Callable[[], Attend]
    windowed_length: int | None = None
    """Tokens of the longest rows for which it has windows; None for any."""


class _UnsupportedError(Exception):
    """The devices, this version of JAX or the shape do not support a kernel; the message says which and why."""


def _load_pallas_gpu() -> Attend:
    from dialog_jax.attention import pallas_gpu

    return pallas_gpu.attend


def _load_splash() -> Attend:
    from dialog_jax.attention import splash

    return splash.attend


# Under "auto", the first that the devices support is selected.
_CANDIDATES = (
    _Candidate("pallas", "gpu", True, _load_pallas_gpu),
    _Candidate("splash", "tpu", False, _load_splash, windowed_length=2**16),
)


def select_kernel(
    mesh: Mesh,
    *,
    heads: int,
    sizes: Collection[tuple[int, int]],
    length: int,
    dtype: jax.typing.DTypeLike,
    branching: bool,
    shares_root: bool = False,
    additions: Collection[str] = (),
    name: str = "auto",
) -> Kernel:
    """Returns the kernel for rows that are divided over the devices of `mesh`.

    Each process probes kernels on one of its own devices: equal devices and versions select the same kernel.

    Args:
      sizes: key/value heads and head dimension of each kind of attention in the model; a kernel must support all.
      length: tokens per row.
      dtype: of queries, keys and values.
      branching: whether a tree of some row may branch; if not, all trees are paths.
      shares_root: whether the trees of a row are to share a root, and so become one tree that branches, if the kernel
        supports that (`Kernel.branching`). With a kernel for paths each tree has the root for itself.
      additions: what the model adds to attention, of "windows", "caps" and "sinks" (see `blockwise.attend`).
      name: "auto" for the fastest that the devices support, "blockwise", "pallas" or "splash".

    Raises:
      UserError: the kernel named `name` is not supported here, or a kernel does not compute attention here.
    """
    blockwise_attend = shard_attention(blockwise.attend, mesh)
    if name == "blockwise":
        return Kernel(name, blockwise_attend, "as configured", branching=True)
    device = mesh.local_devices[0]
    shapes = [
        (min(length, _PROBE_LENGTH), heads // divisor, kv_heads // divisor, head_dim)
        for kv_heads, head_dim in sizes
        for divisor in [_head_divisor(mesh, heads, kv_heads)]
    ]
    candidates = [c for c in _CANDIDATES if name == c.name or (name == "auto" and c.platform == device.platform)]
    assert candidates or name == "auto", f"no kernel is named {name}"
    reasons = []
    for candidate in candidates:
        try:
            if "windows" in additions and length > (candidate.windowed_length or length):
                raise _UnsupportedError(
                    f"{candidate.name} has windows for rows of up to {candidate.windowed_length} tokens, not {length}"
                )
            branches = branching or (shares_root and candidate.branching)
            probed = [_try(candidate, device, shape, dtype, branches, additions) for shape in shapes]
        except (_UnsupportedError, jax.errors.JaxRuntimeError) as failure:
            if name != "auto":
                raise UserError(
                    f"attention={name} does not work here: {_first_line(failure)}. Set attention=auto or "
                    "attention=blockwise."
                ) from failure
            if not isinstance(failure, _UnsupportedError):
                raise
            reasons.append(str(failure))
            continue
        attend = probed[0][0]
        reasons.insert(0, f"equal to float64 on {device.device_kind} to {max(error for _, error in probed):.1e}")
        return Kernel(candidate.name, shard_attention(attend, mesh), "; ".join(reasons), candidate.branching)
    reasons = reasons or [f"there is no other kernel for {device.platform}"]
    return Kernel("blockwise", blockwise_attend, "; ".join(reasons), branching=True)


def shard_attention(attend: Attend, mesh: Mesh) -> Attend:
    """Returns `attend` for arrays over all devices of `mesh`: each device computes its own rows and heads.

    Rows are divided over all axes but `tensor`; heads over `tensor` if both kinds are divisible by it, and otherwise
    each of its devices computes all of them.
    """
    if mesh.size == 1:
        return attend
    row_axes = tuple(axis for axis in mesh.axis_names if axis != _TENSOR)

    def over_devices(q, k, v, mask, sinks=None, **settings):
        tensor = _TENSOR if _head_divisor(mesh, q.shape[2], k.shape[2]) > 1 else None
        heads, rows = PartitionSpec(row_axes, None, tensor, None), PartitionSpec(row_axes, None)
        mask = mask if mask.window is None else mask._replace(window=jnp.asarray(mask.window, jnp.int32))
        specs = {"subtree_end": rows, "position": rows, "window": PartitionSpec()}
        given = {name: array for name, array in mask._asdict().items() if array is not None}
        arguments, in_specs = [q, k, v, given], [heads, heads, heads, {name: specs[name] for name in given}]
        if sinks is not None:
            arguments, in_specs = [*arguments, sinks], [*in_specs, PartitionSpec(tensor)]
        # Pallas does not declare over which axes its outputs vary, so that cannot be checked.
        return jax.shard_map(
            lambda q, k, v, mask, *sinks: attend(q, k, v, Mask(**mask), *sinks, **settings),
            mesh=mesh,
            in_specs=tuple(in_specs),
            out_specs=heads,
            check_vma=False,
        )(*arguments)

    return over_devices


def _head_divisor(mesh: Mesh, heads: int, kv_heads: int) -> int:
    """Returns the number of devices over which the heads of a row are divided."""
    size = mesh.shape.get(_TENSOR, 1)
    return 1 if heads % size or kv_heads % size else size


def _try(
    candidate: _Candidate,
    device: jax.Device,
    shape: tuple[int, int, int, int],
    dtype,
    branching: bool,
    additions: Collection[str],
) -> tuple[Attend, float]:
    """Returns (the candidate's function, its largest error in the probe).

    Raises:
      _UnsupportedError: the candidate cannot run on the device, or not with this shape, type or kind of trees.
      UserError: it runs and computes wrong numbers.
    """
    if candidate.platform != device.platform:
        raise _UnsupportedError(f"{candidate.name} is a kernel for {candidate.platform}, this is {device.platform}")
    if branching and not candidate.branching:
        raise _UnsupportedError(f"{candidate.name} is for rows whose trees are all paths")
    try:
        attend = candidate.load()
        errors = probing.probe(attend, device, *shape, dtype, branching, additions=additions)
    except (ImportError, NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        if not _means_unsupported(error):
            error.add_note(
                f"Raised while probing the attention kernel {candidate.name}; attention=blockwise avoids it."
            )
            raise
        raise _UnsupportedError(f"{candidate.name}: {type(error).__name__}: {_first_line(error)}") from error
    largest = max(errors.values(), key=lambda error: np.inf if np.isnan(error) else error)
    if not largest <= _TOLERANCE[jnp.dtype(dtype).name]:  # also true for NaN
        raise UserError(
            f"attention kernel {candidate.name} computes wrong numbers on {device.device_kind}: off by "
            + ", ".join(f"{error:.1e} ({name})" for name, error in errors.items())
            + ". Set attention=blockwise, and report this with the versions of JAX and of the driver."
        )
    return attend, largest


def _means_unsupported(error: Exception) -> bool:
    """Returns whether an exception says that the device, the version of JAX, the shape or the type is not supported."""
    if isinstance(error, NotImplementedError):
        return True
    if isinstance(error, ImportError):  # of a part of JAX that this version does not have, not of our own modules
        return (error.name or "").partition(".")[0] in ("jax", "jaxlib")
    return any(message in str(error) for message in _UNSUPPORTED_MESSAGES)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
