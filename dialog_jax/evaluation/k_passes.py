"""The K passes that one pass replaces: each response alone after its prompt, as a plain causal sequence.

The reference for everything else (`evaluation.agreement`, `evaluation.k_pass_scores`), and therefore naive: text
from the tokenizer's `apply_chat_template`, and tokens from the tokenizer's own call. Knows no tree, row or target list;
shares no code with `rendering`. `evaluation.k_pass_losses` has the forward passes.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import transformers
from jaxtyping import Float32, Int32

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.evaluation import escaping, response_text

_PROBE = "Qx7 zebra"  # a text that no template contains


class Pass(NamedTuple):
    """One response after a prompt. The token at index i has position i."""

    message: int
    """Index in the dialogue's messages."""
    turn: int
    """Number of assistant messages before it on its path."""
    tokens: Int32[np.ndarray, " n"]
    """prompt ++ response."""
    start: int
    """Index of the response's first token; at least 1, since nothing predicts a first token."""
    weight: Float32[np.ndarray, " r"]
    """Of each token of the response: the weight of its message times that of the part in which the token ends."""


def make_passes(
    dialogue: Dialogue,
    tokenizer: transformers.PreTrainedTokenizerFast,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    allow_special_tokens: bool = False,
    responses: str = "rendered",
    stop_tokens: Collection[int] = (),
    virtual_tokens: Sequence[int] = (),
) -> list[Pass]:
    """Returns a pass for each assistant message of weight above 0, in order.

    The prompt is the rendering of the messages before it, with the generation prompt. The response is what a model has
    to generate next to get the rendering with the message, up to and including its end of turn; with
    `responses="verbatim"`, what is recorded, and the end of turn.

    Special tokens that the dialogue's texts spell are ordinary text unless allowed; see `evaluation.escaping`.

    Args:
      virtual_tokens: ids of a soft prompt, which precedes each prompt.

    Raises:
      UserError: the template refuses a history, or its rendering with the message does not continue the prompt.
    """
    original = dialogue
    if not allow_special_tokens:
        dialogue = escaping.escape_special_tokens(dialogue, tokenizer)
    encode = _encode if dialogue == original else escaping.encode_escaped
    kwargs = dict(chat_template_kwargs or {})
    frame = response_text.read_frame(tokenizer, {**kwargs, **dialogue.chat_template_kwargs}, stop_tokens)
    passes = []
    for index, message in enumerate(dialogue.messages):
        if message.role != "assistant" or not message.weight:
            continue
        history = dialogue.ancestors(index)
        prompt = _render(dialogue, history, tokenizer, kwargs | {"add_generation_prompt": True})
        text = _render(dialogue, (*history, index), tokenizer, kwargs)
        if dialogue != original:
            _check_escaped(original, text, (*history, index), tokenizer, kwargs)
        bare = "" if text.startswith(prompt) else _render(dialogue, history, tokenizer, kwargs)
        written = response_text.find_response(dialogue, index, prompt, bare, text, frame, responses)
        text = prompt + written
        (prompt_ids, _), (ids, ends) = encode(tokenizer, prompt), encode(tokenizer, text)
        response, ends = ids[len(prompt_ids) :], [end - len(prompt) for end in ends[len(prompt_ids) :]]
        if ids[: len(prompt_ids)] != prompt_ids:  # a token crosses the boundary; a model would be given the prompt's
            crossing_text = tokenizer.decode(ids)
            continuations = (
                _encode_continuation(tokenizer, written, encode, front) for front in _list_fronts(tokenizer)
            )
            response, ends = next(
                (one for one in continuations if tokenizer.decode(prompt_ids + one[0]) == crossing_text), ([], [])
            )
            if not response:
                raise UserError(
                    f"{dialogue.name}: no tokens after the prompt of message {index} decode to its response. Pass a "
                    "chat template whose generation prompt ends where a token ends."
                )
        turn = sum(dialogue.messages[earlier].role == "assistant" for earlier in history)
        prompt_ids = [*virtual_tokens, *prompt_ids]
        tokens = np.array(prompt_ids + response, np.int32)
        start = max(1, len(prompt_ids))
        weight = _weigh_tokens(dialogue, index, prompt, written, ends)[start - len(prompt_ids) :]
        passes.append(Pass(index, turn, tokens, start, weight))
    return passes


def replace_prompt(
    one: Pass,
    context: str,
    dialogue: Dialogue,
    tokenizer: transformers.PreTrainedTokenizerFast,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    allow_special_tokens: bool = False,
    virtual_tokens: Sequence[int] = (),
) -> tuple[Pass, bool]:
    """Returns (the pass with the tokens of its response after another prompt, whether an empty user message is in it).

    Args:
      context: `last`, the messages from the last user message on behind the system message; or `none`, the generation
        prompt and the BOS token alone. An empty user message precedes it if the template has no generation prompt.

    Raises:
      UserError: the template refuses the prompt.
    """
    original = dialogue
    if not allow_special_tokens:
        dialogue = escaping.escape_special_tokens(dialogue, tokenizer)
    encode = _encode if dialogue == original else escaping.encode_escaped
    kwargs = dict(chat_template_kwargs or {})
    has_empty_message = False
    if context == "last":
        history = dialogue.ancestors(one.message)
        roles = [dialogue.messages[index].role for index in history]
        system = next((place for place, role in enumerate(roles) if role != "system"), len(roles))
        users = [place for place, role in enumerate(roles) if role == "user"]
        history = (*history[:system], *history[users[-1] if users else system :])
        prompt = _render(dialogue, history, tokenizer, kwargs | {"add_generation_prompt": True})
    else:
        probe = dataclasses.replace(dialogue, messages=(Message(role="user", content=_PROBE),), parents=())
        text = _render(probe, (0,), tokenizer, kwargs)
        prompt = _render(probe, (0,), tokenizer, kwargs | {"add_generation_prompt": True})
        if prompt.startswith(text) and prompt[len(text) :].strip():
            prompt = prompt[len(text) :]
            bos = tokenizer.bos_token or ""
            if text.startswith(bos) and not prompt.startswith(bos):  # it may be the token that begins a message
                prompt = bos + prompt
        else:
            has_empty_message = True
            empty = dataclasses.replace(probe, tools=None, messages=(Message(role="user", content=""),))
            prompt = _render(empty, (0,), tokenizer, kwargs | {"add_generation_prompt": True})
    prompt_ids = [*virtual_tokens, *encode(tokenizer, prompt)[0]]
    tokens = np.concatenate([np.array(prompt_ids, np.int32), one.tokens[one.start :]])
    return one._replace(tokens=tokens, start=len(prompt_ids)), has_empty_message


def _check_escaped(original: Dialogue, escaped: str, indices: Sequence[int], tokenizer, kwargs) -> None:
    """Raises UserError if escaped texts are rendered differently from the original ones."""
    text = _render(original, indices, tokenizer, kwargs)
    if ord(max(text)) >= escaping.ESCAPE_OFFSET:
        raise UserError(
            f"{original.name}: spells special tokens and has private-use characters from U+{escaping.ESCAPE_OFFSET:X} "
            "on, which escape them here. Remove the one or the other."
        )
    if escaping.unescape(escaped) != text:
        raise UserError(
            f"{original.name}: spells special tokens, and the chat template does more than write them. Remove them, or "
            "set allow_special_tokens."
        )


def _render(dialogue: Dialogue, indices: Sequence[int], tokenizer, kwargs: Mapping[str, Any]) -> str:
    """Returns the rendering of the messages at `indices`."""
    if not indices:
        raise UserError(f"{dialogue.name}: begins with an assistant message, which has no prompt. Add a user message.")
    messages = [dialogue.messages[index].as_dict() for index in indices]
    tools = [dict(tool) for tool in dialogue.tools] if dialogue.tools else None
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, **{**kwargs, **dialogue.chat_template_kwargs}
        )
    except response_text.REFUSALS as error:
        raise UserError(
            f"{dialogue.name}: the chat template refuses messages {', '.join(map(str, indices))}: {error}"
        ) from error


def _weigh_tokens(
    dialogue: Dialogue, index: int, prompt: str, text: str, ends: Sequence[int]
) -> Float32[np.ndarray, " r"]:
    """Returns the weight of each token of a response from the character of the response's text at which it ends."""
    message = dialogue.messages[index]
    weight = np.full(len(ends), message.weight, np.float32)
    if not message.parts:
        return weight
    begin = text.find(message.content)
    if begin < 0:  # the prompt may have its beginning
        place = (prompt + text).rfind(message.content, max(0, len(prompt) - len(message.content)))
        begin = place - len(prompt)
        missing = place < 0
    else:
        missing = text.count(message.content) != 1
    if missing:
        raise UserError(
            f"{dialogue.name}: message {index} has parts with weights, but the chat template renders its content "
            f"{text.count(message.content)} times in {text[:60]!r}. Write it as the template renders it."
        )
    for part in message.parts:
        end = begin + len(part.text)
        for token, stop in enumerate(ends):
            if begin < stop <= end:
                weight[token] = message.weight * part.weight
        begin = end
    return weight


def _encode(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Returns (token ids, the character at which each token ends)."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]


def _list_fronts(tokenizer) -> list[str]:
    """Returns texts to put in front of one that continues another, so that the tokenizer puts no space there.

    Behind a special token most put none; a few do, but none behind ordinary text, which may merge with what follows.
    """
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    plain = [token.content for token in special if not (token.lstrip or token.rstrip)]
    return [*plain[:1], "\n", "a", "1", ""]


def _encode_continuation(tokenizer, text: str, encode: Callable, front: str) -> tuple[list[int], list[int]]:
    """Returns what `_encode` returns for `front` and a text, without the tokens of `front`."""
    ids, ends = encode(tokenizer, front + text)
    skipped = sum(end <= len(front) for end in ends)
    return ids[skipped:], [end - len(front) for end in ends[skipped:]]
