"""Lowers programs for devices that are not there."""

import contextlib

import jax
import jax.numpy as jnp

from dialog_jax.attention.mask import Mask


def lowered(function, *shapes, kind, platform):
    """The text of the program of `function` for a device of `kind`, such as "NVIDIA H200" on "cuda"."""
    # JAX 0.10.2 takes any GPU for one of compute capability 9.0; later ones ask which.
    here = contextlib.nullcontext()
    if hasattr(jax.sharding, "AbstractDevice"):
        family = "gpu" if platform == "cuda" else platform
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=family)
        here = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
    with here:
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def shapes(*, length, heads, kv_heads, head_dim, dtype, additions):
    """Of (q, k, v and, with additions, sinks) and the mask of one row; with additions, of a layer's window too."""
    sizes = (heads, kv_heads, kv_heads)
    arrays = [jax.ShapeDtypeStruct((1, length, size, head_dim), dtype) for size in sizes]
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    if not additions:
        return arrays, Mask(row)
    arrays.append(jax.ShapeDtypeStruct((heads,), jnp.float32))
    return arrays, Mask(row, row, jax.ShapeDtypeStruct((), jnp.int32))


def with_gradients(attend, additions):
    """A function that computes the sum of the attention output and its gradients; with additions, under a cap too."""

    def function(arrays, mask):
        def total(q, k, v, *sinks):
            output = attend(q, k, v, mask, *sinks, **({"cap": 30.0} if additions else {}))
            return jnp.sum(output.astype(jnp.float32))

        return jax.value_and_grad(total, argnums=range(len(arrays)))(*arrays)

    return function
