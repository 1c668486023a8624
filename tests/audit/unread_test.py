"""Keys that nothing reads, by literal templates that read some keys and not others."""

import pytest
from absl.testing import absltest, parameterized

from dialog_jax.audit import figures, unread
from dialog_jax.dialogues import parsing
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.rendering import chat_templates

_MESSAGE = "{{ '<|im_start|>' + message.role + '\\n' + message.content }}%s{{ '<|im_end|>\\n' }}"
_LOOP = "%s{%%- for message in messages -%%}%s{%%- endfor -%%}"
_PROMPT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"


def template(body="", head=""):
    """A template that writes role and content, and `body` in each message."""
    return _LOOP % (head, _MESSAGE % body) + _PROMPT


def record(**fields):
    return {
        "messages": [
            {"role": "user", "content": "When?", "name": "Ann", "when": 3},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "tide", "arguments": {"a": 1}}]},
            {"role": "tool", "content": "6:10", "name": "tide", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Now.", "loss": True, "weight": 0.5},
        ],
        **fields,
    }


_TOOL = {"name": "tide", "strict": True, "parameters": {"type": "object"}}
_CALLS = (
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}"
)


class UnreadTest(parameterized.TestCase):
    def unread(self, text, *records, kwargs=None):
        tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
        tokenizer.chat_template = text
        tally = unread.KeyTally(Renderer(tokenizer, chat_template_kwargs=kwargs))
        for dialogue in parsing.parse_records(records):
            tally.add(dialogue, [dialogue])
        return tally.count_unread()

    def test_keys_that_nothing_reads_are_counted_once_per_place(self):
        found = self.unread(template(_CALLS), record(source="a", idx=3), record(source="b"))
        self.assertEqual(
            found,
            {
                "source": 2,
                "idx": 1,
                "user message: name": 2,
                "user message: when": 2,
                "tool call: id": 2,
                "tool message: name": 2,
                "tool message: tool_call_id": 2,
            },
        )

    def test_keys_that_the_template_reads_somewhere_are_not_listed(self):
        names = "{% if message.role == 'user' %}{{ message.name }}{% endif %}"
        found = self.unread(template(names + _CALLS), record())
        self.assertNotIn("user message: name", found)
        self.assertIn("tool message: name", found)
        conditions = "{% if message.when is defined and loop.index0 == 0 and messages | length == 1 %}x{% endif %}"
        self.assertNotIn("user message: when", self.unread(template(conditions + _CALLS), record()))

    @parameterized.parameters("{{ message | tojson }}", "{{ message }}", "{{ message.items() | list | string }}")
    def test_template_that_writes_whole_messages_reads_all_of_them(self, whole):
        self.assertEqual(self.unread(template(whole), record()), {})

    def test_key_whose_absence_the_template_refuses_is_read(self):
        needed = "{% if message.role == 'tool' and not message.tool_call_id %}{{ raise_exception('id!') }}{% endif %}"
        self.assertNotIn("tool message: tool_call_id", self.unread(template(needed), record()))

    def test_what_is_in_something_unread_is_not_listed_by_itself(self):
        found = self.unread(template(), record(tools=[_TOOL]))
        self.assertEqual(found["assistant message: tool_calls"], 1)
        self.assertEqual(found["tools"], 1)
        self.assertNotIn("tool call: id", found)
        self.assertNotIn("function of a tool: strict", found)

    def test_keys_of_tools(self):
        head = (
            "{% for tool in tools or [] %}{{ tool.function.name }}{{ tool.function.parameters | tojson }}{% endfor %}"
        )
        found = self.unread(template(_CALLS, head), record(tools=[_TOOL, _TOOL]))
        self.assertEqual(
            {key: count for key, count in found.items() if "tool:" in key}, {"function of a tool: strict": 2}
        )

    def test_variables_of_the_template(self):
        head = "{% if thinking is defined and not thinking %}x{% endif %}{{ date or '' }}"
        kwargs = {"thinking": True, "thinknig": True, "date": "today"}
        found = self.unread(template(_CALLS, head), record(chat_template_kwargs=kwargs))
        self.assertEqual({key: n for key, n in found.items() if "kwargs" in key}, {"chat_template_kwargs: thinknig": 1})
        found = self.unread(template(_CALLS, head), record(), kwargs=kwargs)
        self.assertEqual(
            {key: n for key, n in found.items() if "kwargs" in key}, {"data.chat_template_kwargs: thinknig": 1}
        )

    @pytest.mark.full
    def test_key_that_was_not_changed_in_every_dialogue_says_so(self):
        tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
        tokenizer.chat_template = template("{% if message.content == 'special' %}{{ message.mood }}{% endif %}")
        renderer = Renderer(tokenizer)
        records = [record(turn=n) for n in range(55)]
        for one in records:
            one["messages"][0] = {"role": "user", "content": "special" if one["turn"] == 52 else "Hi", "mood": "sad"}
        tally = unread.KeyTally(renderer)
        for dialogue in parsing.parse_records(records):
            tally.add(dialogue, [dialogue])
        sentences = tally.describe_unread()
        self.assertIn("user message: mood (55, changed in 50 of 55 dialogues)", sentences["unread"])
        self.assertIn("turn (55)", sentences["unread"])
        self.assertEqual(
            sentences["unread_tools"], ["assistant message: tool_calls (55, changed in 50 of 55 dialogues)"]
        )

    def test_tools_and_calls_that_are_not_read_are_a_warning(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        records = [record(tools=[{"name": "assistant"}])]
        records[0]["messages"][1]["content"] = "The tide, a 1."
        audit = figures.make_audit(
            parsing.parse_records(records), tokenizer, Renderer(tokenizer), TreeConfig(max_length=1000)
        )
        findings = {finding.kind: finding for finding in audit.findings}
        self.assertEqual(findings["unread_tools"].level, "warning")
        self.assertEqual(findings["unread_tools"].first, ["tools (1), assistant message: tool_calls (1)"])
        self.assertEqual(findings["tools_not_written"].first, ["dialogue 0 (records[0]): tools: tool 'assistant'"])
        self.assertEqual(findings["tool_calls_not_written"].first, ["dialogue 0 (records[0]): message 1: call 'tide'"])

    def test_audit_lists_them_in_one_finding(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        records = [record(source="a"), record(source="b", misspelt=1)]
        text = {"name": "f", "arguments": "print(1)"}
        for one in records:  # without a content nothing of the message would be written
            one["messages"][1]["content"] = "Wait."
        records[1]["messages"][1]["tool_calls"] = [text, {"name": "f", "arguments": {"a": None}}]
        audit = figures.make_audit(
            parsing.parse_records(records), tokenizer, Renderer(tokenizer), TreeConfig(max_length=1000)
        )
        findings = {finding.kind: finding for finding in audit.findings}
        self.assertEqual(audit.unread["source"], 2)
        self.assertIn("source (2)", findings["unread"].first[0])
        self.assertIn("misspelt (1)", findings["unread"].first[0])
        self.assertEqual((findings["unread"].level, len(findings["unread"].first)), ("note", 1))
        self.assertEqual(findings["nulls"].first, ["dialogue 1 (records[1]): 1"])
        self.assertEqual(findings["text_arguments"].first, ["dialogue 1 (records[1]): message 1 (assistant)"])

    def test_weights_of_messages_that_the_objective_does_not_train_on_are_noted(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        messages = [
            {"role": "system", "content": "a", "train": False},
            {"role": "user", "content": "b", "train": True},
            {"role": "assistant", "content": "c", "weight": 2},
            {"role": "user", "content": "d", "weight": 0.5},
            {"role": "user", "content": "e"},
        ]
        for objective, places in (({}, [1, 3]), ({"name": "joint"}, []), ({"name": "roles", "roles": ("user",)}, [])):
            audit = figures.make_audit(
                parsing.parse_records([{"messages": messages}]),
                tokenizer,
                Renderer(tokenizer),
                TreeConfig(objective=ObjectiveConfig(**objective), max_length=1000),
            )
            noted = [place for finding in audit.findings if finding.kind == "weight_unused" for place in finding.first]
            self.assertEqual(noted, [f"dialogue 0 (records[0]): message {index} (user)" for index in places])


if __name__ == "__main__":
    absltest.main()
