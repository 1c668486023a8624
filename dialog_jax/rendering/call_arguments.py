"""The form of a call's arguments that a chat template is designed for: an object, or the object as JSON text.

    {{ call.function.arguments | tojson }}     writes text as a JSON string, {"port": "Brest"} as "{\\"port\\": ...}"
    {{ call.function.arguments }}              writes an object as Python does, {'port': 'Brest'}
    {{ '<call>' + call.function.arguments }}   raises an error for an object

The last two are designed for text, as OpenAI's format has it; most templates are designed for objects. Arguments that
are text, since they are not a JSON object, stay text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_KEY, _VALUE = "Qx7key", "Qx7 value"  # arguments that no template contains
_takes_text: dict[str, bool] = {}  # by template: whether it is designed for text, once known

Messages = Sequence[Mapping[str, Any]]


def adapt_arguments(template: str, messages: Messages, render: Callable[[Messages], tuple[str, bool]]) -> Messages:
    """Returns the messages with the arguments of their calls in the form that the template is designed for.

    That is found by rendering the messages with other arguments, in both forms, until a template writes them.

    Args:
      template: Jinja text.
      messages: as dictionaries; arguments are objects, or text that is not an object.
      render: returns (what the template writes of messages, whether it refuses them).
    """
    if not any(isinstance(arguments, Mapping) for arguments in _list_arguments(messages)):
        return messages
    if template not in _takes_text:
        probe = {_KEY: _VALUE}
        text, is_refused = render(_replace_arguments(messages, lambda arguments: probe))
        if is_refused or repr(probe) in text:
            text, is_refused = render(_replace_arguments(messages, lambda arguments: json.dumps(probe)))
            if json.dumps(probe) in text and not is_refused:
                _takes_text[template] = True
        elif _KEY in text:
            _takes_text[template] = False
    if not _takes_text.get(template, False):
        return messages
    return _replace_arguments(messages, lambda arguments: json.dumps(arguments, ensure_ascii=False))


def _list_arguments(messages: Messages) -> list[Any]:
    """Returns the arguments of every call."""
    calls = [call for message in messages for call in _list_calls(message)]
    return [call["function"].get("arguments") for call in calls if isinstance(call.get("function"), Mapping)]


def _list_calls(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list | tuple) else []


def _replace_arguments(messages: Messages, change: Callable[[Mapping[str, Any]], Any]) -> list[dict[str, Any]]:
    """Returns the messages with all arguments that are objects changed."""

    def change_call(call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
            return call
        return {**call, "function": {**function, "arguments": change(function["arguments"])}}

    return [
        {**message, "tool_calls": [change_call(call) for call in message["tool_calls"]]}
        if _list_calls(message)
        else dict(message)
        for message in messages
    ]
