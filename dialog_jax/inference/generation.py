"""Generation, one token at a time, with a key/value cache that a chat keeps between its turns.

In: parameters and the tokens of a prompt. Out: token ids, each as soon as it is sampled. Knows no text and no roles.
"""

import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dialog_jax.errors import UserError
from dialog_jax.model import decoder, decoding
from dialog_jax.model.decoder_config import DecoderConfig

# Prompts are processed in chunks of these lengths, the last one padded: one compilation each for prompts of any length.
_CHUNKS = (8, 32, 128, 512)
_SMALLEST_CAPACITY = 512


class Session:
    """The cache of one history and the tokens it holds. Pass the same session for every turn of a chat.

    A prompt reuses the cache of the longest prefix that it shares with the tokens before it, and computes the rest. A
    prompt that extends the last one costs only its new tokens; one that goes back (a regenerated reply, `/reset`) is
    correct too. If it goes back so far that layers with windows no longer have what precedes it (by 130 to 512 tokens,
    the padding of the last call included), all of it is computed.
    """

    def __init__(self, config: DecoderConfig, parameters: dict, *, compute_dtype: jax.typing.DTypeLike = jnp.float32):
        self.config = config
        self.parameters = parameters
        self.tokens: list[int] = []  # the tokens in the first len(tokens) slots of the cache
        self._capacity = _SMALLEST_CAPACITY
        self._cache = decoding.empty_cache(config, 1, self._capacity, _CHUNKS[-1], compute_dtype)
        self._written = 0  # slots that hold a token or padding, or did before the prompt went back

    def read(self, tokens: Sequence[int]) -> Float[Array, "V"]:
        """Returns the logits, float32, of the token that follows `tokens`; computes only what is not in the cache.

        Raises:
          UserError: there are no tokens, one is outside the vocabulary, or they exceed the model's context.
        """
        _check_prompt(self.config, self.parameters, tokens)
        # At least the last token is recomputed: the cache holds its keys and values, not its logits.
        start = min(_common_prefix(self.tokens, tokens), len(tokens) - 1)
        if not decoding.keeps_context(self.config, self._cache, start, self._written):
            start = 0
        if start == 0:
            self._written = 0
        del self.tokens[start:]
        while True:
            remaining = tokens[start:]
            sizes = (1,) if len(remaining) == 1 else _CHUNKS
            length = next((size for size in sizes if size >= len(remaining)), sizes[-1])
            chunk = remaining[:length]
            self._reserve(start + length)
            self._written = max(self._written, start + length)
            padded = np.zeros((1, length), np.int32)
            padded[0, : len(chunk)] = chunk
            logits, self._cache = _extend(
                self.config, self.parameters, self._cache, padded, np.int32(start), np.int32(len(chunk) - 1)
            )
            self.tokens.extend(chunk)
            start += len(chunk)
            if start == len(tokens):
                return logits

    def _reserve(self, needed: int) -> None:
        if needed > self._capacity:
            while self._capacity < needed:
                self._capacity *= 2
            self._cache = decoding.grow_cache(self.config, self._cache, self._capacity, _CHUNKS[-1])


def generate(
    config: DecoderConfig,
    parameters: dict,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    session: Session | None = None,
) -> Iterator[int]:
    """Yields the ids that follow `tokens`: `max_new_tokens` of them, or up to and including the first stop token.

    Args:
      tokens: the prompt, at least one token, from the start of the history. Tokens in `session` are not recomputed.
      temperature: 0 selects the likeliest token; above 0, tokens are sampled from softmax(logits / temperature).
      top_p: in (0, 1]; samples from the fewest likeliest tokens whose probabilities add up to at least this.
      session: keeps the cache for the next turn; must have the same config and parameters. None starts a new one.

    Raises:
      UserError: an argument is out of range, or prompt and new tokens exceed the model's context. Raised by the call
        itself, before the first token is requested.
    """
    tokens = [int(token) for token in tokens]
    _check_prompt(config, parameters, tokens)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}; it must be at least 0 (0 selects the likeliest token)")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if len(tokens) + max_new_tokens > config.context:
        raise UserError(
            f"prompt of {len(tokens)} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{config.context} tokens; shorten the history or ask for fewer new tokens"
        )
    if session is None:
        session = Session(config, parameters)
    elif session.config != config or session.parameters is not parameters:
        raise UserError("the session belongs to another config or other parameters; create a new one")
    return _generate(session, tokens, max_new_tokens, temperature, top_p, jax.random.key(seed), frozenset(stop_tokens))


def _generate(session, tokens, max_new_tokens, temperature, top_p, key, stop_tokens) -> Iterator[int]:
    for step in range(max_new_tokens):
        token = int(sample_token(session.read(tokens), jax.random.fold_in(key, step), temperature, top_p))
        yield token
        if token in stop_tokens:
            return
        tokens = [*tokens, token]


@jax.jit
def sample_token(
    logits: Float[Array, "V"],
    key: Key[Array, ""],
    temperature: float | Float[Array, ""],
    top_p: float | Float[Array, ""],
) -> Int[Array, ""]:
    """Returns a token id: the likeliest at temperature 0, otherwise sampled from the nucleus of probability `top_p`.

    With probabilities 0.5, 0.3, 0.2 and top_p 0.7, samples from the first two: 0.5 is less than 0.7, 0.5 + 0.3 is not.
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    order = jnp.argsort(-scaled)
    probability = jax.nn.softmax(scaled[order])
    likelier = jnp.cumsum(probability) - probability  # total probability of all likelier tokens
    sample = order[jax.random.categorical(key, jnp.where(likelier < top_p, scaled[order], -jnp.inf))]
    return jnp.where(temperature > 0, sample, jnp.argmax(logits))


def _check_prompt(config: DecoderConfig, parameters: dict, tokens: Sequence[int]) -> None:
    vocabulary = config.vocab_size + len(parameters.get(decoder.SOFT_PROMPT, ()))
    if not tokens:
        raise UserError("the prompt has no tokens; it needs at least one")
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise UserError(
            f"the prompt holds token ids {min(tokens)} to {max(tokens)}, but the model has a vocabulary of "
            f"{vocabulary}; use the tokenizer that belongs to the model"
        )
    if len(tokens) > config.context:
        raise UserError(
            f"prompt of {len(tokens)} tokens exceeds the model's context of {config.context}; shorten the history"
        )


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _extend(config, parameters, cache, tokens, start, last):
    hidden, cache = decoding.extend(config, parameters, cache, tokens, start)
    unembedding = decoder.unembedding(config, parameters)
    logits = jnp.einsum("d,vd->v", hidden[0, last].astype(jnp.float32), unembedding.astype(jnp.float32))
    return decoder.cap_logits(config, logits), cache
