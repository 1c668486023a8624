"""Products of rows in groups, each group with a matrix of its own.

On TPU and GPU it is `jax.lax.ragged_dot`. XLA:CPU computes that as a product of all rows with every matrix, so there a
loop visits blocks of the rows of each group, at the cost of one product of all rows and half a block for each group.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCKS = "expert_blocks"  # name of the loops over blocks of a group in compiled programs
_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 256


def find_block(rows: int, groups: int) -> int:
    """Returns the number of rows in a block: about a quarter of a group of average size."""
    size = _SMALLEST_BLOCK
    while size < _LARGEST_BLOCK and 4 * size * groups < rows:
        size *= 2
    return size


def multiply(x: Float[Array, "M K"], matrices: Float[Array, "E K N"], sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """Returns the product of each row with the matrix of its group.

    The first `sizes[0]` rows are group 0, and so on. What the rows beyond the last group hold is unspecified.
    """
    return jax.lax.platform_dependent(x, matrices, sizes, cpu=_multiply_blocks, default=jax.lax.ragged_dot)


@jax.custom_vjp
def _multiply_blocks(x, matrices, sizes):
    return _run(x, matrices, sizes, contracted=0)


def _forward(x, matrices, sizes):
    return _run(x, matrices, sizes, contracted=0), (x, matrices, sizes)


def _backward(residuals, dy):
    x, matrices, sizes = residuals
    return _run(dy, matrices, sizes, contracted=1), _sum_outer_products(x, dy, sizes).astype(matrices.dtype), None


_multiply_blocks.defvjp(_forward, _backward)


def _run(x: Array, matrices: Array, sizes: Array, *, contracted: int) -> Array:
    """Returns x @ matrices[group of the row], with axis `contracted` of the matrix contracted."""
    rows, groups = x.shape[0], matrices.shape[0]
    block = find_block(rows, groups)
    padded = jnp.pad(x, ((0, block), (0, 0)))
    starts = jnp.cumsum(sizes) - sizes

    def run_group(group, output):
        matrix = matrices[group]

        # A block may reach into the next group, which then overwrites its rows.
        def run_block(index, output):
            corner = (starts[group] + index * block, 0)
            part = jax.lax.dynamic_slice(padded, corner, (block, x.shape[1]))
            product = jax.lax.dot_general(part, matrix, (((1,), (contracted,)), ((), ())))
            return jax.lax.dynamic_update_slice(output, product, corner)

        with jax.named_scope(BLOCKS):
            return jax.lax.fori_loop(0, _count_blocks(sizes[group], block), run_block, output)

    output = jnp.zeros((rows + block, matrices.shape[2 - contracted]), x.dtype)
    return jax.lax.fori_loop(0, groups, run_group, output)[:rows]


def _sum_outer_products(x: Float[Array, "M K"], dy: Float[Array, "M N"], sizes: Array) -> Float[Array, "E K N"]:
    """Returns the gradient of each group's matrix."""
    rows, groups = x.shape[0], sizes.shape[0]
    block = find_block(rows, groups)
    x, dy = (jnp.pad(array, ((0, block), (0, 0))) for array in (x, dy))
    starts = jnp.cumsum(sizes) - sizes

    def run_group(group, gradients):
        def run_block(index, gradient):
            corner = (starts[group] + index * block, 0)
            rows_left = sizes[group] - index * block
            part = jax.lax.dynamic_slice(x, corner, (block, x.shape[1]))
            part = jnp.where(jnp.arange(block)[:, None] < rows_left, part, 0)
            other = jax.lax.dynamic_slice(dy, corner, (block, dy.shape[1]))
            product = jax.lax.dot_general(part, other, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            return gradient + product

        with jax.named_scope(BLOCKS):
            blocks = _count_blocks(sizes[group], block)
            gradient = jax.lax.fori_loop(0, blocks, run_block, jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32))
        return jax.lax.dynamic_update_slice(gradients, gradient[None].astype(gradients.dtype), (group, 0, 0))

    gradients = jnp.zeros((groups, x.shape[1], dy.shape[1]), x.dtype)
    return jax.lax.fori_loop(0, groups, run_group, gradients)


def _count_blocks(size: Array, block: int) -> Array:
    return (size + block - 1) // block
