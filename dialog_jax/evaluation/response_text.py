"""The text of a response, for the K passes: found in texts alone, and shared with no code of the one pass.

In: a tokenizer's own `apply_chat_template`. Out: what a model has to write after a prompt.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jinja2

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError

REFUSALS = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError)
"""What a chat template can raise."""
_TOOL = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {"type": "object"}}}
_REPLY, _QUESTION = "Qx7 zebra", "Qx9 okapi"  # texts that no template contains


class Frame(NamedTuple):
    """What a template writes around the content of a response."""

    prefill: str
    """What only the generation prompt has before a content."""
    lead: str
    """What only history has before a content."""
    end: str
    """What follows a content, up to the end of the response."""
    end_of_turn: str
    """The token that ends it; empty if there is none."""
    beyond: str
    """What the rendering of a last message has after the end of the response."""
    special: re.Pattern[str]
    """Matches a special token."""
    has_think_tags: bool
    """Whether the template itself contains `</think>`."""


def read_frame(tokenizer, kwargs: Mapping[str, Any], stop_tokens: Collection[int] = ()) -> Frame:
    """Returns what the template writes around a response, from the renderings of a short dialogue.

    Args:
      stop_tokens: ids at which generation stops by the model's files.
    """
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": _REPLY},
        {"role": "user", "content": _QUESTION},
    ]
    try:
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, **kwargs, add_generation_prompt=True)
    except REFUSALS:  # some templates are for dialogues with tools only
        kwargs = {**kwargs, "tools": [_TOOL]}
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, **kwargs, add_generation_prompt=True)
    try:
        question = tokenizer.apply_chat_template(messages[:1], tokenize=False, **kwargs)
    except REFUSALS:
        question = ""
    before, _, after = tokenizer.apply_chat_template(messages[:2], tokenize=False, **kwargs).rpartition(_REPLY)
    shared = len(after)
    try:
        before, _, rest = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs).partition(_REPLY)
        following = rest.partition(_QUESTION)[0]
        shared = max(length for length in range(len(after) + 1) if following.startswith(after[:length]))
    except REFUSALS:  # no user message may follow
        pass
    added = tokenizer.added_tokens_decoder
    special = _match_any(token.content for token in added.values() if token.special)
    visible = _match_any(token.content for token in added.values() if token.content.strip())
    spans = [match.span() for match in special.finditer(after)]
    shared = next((start for start, stop in spans if start < shared < stop), shared)
    header = prompt.rpartition("Hello")[2] if question == prompt else ""
    tail = next(after[start:] for start in range(len(after) + 1) if header.endswith(after[start:]))
    is_header = any(after[start:stop] in tail and stop == len(after.rstrip()) for start, stop in spans)
    if spans and (is_header or special.sub("", after[shared:]).strip()):  # a header, although no message follows
        stops = [*stop_tokens, tokenizer.eos_token_id]
        named = [stop for start, stop in spans if _names(tokenizer, after[start:stop], stops)]
        both = [(start, stop) for start, stop in spans if stop <= shared]
        user_ends = [stop for start, stop in both if start >= len(after) - len(tail)]
        shared = (named[-1:] or user_ends[:1] or [stop for _, stop in both][-1:] or [spans[0][1]])[0]
    elif not any(_names(tokenizer, after[start:stop], stop_tokens) for start, stop in spans if stop <= shared):
        shared = next((stop for start, stop in spans if _names(tokenizer, after[start:stop], stop_tokens)), shared)
    ends = [
        [match.span() for match in pattern.finditer(after) if match.end() <= limit]
        for limit in (shared, len(after))
        for pattern in (special, visible)
    ]
    place = next((number for number, some in enumerate(ends) if some), None)
    start, stop = (len(after), len(after)) if place is None else ends[place][-1]
    return Frame(
        prefill=prompt.removeprefix(before) if prompt.startswith(before) else "",
        lead=before.removeprefix(prompt) if before.startswith(prompt) else "",
        end=after[:stop],
        end_of_turn=after[start:stop],
        beyond="" if place is None or place > 1 else after[shared:],
        special=special,
        has_think_tags="</think>" in str(tokenizer.chat_template),
    )


def find_response(dialogue: Dialogue, index: int, prompt: str, history: str, text: str, frame: Frame, kind: str) -> str:
    """Returns the response of message `index`, of a rendering that ends with it.

    Args:
      history: the prompt without the generation prompt.
      text: the rendering.
      kind: `rendered` or `verbatim`.

    Raises:
      UserError: there is none.
    """
    message = dialogue.messages[index]
    if kind == "rendered":
        return _cut_end(_find_rendered(dialogue, index, prompt, history, text, frame), frame)
    reasoning = next(
        (message.fields[key] for key in ("reasoning_content", "reasoning", "thinking") if message.fields.get(key)), ""
    )
    prefill = frame.prefill if prompt.endswith(frame.prefill) else ""
    if message.fields.get("tool_calls") or (reasoning and not frame.has_think_tags):
        shorter = prompt[: len(prompt) - len(prefill)]
        if prefill and text.startswith(shorter) and not text.startswith(prompt):
            response = _cut_end(text[len(shorter) :], frame)
        else:
            response = _cut_end(_find_rendered(dialogue, index, prompt, history, text, frame), frame)
        if reasoning.strip() not in response and frame.has_think_tags:
            response = _write_block(reasoning) + response
        if message.content.strip() not in response or reasoning.strip() not in response:
            raise UserError(
                f"{dialogue.name}: the chat template does not write all of message {index}, which cannot be written "
                "verbatim. Write it into the content."
            )
        return _subtract(prefill, response)
    return frame.lead + _subtract(prefill, _write_block(reasoning) + message.content) + frame.end


def _find_rendered(dialogue: Dialogue, index: int, prompt: str, history: str, text: str, frame: Frame) -> str:
    """Returns what follows the prompt; or else the last place that ends as the prompt does from its last content on.

    If that is empty, the place ends as much as possible as the prompt does, special tokens included. The end of the
    message before may be shorter, but not what the generation prompt adds.
    """
    if text.startswith(prompt):
        return text[len(prompt) :]
    content = dialogue.messages[dialogue.ancestors(index)[-1]].content.strip()
    ending = prompt[prompt.rfind(content) :] if content in prompt else prompt
    if not content:
        ending = next(prompt[start:] for start in range(len(prompt) + 1) if prompt[start:] in text)
        ending = ending if frame.special.search(ending) else ""
    place = text.rfind(ending)
    if place >= 0 and ending.removeprefix(content).strip():
        return text[place + len(ending) :]
    header = prompt[len(history) :] if prompt.startswith(history) else ""
    if content and header.strip() and content in text:
        end, _, response = text[text.rfind(content) + len(content) :].partition(header)
        if response and ending.removeprefix(content).removesuffix(header).startswith(end):
            return response
    raise UserError(
        f"{dialogue.name}: with message {index} the chat template renders no continuation of its prompt, so no "
        "response can lead there. Pass another chat template or chat_template_kwargs, or set data.responses."
    )


def _cut_end(response: str, frame: Frame) -> str:
    """Returns a response up to its end of turn and the special tokens after it, or another one that ends it."""
    if not frame.end_of_turn:
        return response
    inner = response.removesuffix(frame.beyond)
    matches = [match.end() for match in frame.special.finditer(inner)]
    end = inner.rfind(frame.end_of_turn) + len(frame.end_of_turn) if frame.end_of_turn in inner else 0
    if matches and not inner[matches[-1] :].strip():
        return inner[: max(matches[-1], end)]
    return inner[:end] if end else response


def _write_block(reasoning: str) -> str:
    return "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" if reasoning else ""


def _subtract(prefill: str, recorded: str) -> str:
    """Returns what is recorded without what the prompt has of it."""
    if prefill and recorded.startswith(prefill):
        return recorded[len(prefill) :]
    trimmed = prefill.rstrip()
    return recorded[len(trimmed) :] if trimmed and recorded.startswith(trimmed) else recorded


def _names(tokenizer, text: str, ids: Collection[int]) -> bool:
    return tokenizer.convert_tokens_to_ids(text) in ids


def _match_any(texts) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")
