"""Rotary positions and attention over a row that is a forest of dialogues.

In: queries, keys and values of a row, and one int32 per token, `subtree_end`, that says which later tokens see it.
Out: what each query reads. Knows nothing of roles, turns or where a dialogue starts: the ancestor mask says it all.

    key j is visible to query i   iff   j <= i < subtree_end[j]

A row of two dialogues, the first of which branches after its first two tokens (0 1 -> 2 3 and 0 1 -> 4):

    token        0  1  2  3  4 | 5  6          query 3 sees 0 1 2 3
    subtree_end  5  5  4  4  5 | 7  7          query 4 sees 0 1 4
                                               query 6 sees 5 6
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

_SMALLEST_BLOCK = 256
_MOST_BLOCKS = 16

# A block's sums are kept for the backward pass, its probabilities are not: those are one product and one exp away.
_KEPT = jax.checkpoint_policies.save_only_these_names("softmax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """How Llama 3.1 stretches RoPE: slow rotations by `factor`, fast ones not, those between by a mixture.

    Source: the Llama 3.1 reference implementation, as in Hugging Face transformers' `rope_type: llama3`.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_length: int

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_frequency_factor < self.high_frequency_factor):
            raise ValueError(
                f"rope scaling needs factor >= 1 and 0 < low_frequency_factor < high_frequency_factor, got {self}"
            )
        if self.original_max_length < 1:
            raise ValueError(f"rope scaling needs original_max_length >= 1, got {self.original_max_length}")


def rotary_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> np.ndarray:
    """Radians a position, one for each of the `head_dim / 2` rotated pairs, fastest first."""
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        rotations = scaling.original_max_length * frequency / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (kept + (1.0 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def rotation(
    position: Int[Array, "B T"], frequency: Float[np.ndarray, "P"]
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Cosine and sine, float32, of every token's angles."""
    angle = position.astype(jnp.float32)[:, :, None] * jnp.asarray(frequency)[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], cosine: Float[Array, "B T P"], sine: Float[Array, "B T P"]
) -> Float[Array, "B T N H"]:
    """`x` turned by its position. Component i is paired with component i + H/2, as in Hugging Face's checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    subtree_end: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """What each query reads of its ancestors and itself, softmax in float32.

    Queries go in blocks, each against the keys up to its own end, so nothing of size [T, T] is kept: not in the forward
    pass, and not for the backward pass, which computes a block's probabilities again.

    Args:
      subtree_end: one more than the last token that sees this one; of padding, its own index + 1.
    """
    length = q.shape[1]
    block = max(_SMALLEST_BLOCK, -(-length // _MOST_BLOCKS))
    read = []
    for start in range(0, length, block):
        stop = min(start + block, length)

        # Bound as a default: the checkpointed function is traced again in the backward pass.
        @functools.partial(jax.checkpoint, policy=_KEPT)
        def attend(q, k, v, subtree_end, start=start, stop=stop):
            query, key = jnp.arange(start, stop)[None, :, None], jnp.arange(stop)[None, None, :]
            return read_visible(q, k, v, (key <= query) & (query < subtree_end[:, None, :]))

        read.append(attend(q[:, start:stop], k[:, :stop], v[:, :stop], subtree_end[:, :stop]))
    return jnp.concatenate(read, axis=1)


def read_visible(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "#B Q S"],
) -> Float[Array, "B Q N H"]:
    """Softmax attention where `visible`; N / K query heads share each key/value head. Every query must see some key."""
    batch, queries, heads, head_dim = q.shape
    kv_heads, keys = k.shape[2:0:-1]
    group = heads // kv_heads
    # One matrix product a key/value head, and the division after the second: on CPU twice as fast as einsums with the
    # group as an axis of its own around jax.nn.softmax.
    rows = (q * head_dim**-0.5).reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * queries, head_dim)  # [B, K, G Q, H]
    score = jnp.matmul(rows, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    score = score.reshape(batch, kv_heads, group, queries, keys)
    score = score + jnp.where(visible, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
    peak = checkpoint_name(jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True)), "softmax")
    weight = jnp.exp(score - peak)
    total = checkpoint_name(jnp.sum(weight, axis=-1, keepdims=True), "softmax")  # [B, K, G, Q, 1]
    weight = weight.astype(v.dtype).reshape(batch, kv_heads, group * queries, keys)
    read = jnp.matmul(weight, v.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    read = checkpoint_name(read, "softmax").reshape(batch, kv_heads, group, queries, head_dim) / total
    return read.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
