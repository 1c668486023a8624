"""Tools and calls of tools in their several spellings to the one that chat templates are designed for.

tool   {"type": "function", "function": {"name": "tide", "description": "...", "parameters": {"type": "object", ...}}}
call   {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
"""

import json
from collections.abc import Mapping
from typing import Any

from dialog_jax.dialogues.json_values import check_text, parse_object, parse_text, quote
from dialog_jax.errors import UserError

_TOOLS_REMEDY = 'Write them as [{"type": "function", "function": {"name": ..., "parameters": ...}}].'
_CALLS_REMEDY = 'Write them as [{"type": "function", "function": {"name": ..., "arguments": ...}}].'
_CALL_REMEDY = (
    'Write it as {"name": ..., "arguments": {...}}; if it is text that the model wrote, give it the role gpt.'
)


def parse_tools(tools: Any, where: str) -> tuple[Mapping[str, Any], ...] | None:
    """Returns the tools of a record; None if there are none.

    A function by itself, {"name": ..., "parameters": ...}, is put in a tool, and `parameters` given as JSON text are
    parsed.

    Args:
      tools: a list, or JSON text of one.
      where: "dialogue 412 (train.jsonl:413): tools", for errors.

    Raises:
      UserError: they are not a list of objects, or text that is not JSON.
    """
    tools = _parse_list(tools, where, "objects", _TOOLS_REMEDY)
    check_text(tools, where)
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{where} is {quote(tools)}; needed a list of objects. {_TOOLS_REMEDY}")
    return tuple(_parse_tool(tool, f"{where}[{index}]") for index, tool in enumerate(tools)) or None


def parse_calls(calls: Any, where: str) -> list[Any]:
    """Returns the calls of a message; a call by itself, {"name": ..., "arguments": ...}, is put in a function.

    Arguments given as JSON text of an object are parsed; other text stays as it is, and what is neither an object nor
    text, a list for example, becomes JSON text. Calls of which nothing is given, as Arrow pads them, are none.

    Args:
      calls: a list, or JSON text of one.
      where: "dialogue 412 (train.jsonl:413): message 1: tool_calls", for errors.

    Raises:
      UserError: they are not a list of calls, or text that is not JSON.
    """
    calls = _parse_list(calls, where, "calls", _CALLS_REMEDY)
    return [
        _parse_call(call, f"{where}[{index}]", _CALLS_REMEDY)
        for index, call in enumerate(calls)
        if not is_padding(call)
    ]


def is_padding(call: Any) -> bool:
    """Returns whether a call has no value other than null: {"function": {"name": null, "arguments": null}}."""
    return call is None or (isinstance(call, Mapping) and all(map(is_padding, call.values())))


def parse_function_call(call: Any, where: str) -> list[Any]:
    """Returns the calls of ShareGPT's role `function_call` or OpenAI's older field: a call, several, or JSON text."""
    if isinstance(call, str):
        text, call = call, parse_text(call, where, _CALL_REMEDY)
        if call is None:
            raise UserError(f"{where} is {quote(text)}; needed a call. {_CALL_REMEDY}")
    calls = call if isinstance(call, list | tuple) else [call]
    if not calls:
        raise UserError(f"{where} is {quote(call)}; needed a call. {_CALL_REMEDY}")
    return [_parse_call(one, where, _CALL_REMEDY) for one in calls]


def _parse_list(value: Any, where: str, items: str, remedy: str) -> list[Any]:
    """Returns a list, also of JSON text; empty for null."""
    if isinstance(value, str):
        value = parse_text(value, where, remedy)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} is {quote(value)}; needed a list of {items}. {remedy}")
    return list(value)


def _parse_tool(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if "function" not in tool and "name" in tool and tool.get("type", "function") == "function":
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("parameters"), str):
        return dict(tool)
    parameters = parse_text(function["parameters"], f"{where}: parameters", "Write them as a JSON schema.")
    return {**tool, "function": {**function, "parameters": {} if parameters is None else parameters}}


def _parse_call(call: Any, where: str, remedy: str) -> Any:
    if isinstance(call, str):
        call = parse_text(call, where, remedy)
    if isinstance(call, Mapping) and "function" not in call and isinstance(call.get("name"), str):
        inner = {"name", "arguments", "parameters"}
        function = {key: value for key, value in call.items() if key in inner}
        call = {**{key: value for key, value in call.items() if key not in inner}, "function": function}
        call = {"type": "function", **call}
    given = call.get("function") if isinstance(call, Mapping) else None
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(name, str) or not name.strip():
        raise UserError(f"{where} is {quote(call)}; needed a call with a name. {remedy}")
    function = dict(given)
    if "arguments" not in function:
        function["arguments"] = function.pop("parameters", {})
    arguments = function["arguments"]
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        function["arguments"] = {}
    elif isinstance(arguments, str):
        parsed = parse_object(arguments)
        function["arguments"] = arguments if parsed is None else parsed
    elif not isinstance(arguments, Mapping):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": function}
