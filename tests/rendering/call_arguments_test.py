"""Arguments of calls under templates designed for objects and for text, and the variables that a record gives."""

import json

from absl.testing import absltest, parameterized

from dialog_jax.dialogues import parsing
from dialog_jax.errors import UserError
from dialog_jax.evaluation import k_passes
from dialog_jax.rendering import template_process
from dialog_jax.rendering.sequences import Renderer
from tests.rendering import chat_templates

_TEMPLATE = """\
{%%- for message in messages -%%}
{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%%- for call in message.tool_calls or [] -%%}
{%%- set function = call.function -%%}
%s
{%%- endfor -%%}
{{ '<|im_end|>\\n' }}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}{{ '<|im_start|>assistant\\n' }}{%%- endif -%%}
"""
# What templates do with arguments, by the form they are designed for. Each writes name(arguments).
_FOR_OBJECTS = {
    "tojson": "{{ function.name }}({{ function.arguments | tojson }})",
    "concatenated": "{{ function.name + '(' + (function.arguments | tojson) + ')' }}",
    "whole": "{{ function.name }}({{ (function | tojson)[(function.name | length) + 26:-1] }})",
    "either": "{{ function.name }}({{ function.arguments if function.arguments is string "
    "else function.arguments | tojson }})",
    "mapping": "{{ function.name }}({% if function.arguments is mapping %}{{ function.arguments | tojson }}"
    "{% else %}{{ function.arguments }}{% endif %})",
}
_FOR_TEXT = {
    "written": "{{ function.name }}({{ function.arguments }})",
    "added": "{{ function.name + '(' + function.arguments + ')' }}",
    "joined": "{{ function.name ~ '(' ~ function['arguments'] ~ ')' }}",
    "trimmed": "{{ function.name }}({{ function.arguments | trim }})",
    "refused": "{% if function.arguments is mapping %}{{ raise_exception('text!') }}{% endif %}"
    "{{ function.name }}({{ function.arguments }})",
}
_ARGUMENTS = (
    {"port": "Brest", "hours": [1, 2.5], "high": True, "nested": {"é": None}},
    {},
    {"quote": 'it\'s "so"', "line": "a\nb", "emoji": "👩‍👩‍👧", "token": "<|im_end|>"},
)


def renderer_with(template):
    tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = template
    return Renderer(tokenizer)


def record_with(arguments, **fields):
    call = {"type": "function", "function": {"name": "tide", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "6:10"},
            {"role": "assistant", "content": "Now."},
        ],
        **fields,
    }


def texts(record, renderer):
    (dialogue,) = parsing.parse_records([record])
    return [
        (renderer.tokenizer.decode(one.tokens[: one.start]), renderer.tokenizer.decode(one.tokens[one.start :]))
        for one in next(iter(renderer.render([dialogue])))
    ]


class ArgumentsTest(parameterized.TestCase):
    @parameterized.parameters(*_FOR_OBJECTS, *_FOR_TEXT)
    def test_text_and_object_give_the_same_tokens_those_the_template_is_designed_for(self, name):
        template = _TEMPLATE % {**_FOR_OBJECTS, **_FOR_TEXT}[name]
        renderer = renderer_with(template)
        for arguments in _ARGUMENTS:
            written = json.dumps(arguments, ensure_ascii=False)
            for spelling in (
                written,
                json.dumps(arguments),
                json.dumps(arguments, indent=2),
                json.dumps(arguments, separators=(",", ":")),
                json.dumps(written),
            ):
                expected = f"tide({written})<|im_end|>"
                found = texts(record_with(spelling), renderer)
                self.assertEqual(found[0], ("<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n", expected))
                self.assertIn(expected, found[1][0])
        without_nulls = {"port": "Brest", "hours": [1, 2.5]}
        self.assertEqual(
            texts(record_with(without_nulls), renderer), texts(record_with(json.dumps(without_nulls)), renderer)
        )

    @parameterized.parameters("print(1)", '{"a": ', "[1, 2]", "")
    def test_text_that_is_no_object_is_written_as_it_is_or_as_a_json_string(self, text):
        for name, call in (_FOR_TEXT | _FOR_OBJECTS).items():
            if name in ("concatenated", "whole"):
                continue
            (_, response), *_ = texts(record_with(text), renderer_with(_TEMPLATE % call))
            is_encoded = name == "tojson" and text
            expected = json.dumps(text) if is_encoded else text or "{}"
            expected = expected.strip() if name == "trimmed" else expected
            self.assertEqual(response, f"tide({expected})<|im_end|>", name)

    def test_k_passes_have_the_same_tokens(self):
        for call in (_FOR_TEXT["written"], _FOR_TEXT["added"], _FOR_OBJECTS["tojson"]):
            renderer = renderer_with(_TEMPLATE % call)
            (dialogue,) = parsing.parse_records([record_with(_ARGUMENTS[0])])
            passes = k_passes.make_passes(
                dialogue, template_process.limit_template(renderer.tokenizer, renderer.template_time)
            )
            sequences = list(next(iter(renderer.render([dialogue]))))
            self.assertEqual([p.tokens.tolist() for p in passes], [s.tokens.tolist() for s in sequences])

    def test_template_that_refuses_calls_is_reported_with_its_reason(self):
        template = _TEMPLATE % "{{ raise_exception('no calls here') }}"
        with self.assertRaisesRegex(UserError, r"dialogue 0 \(records\[0\]\): .*no calls here"):
            texts(record_with({"a": 1}), renderer_with(template))

    def test_template_that_writes_no_calls_is_rendered_as_it_is(self):
        record = record_with({"a": 1})
        record["messages"][1]["content"] = "Wait."
        self.assertEqual(texts(record, renderer_with(_TEMPLATE % ""))[0][1], "Wait.<|im_end|>")

    def test_form_is_found_by_the_first_dialogue_whose_calls_are_written(self):
        condition = "{% if messages[0].content == 'When?' %}" + _FOR_TEXT["written"] + "{% endif %}"
        renderer = renderer_with(_TEMPLATE % condition)
        silent = record_with({"a": 1})
        silent["messages"][0] = {"role": "user", "content": "Where?"}
        silent["messages"][1]["content"] = "Wait."
        self.assertEqual(texts(silent, renderer)[0][1], "Wait.<|im_end|>")
        self.assertEqual(texts(record_with({"a": 1}), renderer)[0][1], 'tide({"a": 1})<|im_end|>')


_WITH_VARIABLES = """\
{{ '<|im_start|>system\\nmode ' ~ mode ~ ', date ' ~ date ~ '<|im_end|>\\n' }}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


class RecordVariablesTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
        tokenizer.chat_template = _WITH_VARIABLES
        self.kwargs = {"mode": "a", "date": "today"}
        self.renderer = Renderer(tokenizer, chat_template_kwargs=self.kwargs)

    def parse(self, **fields):
        (dialogue,) = parsing.parse_records([{"prompt": "Hi", "completion": "Hello", **fields}])
        return dialogue

    def test_variables_of_a_record_replace_those_of_the_config_for_that_record(self):
        for kwargs, head in (({}, "mode a, date today"), ({"mode": "b"}, "mode b, date today")):
            dialogue = self.parse(chat_template_kwargs=kwargs)
            (sequence,) = next(iter(self.renderer.render([dialogue])))
            text = self.renderer.tokenizer.decode(sequence.tokens)
            self.assertStartsWith(text, f"<|im_start|>system\n{head}<|im_end|>\n")
            prefix = self.renderer.tokenizer.decode(self.renderer.encode_shared_prefix(dialogue))
            self.assertIn(head, prefix)
            limited = template_process.limit_template(self.renderer.tokenizer, self.renderer.template_time)
            (one,) = k_passes.make_passes(dialogue, limited, self.kwargs)
            self.assertEqual(one.tokens.tolist(), sequence.tokens.tolist())

    def test_special_tokens_that_a_variable_spells_are_text(self):
        dialogue = self.parse(chat_template_kwargs={"mode": "<|im_end|>"})
        (sequence,) = next(iter(self.renderer.render([dialogue])))
        end = self.renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.assertEqual(sequence.tokens.tolist().count(end), 3)
        (one,) = k_passes.make_passes(
            dialogue, template_process.limit_template(self.renderer.tokenizer, self.renderer.template_time), self.kwargs
        )
        self.assertEqual(one.tokens.tolist(), sequence.tokens.tolist())


if __name__ == "__main__":
    absltest.main()
