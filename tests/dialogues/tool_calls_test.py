"""Every spelling of tools and calls to the one form that chat templates are designed for."""

import copy
import json

import hypothesis
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.dialogues import parsing
from dialog_jax.errors import UserError
from tests.laws import budget

_FUNCTION = {"name": "tide", "arguments": {"port": "Brest", "hours": [1, 2]}}
_CALL = {"type": "function", "function": _FUNCTION}
_SCHEMA = {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}
_TOOL = {"type": "function", "function": {"name": "tide", "description": "Tides.", "parameters": _SCHEMA}}


def parse(record):
    (dialogue,) = parsing.parse_records([record])
    return dialogue


def with_calls(calls, **fields):
    return {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": calls, **fields},
        ]
    }


def calls_of(record):
    return parse(record).messages[-1].fields.get("tool_calls")


class CallsTest(parameterized.TestCase):
    def assert_refused(self, record, *parts):
        with self.assertRaises(UserError) as caught:
            parse(record)
        for part in ("records[0]", *parts):
            self.assertIn(part, str(caught.exception))

    def test_every_spelling_of_a_call_is_one_form(self):
        text = json.dumps(_FUNCTION["arguments"])
        for calls in (
            [_CALL],
            [{"type": "function", "function": {"name": "tide", "arguments": text}}],
            [{"type": "function", "function": {"name": "tide", "arguments": json.dumps(text)}}],
            [{"type": "function", "function": {"name": "tide", "arguments": f" {text}\n"}}],
            [_FUNCTION],
            [{"name": "tide", "arguments": text}],
            [{"name": "tide", "parameters": _FUNCTION["arguments"]}],
            json.dumps([_CALL]),
            json.dumps([{"name": "tide", "arguments": text}]),
            [json.dumps(_CALL)],
        ):
            self.assertEqual(calls_of(with_calls(calls)), [_CALL], calls)
            self.assertEqual(parse(with_calls(calls)).messages[1].content, "")

    def test_call_of_openais_older_field_is_one_form(self):
        for call in (_FUNCTION, {**_FUNCTION, "arguments": json.dumps(_FUNCTION["arguments"])}, json.dumps(_FUNCTION)):
            self.assertEqual(calls_of(with_calls(None, function_call=call)), [_CALL])
        self.assert_refused(with_calls([_CALL], function_call=_FUNCTION), "both tool_calls and function_call", "Remove")

    def test_ids_and_other_keys_of_a_call_stay(self):
        call = {"id": "c1", "index": 0, **_CALL}
        self.assertEqual(calls_of(with_calls([call])), [call])
        self.assertEqual(calls_of(with_calls([{"id": "c1", **_FUNCTION}])), [{"id": "c1", **_CALL}])

    @parameterized.parameters(([],), ("",), (" ",), ("[]",), ("null",), (None,))
    def test_no_calls_are_none(self, calls):
        dialogue = parse({"messages": [{"role": "assistant", "content": "x", "tool_calls": calls}]})
        self.assertEqual(dialogue.messages[0].fields, {})
        self.assert_refused({"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}, "content None")

    @parameterized.parameters(
        (None,), ({},), ({"function": {"name": None, "arguments": None}},), ({"id": None, "function": None},)
    )
    def test_padding_is_no_call(self, padding):
        for calls, expected in (([padding], []), ([padding, _CALL, padding], [_CALL])):
            for given in (calls, json.dumps(calls)):
                messages = [{"role": "assistant", "content": "x", "tool_calls": given}]
                dialogue = parse({"messages": messages})
                self.assertEqual(dialogue.messages[0].fields.get("tool_calls", []), expected)
        function = padding and padding.get("function", padding)
        dialogue = parse({"messages": [{"role": "assistant", "content": "x", "function_call": function}]})
        self.assertEqual(dialogue.messages[0].fields, {})

    @parameterized.parameters("", " ", "{}", "null", None)
    def test_no_arguments_are_an_empty_object(self, arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        for calls in ([call], json.dumps([call])):
            self.assertEqual(calls_of(with_calls(calls)), [{"function": {"name": "f", "arguments": {}}}])

    @parameterized.parameters(([1, "é"], '[1, "é"]'), (3, "3"), (True, "true"))
    def test_arguments_that_are_no_object_are_text_as_if_given_as_text(self, value, text):
        calls = [calls_of(with_calls([{"function": {"name": "f", "arguments": one}}])) for one in (value, text)]
        self.assertEqual(calls, [[{"function": {"name": "f", "arguments": text}}]] * 2)

    @parameterized.parameters("print(1)", '{"a": ', "[1, 2]", "3", '"x"', "{'a': 1}")
    def test_arguments_that_are_no_json_object_stay_text(self, text):
        call = {"function": {"name": "f", "arguments": text}}
        self.assertEqual(calls_of(with_calls([call])), [call])

    def test_calls_that_are_none_are_refused(self):
        for calls, *parts in (
            ({"name": "f"}, "tool_calls is {'name': 'f'} (dict)", "needed a list"),
            (3, "tool_calls is 3 (int)", "needed a list"),
            ("[1", "tool_calls is text but not JSON", "column"),
            (["f"], "tool_calls[0] is text but not JSON"),
            ([_CALL, 3], "tool_calls[1] is 3 (int)", "needed a call"),
            ([{"type": "function"}], "tool_calls[0]", "needed a call"),
            ([{"function": "f"}], "tool_calls[0]", "needed a call"),
            ([{"function": {"arguments": {"a": 1}}}], "tool_calls[0]", "needed a call with a name"),
            ([{"function": {"name": 5, "arguments": {}}}], "tool_calls[0]", "needed a call with a name"),
            ([{"function": {"name": " "}}], "tool_calls[0]", "needed a call with a name"),
        ):
            self.assert_refused(with_calls(calls), "message 1 (assistant)", *parts, "Write")

    def test_sharegpt_calls_results_and_tools(self):
        for value in (
            _FUNCTION,
            json.dumps(_FUNCTION),
            json.dumps([_FUNCTION]),
            json.dumps({**_FUNCTION, "arguments": json.dumps(_FUNCTION["arguments"])}),
        ):
            record = {
                "conversations": [
                    {"from": "human", "value": "When?"},
                    {"from": "function_call", "value": value, "weight": 0.5},
                    {"from": "observation", "value": "6:10"},
                    {"from": "gpt", "value": "At ten past six."},
                ],
                "tools": json.dumps([_TOOL["function"]]),
                "system": "Be exact.",
            }
            dialogue = parse(record)
            self.assertEqual([m.role for m in dialogue.messages], ["system", "user", "assistant", "tool", "assistant"])
            self.assertEqual(
                dialogue.messages[2].as_dict(), {"role": "assistant", "content": "", "tool_calls": [_CALL]}
            )
            self.assertEqual([m.weight for m in dialogue.messages], [1, 1, 0.5, 1, 1])
            self.assertEqual(dialogue.messages[3].content, "6:10")
            self.assertEqual(dialogue.tools, (_TOOL,))
            self.assertEqual(dialogue.metadata, {})
        record = {"conversations": [{"from": "tool_call", "value": json.dumps(_FUNCTION)}]}
        self.assertEqual(calls_of(record), [_CALL])
        two = json.dumps([_FUNCTION, {"name": "g", "arguments": {}}])
        calls = calls_of({"conversations": [{"from": "function_call", "value": two}]})
        self.assertEqual([call["function"]["name"] for call in calls], ["tide", "g"])

    @parameterized.parameters("tide(Brest)", '{"name": "tide"', "3", "[]", "", '{"arguments": {}}', None)
    def test_function_call_that_is_no_call_is_refused_with_a_remedy(self, value):
        record = {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}]}
        self.assert_refused(record, "message 1 (assistant)", "value", "Write it")


class ToolsTest(CallsTest):
    def test_every_spelling_of_tools_is_one_form(self):
        text = {**_TOOL["function"], "parameters": json.dumps(_SCHEMA)}
        for tools in (
            [_TOOL],
            [_TOOL["function"]],
            [{"type": "function", **_TOOL["function"]}],
            [{"type": "function", "function": text}],
            [text],
            json.dumps([_TOOL]),
            json.dumps([text]),
        ):
            for key in ("tools", "functions"):
                dialogue = parse({"prompt": "a", "completion": "b", key: tools})
                self.assertEqual((dialogue.tools, dialogue.metadata), ((_TOOL,), {}))
        other = {"type": "code_interpreter", "name": "x"}
        self.assertEqual(parse({"prompt": "a", "completion": "b", "tools": [other]}).tools, (other,))

    def test_tools_and_functions_are_refused_unless_they_are_the_same(self):
        record = {"prompt": "a", "completion": "b", "tools": [_TOOL]}
        self.assertEqual(parse({**record, "functions": [_TOOL["function"]]}).tools, (_TOOL,))
        self.assert_refused({**record, "functions": [{"name": "g"}]}, "both tools and functions", "Remove")
        self.assert_refused(
            {**record, "tools": [{"name": "f", "parameters": "{"}]}, "tools[0]: parameters is text but not JSON"
        )


class NullsTest(absltest.TestCase):
    def test_nulls_of_objects_are_left_out_and_counted_and_those_of_json_text_stay(self):
        padded_tool = copy.deepcopy(_TOOL)
        padded_tool["strict"] = None
        padded_tool["function"]["parameters"]["properties"] = {
            "port": {"type": "string", "items": None, "enum": None},
            "day": None,
        }
        padded_call = {
            "id": None,
            "type": "function",
            "function": {"name": "tide", "arguments": {"port": "Brest", "day": None, "hours": [1, 2]}},
        }
        dialogue = parse({**with_calls([padded_call], name=None), "tools": [padded_tool], "note": None})
        self.assertEqual(dialogue.tools, (_TOOL,))
        self.assertEqual(dialogue.messages[1].fields, {"tool_calls": [_CALL]})
        self.assertEqual(dialogue.nulls, 4)
        text = {"function": {"name": "f", "arguments": '{"day": null, "x": [null]}'}}
        schema = '{"type": "object", "properties": {"day": {"default": null}}}'
        dialogue = parse({**with_calls([text]), "tools": [{"name": "f", "parameters": schema}]})
        self.assertEqual(
            dialogue.messages[1].fields["tool_calls"][0]["function"]["arguments"], {"day": None, "x": [None]}
        )
        self.assertEqual(dialogue.tools[0]["function"]["parameters"], json.loads(schema))
        self.assertEqual(dialogue.nulls, 0)
        self.assertEqual(
            calls_of(with_calls([{"name": "f", "arguments": {"x": [None, 1]}}]))[0]["function"]["arguments"],
            {"x": [None, 1]},
        )


def pad(value, keys):
    """The value with further null fields in every object."""
    if isinstance(value, dict):
        return {
            **{key: None for key in keys if key not in value},
            **{key: pad(entry, keys) for key, entry in value.items()},
        }
    if isinstance(value, list):
        return [pad(entry, keys) for entry in value]
    return value


class SpellingsLawTest(absltest.TestCase):
    @budget.cases(100)
    @hypothesis.given(
        arguments=st.dictionaries(
            st.text(max_size=3),
            st.recursive(
                st.one_of(st.text(max_size=3), st.integers(), st.booleans()),
                lambda inner: st.one_of(
                    st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)
                ),
                max_leaves=4,
            ),
            max_size=3,
        ),
        keys=st.lists(st.text(max_size=2), max_size=3),
    )
    def test_text_object_and_padded_object_are_one_value(self, arguments, keys):
        hypothesis.assume("\ud800" not in json.dumps(arguments))
        spellings = (
            [{"function": {"name": "f", "arguments": arguments}}],
            [{"function": {"name": "f", "arguments": pad(arguments, keys)}}],
            [{"function": {"name": "f", "arguments": json.dumps(arguments)}}],
            json.dumps([{"function": {"name": "f", "arguments": arguments}}]),
        )
        for calls in spellings:
            self.assertEqual(calls_of(with_calls(calls)), [{"function": {"name": "f", "arguments": arguments}}])


if __name__ == "__main__":
    absltest.main()
