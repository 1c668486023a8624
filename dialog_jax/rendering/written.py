"""What of a record a rendered text does not contain: contents, reasoning, tool calls and tools.

A text counts as written if the rendering has it, white space aside, also escaped for JSON, Python or HTML. JSON counts
as written if the rendering has all its keys and values, in any order. What is looked for has a place of its own: the
name of a tool that only another text mentions is not written. Texts are not escaped (`special_tokens`). Knows no
template and no tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.rendering import reasoning
from dialog_jax.rendering.rendered_text import RenderedText, iterate_leaves

# Each kind of what is not written: what is counted, and the remedy.
KINDS = {
    "content": (
        "responses whose content the chat template does not write unchanged",
        "set data.responses=verbatim unless they have tool calls, or pass another chat template",
    ),
    "reasoning": (
        "responses whose reasoning the chat template does not write",
        "set data.responses=verbatim, or pass another chat template",
    ),
    "reasoning_end": (
        "responses that do not end the reasoning that their prompt begins, so that they train an answer inside of it",
        "record their reasoning and its end, or pass another chat template",
    ),
    "tool_calls": (
        "responses whose tool calls the chat template does not write completely",
        "pass a chat template that writes tool calls, or write them into the content",
    ),
    "tools": (
        "dialogues whose tools the chat template does not write completely",
        "pass a chat template that writes tools, or write them into the system message",
    ),
    "message": (
        "messages of prompts whose content the chat template does not write unchanged",
        "pass a chat template that supports their role",
    ),
}
_MAX_DETAILS = 3  # named of each kind
_Checks = dict[str, list[tuple[str, bool]]]  # by kind, the name of all that is looked for, and whether it is written


class ResponseLost(UserError):
    """The chat template writes nothing of what a response says."""


class Unwritten(NamedTuple):
    """Something of a message, or of a dialogue's tools, that the template does not write."""

    kind: str
    """One of `KINDS`."""
    message_index: int
    """-1 for tools."""
    detail: str = ""
    """Which of them: `call 'tide'`."""

    def describe(self, message_index: int) -> str:
        """Returns the place: `message 1: call 'tide'`.

        Args:
          message_index: that of the complete dialogue.
        """
        place = f"message {message_index}" if message_index >= 0 else "tools"
        return f"{place}: {self.detail}" if self.detail else place


def says_something(message: Message) -> bool:
    """Returns whether a message has any text, reasoning or call."""
    texts, content = reasoning.split_message(message)
    return bool(content.strip() or any(map(str.strip, texts)) or message.fields.get("tool_calls"))


def find_unwritten(
    dialogue: Dialogue, index: int, checked: int, *, prompt: str, response: str, end: str, reads_tools: bool = True
) -> list[Unwritten]:
    """Returns what the response of message `index` and its prompt lack of what a dialogue says.

    Args:
      checked: number of messages that need not be looked for in the prompt; 0 if the tools have to be.
      end: with which the template ends every response.
      reads_tools: whether the prompt is another one without the tools; otherwise they can be in system messages only.

    Raises:
      ResponseLost: what `find_in_response` raises, with the message's place.
    """
    unwritten = find_in_prompt(dialogue.messages, range(checked, index), prompt)
    if not checked and dialogue.tools:
        messages = dialogue.messages[:index]
        others = [message.content for message in messages if message.role != "system"]
        in_system = "\n".join(message.content for message in messages if message.role == "system")
        unwritten += find_tools(dialogue.tools, _remove_contents(prompt, others) if reads_tools else in_system)
    try:
        return unwritten + find_in_response(dialogue.messages[index], index, response, prompt=prompt, end=end)
    except ResponseLost as error:
        raise ResponseLost(f"{dialogue.name}: message {index}: {error}") from None


def find_in_response(
    message: Message, index: int, response: str, *, prompt: str = "", end: str = ""
) -> list[Unwritten]:
    """Returns what of a message its response does not contain.

        message    content "<think>Add.</think>42", a call of `tide` with {"port": "Brest", "hour": 4}
        response   42<call>{"name": "tide", "arguments": {"port": "Brest"}}<end>
        returned   reasoning; tool_calls with the detail "argument 'hour' of call 'tide'"

    Args:
      index: of the message in its dialogue.
      response: its own rendering.
      prompt: the text before it, which may have the beginning of the content.

    Raises:
      ResponseLost: the message says something, of which the response has nothing, not even a word.
    """
    body = response.removesuffix(end)
    opening = reasoning.find_open_tag(prompt, body)
    unwritten = [Unwritten("reasoning_end", index, f"its prompt ends with {opening}")] if opening else []
    calls = message.fields.get("tool_calls") or ()
    in_fields = any(message.fields.get(field) for field in reasoning.FIELDS)
    if not calls and not in_fields and message.content.strip() in body:
        return unwritten
    in_reasoning, content = reasoning.split_message(message)
    texts = [("content", content), *(("reasoning", text) for text in in_reasoning)]
    checks = _check_response(texts, calls, body, prompt)
    if _count_missing(checks) and calls:  # they may have the content as an argument, and come before it
        checks = min(checks, _check_response(texts, calls, body, prompt, last=True), key=_count_missing)
    missing = [
        Unwritten(kind, index, _join([name for name, is_written in results if not is_written]))
        for kind, results in checks.items()
        if not all(is_written for _, is_written in results)
    ]
    nothing = not any(is_written for results in checks.values() for _, is_written in results)
    if missing and nothing and not _find_words(content, *in_reasoning) & _find_words(body):
        raise ResponseLost(_describe_loss(missing, response))
    return unwritten + missing


def find_in_prompt(messages: Sequence[Message], indices: range, prompt: str) -> list[Unwritten]:
    """Returns the messages other than responses, among those at `indices`, whose content a prompt does not contain.

        messages    user "Book it, ok?", tool "ok"
        prompt      <user>Book it, ok?<end>
        returned    message 1, since the "ok" in the prompt is that of message 0

    Args:
      indices: up to the last message of the prompt.
    """
    others = [index for index in indices if messages[index].role != "assistant"]
    rendering, contents = RenderedText(prompt), "\n".join(message.content for message in messages[: indices.stop])
    return [
        Unwritten("message", index, messages[index].role)
        for index in others
        if not _has_message(messages[: indices.stop], index, prompt, rendering, contents)
    ]


def find_tools(tools: Sequence[Mapping[str, Any]], text: str) -> list[Unwritten]:
    """Returns the tools of which a text lacks the name, the description or the name of a parameter, in one entry."""
    rendering = RenderedText(text)
    details = [detail for tool in tools for detail in _list_missing_of_tool(tool, rendering)]
    return [Unwritten("tools", -1, _join(details))] if details else []


def _has_message(messages: Sequence[Message], index: int, prompt: str, rendering: RenderedText, contents: str) -> bool:
    """Returns whether the prompt of `messages` has the content of message `index` in a place of its own.

    Args:
      rendering: of the prompt.
      contents: of all messages, as one text.
    """
    text = messages[index].content.strip()
    if not text or not rendering.has_json(text):
        return not text
    is_text = rendering.has_text(text)
    if is_text and contents.count(text) == 1:
        return True
    others = [message for place, message in enumerate(messages) if place != index]
    rest = RenderedText(_remove_contents(prompt, [one.content for one in others if not is_text or text in one.content]))
    return rest.has_text(text) if is_text else rest.has_json(text)


def _remove_contents(prompt: str, contents: Sequence[str]) -> str:
    """Returns a prompt without one occurrence of each content; of reasoning and answer, if it has only the answer."""
    for content in sorted(filter(None, map(str.strip, contents)), key=len, reverse=True):
        if content not in prompt:
            content = reasoning.split_tags(content)[1].strip()
        if content:
            prompt = prompt.replace(content, "\0", 1)
    return prompt


def _check_response(
    texts: Sequence[tuple[str, str]], calls: Sequence[Mapping[str, Any]], body: str, prompt: str, *, last: bool = False
) -> _Checks:
    """Returns what of texts and calls is written: the longest text is looked for first, others outside it, calls last.

    Args:
      texts: (kind, text).
      last: whether the last occurrence of a text is taken for it, and not the first.
    """
    rendering = RenderedText(body, prompt)
    checks: _Checks = {"content": [], "reasoning": []}
    for kind, text in sorted(texts, key=lambda pair: len(pair[1].strip()), reverse=True):
        if text.strip():
            checks[kind].append(("", rendering.has_text(text)))
            rendering = rendering.without(text, last=last) if checks[kind][-1][1] else rendering
    checks["tool_calls"] = []
    names = rendering
    for call in calls:
        checks["tool_calls"] += _check_call(call, rendering, names)
        name = call["function"].get("name")
        names = names.without(name) if isinstance(name, str) and name.strip() else names
    return checks


def _count_missing(checks: _Checks) -> int:
    return sum(not is_written for results in checks.values() for _, is_written in results)


def _check_call(call: Mapping[str, Any], rendering: RenderedText, names: RenderedText) -> list[tuple[str, bool]]:
    """Returns (what, whether it is written) of the name and each argument of a call; only of the name if that is not.

    [("call 'tide'", True), ("argument 'port' of call 'tide'", False)]

    Args:
      names: the rendering without the names of the calls before it.
    """
    function = call["function"]
    name, arguments = function.get("name"), function.get("arguments")
    results = [(f"call {name!r}", names.has_value(name))] if isinstance(name, str) and name.strip() else []
    if isinstance(arguments, str):
        pairs = [("arguments", rendering.has_json(arguments))] if arguments.strip() else []
    else:
        values = arguments.items() if isinstance(arguments, Mapping) else [("", arguments)]
        leaves = ((str(key), [leaf for leaf in iterate_leaves(value) if _has_text(leaf)]) for key, value in values)
        pairs = [(f"argument {key!r}", all(map(rendering.has_value, entries))) for key, entries in leaves if entries]
    if results and not results[0][1] and not any(is_written for _, is_written in pairs):
        return results
    return results + [(f"{what} of call {name!r}", is_written) for what, is_written in pairs]


def _list_missing_of_tool(tool: Mapping[str, Any], rendering: RenderedText) -> list[str]:
    """Returns what of a tool is not written: `tool 'tide'`, or `parameter 'port' of tool 'tide'`."""
    function = tool.get("function")
    function = function if isinstance(function, Mapping) else tool
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str):
        return []
    if not rendering.has_text(name):
        return [f"tool {name!r}"]
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    keys = [key for key in properties or () if not rendering.has_text(key)] if isinstance(properties, Mapping) else []
    missing = [f"parameter {key!r}" for key in keys]
    if isinstance(description, str) and not all(map(rendering.has_text, description.splitlines())):
        missing.append("description")
    return [f"{what} of tool {name!r}" for what in missing]


def _has_text(value: Any) -> bool:
    """Returns whether a value has a text that can be looked for."""
    return value is not None and bool(str(value).strip())


def _find_words(*texts: str) -> set[str]:
    return {word for text in texts for word in re.findall(r"\w+", text.casefold())}


def _join(details: Sequence[str]) -> str:
    """Returns the first details, and the number of the others."""
    names = list(filter(None, dict.fromkeys(details)))
    more = [f"{len(names) - _MAX_DETAILS:,} more"] if len(names) > _MAX_DETAILS else []
    return ", ".join([*names[:_MAX_DETAILS], *more])


def _describe_loss(unwritten: Sequence[Unwritten], response: str) -> str:
    """Returns the error of a response that has nothing of what its message says, without the message's place."""
    names = " and ".join(f"{one.kind} ({one.detail})" if one.detail else one.kind for one in unwritten)
    kinds = {one.kind for one in unwritten}
    if "tool_calls" in kinds:
        remedy = "Pass a chat template that writes tool calls, write them into the content"
    else:
        remedy = "Set data.responses=verbatim, pass another chat template"
    return (
        f"the chat template writes nothing of what the message says, its {names}; the response would be "
        f"{response[:60]!r}. {remedy}, or leave out such dialogues with data.on_error=skip."
    )
