"""What renderings lack of their messages, as literals."""

import json

from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.rendering.written import (
    ResponseLost,
    Unwritten,
    find_in_prompt,
    find_in_response,
    find_tools,
    find_unwritten,
    says_something,
)

_TIDE = {"port": "Brest", "hour": 4, "metric": True}
_TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": 'The "height"\nof the tide.',
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}, "hour": {"type": "integer"}}},
    },
}


def answer(content, *calls, **fields):
    """An assistant message with calls of (name, arguments)."""
    functions = [{"type": "function", "function": {"name": name, "arguments": values}} for name, values in calls]
    return Message(role="assistant", content=content, fields={"tool_calls": functions, **fields} if calls else fields)


def missing(message, response, **settings):
    return {one.kind: one.detail for one in find_in_response(message, 1, response, end="<|im_end|>", **settings)}


class ContentTest(parameterized.TestCase):
    @parameterized.parameters(
        "Two  words.\n\n- a\n- b<|im_end|>",
        "  Two words.\n- a\n- b\n<|im_end|>",
        "Two words. - a - b<|im_end|>",
        "Twowords.-a\r\n-b<|im_end|>",
    )
    def test_white_space_does_not_matter(self, response):
        self.assertEqual(missing(answer(" Two words.\n\n- a\n- b\n"), response), {})

    @parameterized.parameters(
        r"a \"b\" \\ é\nc",
        r"a \"b\" \\ \u00e9\nc",
        "a &#34;b&#34; \\ é\nc",
        "a &quot;b&quot; \\ é c",
        r"""a "b" \\ é\nc""",
    )
    def test_escapes_of_json_html_and_python_count_as_written(self, text):
        self.assertEqual(missing(answer('a "b" \\ é\nc'), text + "<|im_end|>"), {})

    def test_any_special_tokens_at_the_end_do_not_matter(self):
        self.assertEqual(missing(answer("Hello!"), "Hello!<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"), {})

    def test_what_the_prompt_already_has_of_the_content_counts_as_written(self):
        self.assertEqual(missing(answer("Answer: 42"), "42<|im_end|>", prompt="...\nAnswer: "), {})
        self.assertEqual(missing(answer("<think>\nAdd.</think>42"), "Add.</think>42", prompt="<think>\n"), {})
        with self.assertRaises(ResponseLost):  # the prompt has all of it
            missing(answer("42"), "<|im_end|>", prompt="user: 42\nassistant: ")

    def test_a_changed_content_is_named(self):
        self.assertEqual(missing(answer("Hello, Ann!"), "HELLO, ANN!<|im_end|>"), {"content": ""})
        self.assertEqual(missing(answer("The first part. The second."), "The first part.<|im_end|>"), {"content": ""})

    @parameterized.parameters("", " \n", "<think>\n\n</think>\n\n")
    def test_an_empty_message_says_nothing(self, content):
        self.assertEqual(missing(answer(content), "<|im_end|>"), {})
        self.assertFalse(says_something(answer(content)))
        self.assertTrue(says_something(answer(content, ("tide", {}))))
        self.assertTrue(says_something(answer(content, reasoning="Add.")))

    def test_a_response_without_its_content_is_an_error(self):
        with self.assertRaisesRegex(ResponseLost, r"its content; the response would be '<\|im_end\|>'.*=verbatim"):
            missing(answer("Hello!"), "<|im_end|>")


class ReasoningTest(parameterized.TestCase):
    @parameterized.parameters("reasoning_content", "reasoning", "thinking")
    def test_reasoning_of_each_field_is_looked_for(self, field):
        message = answer("42.", **{field: "\nSix times\nseven.\n"})
        self.assertEqual(missing(message, "42.<|eot_id|>"), {"reasoning": ""})
        self.assertEqual(missing(message, "<think>\nSix times\nseven.\n</think>\n\n42.<|eot_id|>"), {})

    @parameterized.parameters(
        "<think>\nSix times seven.\n</think>\n\n42.",
        "Six times seven.</think>42.",
        "[THINK]Six times seven.[/THINK]42.",
        "<think>Six times </think>42.<think>seven.</think>",
    )
    def test_reasoning_in_the_content_is_looked_for_apart_from_the_answer(self, content):
        self.assertEqual(missing(answer(content), "42.<|eot_id|>"), {"reasoning": ""})
        self.assertEqual(missing(answer(content), "Six times seven.<|eot_id|>"), {"content": ""})
        self.assertEqual(missing(answer(content), "<analysis> Six times  seven. <final> 42.<end>"), {})

    @parameterized.parameters("<think>42</think>It is 42.", "<think>It is 42</think>42")
    def test_reasoning_and_answer_that_share_words_are_each_looked_for(self, content):
        reasoning, text = content.removeprefix("<think>").split("</think>")
        for message in (answer(content), answer(text, reasoning_content=reasoning)):
            self.assertEqual(missing(message, text + "<|eot_id|>"), {"reasoning": ""})
            self.assertEqual(missing(message, f"<think>{reasoning}</think><|eot_id|>"), {"content": ""})
            self.assertEqual(missing(message, f"<think>{reasoning}</think>{text}<|eot_id|>"), {})

    def test_reasoning_alone_that_is_cut_is_an_error(self):
        with self.assertRaisesRegex(ResponseLost, "its reasoning;"):
            missing(answer("<think>Six times seven."), "<|im_end|>")


class CallsTest(parameterized.TestCase):
    @parameterized.parameters(
        '<tool_call>\n{"name": "tide", "arguments": {"port": "Brest", "hour": 4, "metric": true}}\n</tool_call>',
        "tide(port='Brest', hour=4, metric=True)",
        "<function=tide><parameter=hour>4</parameter><parameter=metric>true</parameter>Brest",
        r'{"name": "tide", "arguments": "{\"metric\": true, \"port\": \"Brest\", \"hour\": 4}"}',
    )
    def test_calls_of_several_formats_count_as_written(self, response):
        self.assertEqual(missing(answer("", ("tide", _TIDE)), response + "<|im_end|>"), {})

    @parameterized.parameters(
        ('tide("Brest", 4)', "argument 'metric' of call 'tide'"),
        ('tide("Brest", 4.5, true)', "argument 'hour' of call 'tide'"),
        ('tide("Brest", 14, true)', "argument 'hour' of call 'tide'"),
        ("tide()", "argument 'port' of call 'tide', argument 'hour' of call 'tide', argument 'metric' of call 'tide'"),
        ('call("Brest", 4, true)', "call 'tide'"),
    )
    def test_a_name_or_argument_that_is_missing_is_named(self, response, detail):
        message = answer("", ("tide", _TIDE))
        self.assertEqual(missing(message, response + "<|im_end|>"), {"tool_calls": detail})

    def test_nested_values_and_escaped_texts_are_looked_for(self):
        values = {"query": {"ports": ['Saint-"Malo"', "Brest"], "none": None}, "empty": ""}
        self.assertEqual(missing(answer("", ("tide", values)), r'tide({"ports": ["Saint-\"Malo\"", "Brest"]})'), {})
        self.assertEqual(
            missing(answer("", ("tide", values)), 'tide("Brest")'), {"tool_calls": "argument 'query' of call 'tide'"}
        )

    def test_each_of_several_calls_is_looked_for(self):
        message = answer("I look.", ("tide", _TIDE), ("wind", {}), ("rain", {"mm": 1}), ("sun", {}), ("sky", {}))
        self.assertEqual(
            missing(message, "I look. tide(Brest, 4, True)<|im_end|>"),
            {"tool_calls": "call 'wind', call 'rain', call 'sun', 1 more"},
        )
        self.assertEqual(
            missing(message, "tide(Brest, 4, True) wind() rain(1) sun() sky()"), {"content": ""}
        )  # as Llama 3.1 does

    @parameterized.parameters(
        ("Let me search for cats.", ("search", {"query": "cats"}), "call 'search'"),
        ("I will call get_weather for Paris.", ("get_weather", {"city": "Paris"}), "call 'get_weather'"),
        ("Checking status", ("status", {}), "call 'status'"),
        ("<think>Set flag to 5.</think>Done: 5.", ("set", {"flag": 5}), "call 'set'"),
        ("Two\n words: é", ("words", {"é": 2}), "call 'words'"),
    )
    def test_a_call_that_only_the_content_mentions_is_not_written(self, content, call, detail):
        message = answer(content, call)
        for text in (content, content.replace("\n", ""), json.dumps(content)[1:-1]):
            self.assertEqual(missing(message, text + "<|im_end|>"), {"tool_calls": detail})
            written = (
                f"{text}<call>{call[0]}({', '.join(f'{key}={value}' for key, value in call[1].items())})<|im_end|>"
            )
            self.assertEqual(missing(message, written), {})

    def test_a_call_that_only_a_field_of_reasoning_mentions_is_not_written(self):
        message = answer("", ("tide", {"port": "Brest"}), reasoning_content="The tide of Brest.")
        self.assertEqual(missing(message, "<think>The tide of Brest.</think>"), {"tool_calls": "call 'tide'"})

    @parameterized.parameters("Brest<call>say(Brest, now)", "<call>say(Brest, now)</call>Brest")
    def test_a_content_that_an_argument_repeats_is_written_before_or_after_it(self, response):
        self.assertEqual(missing(answer("Brest", ("say", {"text": "Brest, now"})), response), {})

    def test_of_two_calls_of_one_tool_each_needs_its_name(self):
        message = answer("", ("tide", {"port": "Brest"}), ("tide", {"port": "Bre"}))
        self.assertEqual(missing(message, "tide(Brest)"), {"tool_calls": "call 'tide'"})
        self.assertEqual(missing(message, "tide(Brest) tide(Bre)"), {})

    def test_arguments_that_are_text_are_looked_for(self):
        self.assertEqual(missing(answer("", ("run", "print(1)")), 'run("print(1)")'), {})
        self.assertEqual(missing(answer("", ("run", "print(1)")), "run()"), {"tool_calls": "arguments of call 'run'"})

    @parameterized.parameters("<|im_end|>", "\n<|im_end|>", "[a call]<|im_end|>")
    def test_calls_of_which_nothing_is_written_are_an_error(self, response):
        with self.assertRaisesRegex(ResponseLost, r"its tool_calls \(call 'tide'\); .*that writes tool calls.*=skip"):
            missing(answer("", ("tide", _TIDE)), response)

    def test_names_that_the_end_of_a_turn_has_do_not_count(self):
        with self.assertRaises(ResponseLost):
            missing(answer("", ("end", {"of": "im"})), "<|im_end|>")


class PromptTest(parameterized.TestCase):
    @parameterized.parameters(
        ('{"height": 3.5, "at": ["6:10"]}', True),
        ('{"at":["6:10"],"height":3.5}', True),
        ("{'height': 3.5, 'at': ['6:10']}", True),
        (r'"{\"height\": 3.5, \"at\": [\"6:10\"]}"', True),
        ("height: 3.5\nat: 6:10", True),
        ('{"height": 3.5}', False),
        ('{"height": 13.5, "at": ["6:10"]}', False),
        ("", False),
    )
    def test_tool_results_are_looked_for_in_any_spelling(self, text, is_written):
        messages = [Message(role="tool", content='{"height": 3.5, "at": ["6:10"]}'), answer("Never looked for.")]
        expected = [] if is_written else [Unwritten("message", 0, "tool")]
        self.assertEqual(find_in_prompt(messages, range(2), f"<tool>{text}<end>"), expected)

    @parameterized.parameters(
        ("ok", "ok"), ("ok", '{"state": "ok"}'), ('{"state": "ok"}', "ok"), ("the state", '{"state": "ok"}')
    )
    def test_a_message_that_only_another_contains_is_not_written(self, asked, result):
        messages = [
            Message(role="user", content=f"Book it, {asked}?"),
            answer("<think>Is ok a state?</think>Booking."),
            Message(role="tool", content=result),
        ]
        for history in ("Booking.", messages[1].content):
            prompt = f"<user>{messages[0].content}<end>{history}<end>"
            self.assertEqual(find_in_prompt(messages, range(3), prompt), [Unwritten("message", 2, "tool")])
            self.assertEqual(find_in_prompt(messages, range(3), f"{prompt}<tool>{result}<end>"), [])
            self.assertEqual(find_in_prompt(messages, range(3), f"<tool>{result}<end>{prompt}"), [])

    def test_each_of_equal_messages_is_looked_for(self):
        messages = [Message(role="tool", content="ok")] * 3
        self.assertEqual(find_in_prompt(messages, range(3), "ok ok ok"), [])
        self.assertLen(find_in_prompt(messages, range(3), "ok ok"), 3)

    def test_nesting_deeper_than_python_reads_is_no_error(self):
        for depth in (900, 100_000):
            messages = [Message(role="tool", content="[" * depth + "1" + "]" * depth)]
            self.assertEqual(find_in_prompt(messages, range(1), "?"), [Unwritten("message", 0, "tool")])

    def test_only_the_messages_asked_for_are_looked_for(self):
        messages = [Message(role="system", content="a"), Message(role="user", content="b")]
        self.assertEqual(find_in_prompt(messages, range(1, 2), "?"), [Unwritten("message", 1, "user")])

    @parameterized.parameters(
        (r'{"name": "tide", "description": "The \"height\"\nof the tide.", "properties": {"hour": 1, "port": 2}}', ""),
        ('// The "height"\n// of the tide.\ntype tide = (_: {port: string, hour: number})', ""),
        ("type tide = (_: {port: string, hour: number})", "description of tool 'tide'"),
        ('def tide(port: str):\n    """The "height"\n    of the tide."""', "parameter 'hour' of tool 'tide'"),
        ("You answer briefly.", "tool 'tide'"),
    )
    def test_tools_are_looked_for_with_descriptions_and_parameters(self, prompt, detail):
        self.assertEqual(find_tools([_TOOL], prompt), [Unwritten("tools", -1, detail)] if detail else [])

    def test_a_tool_that_only_messages_mention_is_not_written(self):
        tool = {"name": "search", "description": "Finds pages.", "parameters": {"properties": {"query": {}}}}
        for role, content, is_written in (
            ("user", "Find pages: search with a query. Finds pages.", False),
            ("system", "search(query): Finds pages.", True),  # as the remedy says
            ("system", "You search.", False),
        ):
            dialogue = Dialogue(id=0, messages=(Message(role=role, content=content), answer("No.")), tools=(tool,))
            for reads_tools in (True, False):
                settings = {
                    "prompt": f"<{role}>{content}<end>",
                    "response": "No.",
                    "end": "",
                    "reads_tools": reads_tools,
                }
                kinds = {one.kind for one in find_unwritten(dialogue, 1, 0, **settings)}
                self.assertEqual(kinds, set() if is_written else {"tools"})

    def test_a_tool_whose_name_the_template_has_anyway_is_not_written(self):
        dialogue = Dialogue(
            id=0, messages=(Message(role="user", content="Hi"), answer("No.")), tools=({"name": "user"},)
        )
        settings = {"prompt": "<user>Hi<end>", "response": "No.", "end": ""}
        self.assertLen(find_unwritten(dialogue, 1, 0, reads_tools=False, **settings), 1)


if __name__ == "__main__":
    absltest.main()
