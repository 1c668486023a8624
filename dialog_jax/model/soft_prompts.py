"""The array of a soft prompt before training: the model's embedding in, [P, D] out.

The model reads it as the parameter `soft_prompt` (see `decoder.embed`); training updates it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Key

from dialog_jax.errors import UserError
from dialog_jax.model.soft_prompt_config import SoftPromptConfig


def init_soft_prompt(
    config: SoftPromptConfig, embedding: Float[Array, "V D"], text_tokens: Sequence[int], key: Key[Array, ""]
) -> Float32[Array, "P D"]:
    """Returns the soft prompt before training, whole on every device of the embedding.

    With init = text and the tokens 7 8 of the text, five virtual tokens have the embeddings of 7 8 7 8 7.

    Args:
      embedding: of the model.
      text_tokens: of `config.text`, as the tokenizer by itself encodes it; read with init = text.

    Raises:
      UserError: the text has no tokens.

    Source: Lester et al. 2021 (arXiv 2104.08691), section 3.2; `PromptEmbedding` of PEFT 0.21.
    """
    if config.init == "text" and not text_tokens:
        raise UserError(f"soft_prompt.text is {config.text!r}, which the tokenizer gives no token. Write a prompt.")
    rows, width = embedding.shape

    def make(embedding):
        if config.init == "random":
            normal = jax.random.normal(key, (config.tokens, width), jnp.float32)
            return normal * jnp.std(embedding, dtype=jnp.float32)
        if config.init == "text":
            tokens = jnp.resize(jnp.asarray(text_tokens, jnp.int32), (config.tokens,))
        else:
            tokens = jax.random.randint(key, (config.tokens,), 0, rows)
        return embedding[tokens].astype(jnp.float32)

    sharding = embedding.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(make, out_shardings=sharding)(embedding)
