"""Lowers programs for devices that are not there."""

import contextlib

import jax

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


def shapes(*, length, heads, kv_heads, head_dim, dtype):
    """Of q, k, v and subtree_end of one row."""
    sizes = (heads, kv_heads, kv_heads)
    arrays = [jax.ShapeDtypeStruct((1, length, size, head_dim), dtype) for size in sizes]
    return *arrays, jax.ShapeDtypeStruct((1, length), jax.numpy.int32)


def with_gradients(attend):
    """A function that computes the sum of the attention output and its gradients for q, k and v."""

    def function(q, k, v, subtree_end):
        def total(q, k, v):
            return jax.numpy.sum(attend(q, k, v, Mask(subtree_end)).astype(jax.numpy.float32))

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    return function
