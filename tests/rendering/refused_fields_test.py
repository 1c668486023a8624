"""Errors of a chat template: reason, line, field and remedy, for deliberate refusals and for errors in the template."""

from absl.testing import absltest, parameterized

from dialog_jax.dialogues import parsing
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from tests.rendering import chat_templates

_TEMPLATE = """\
{%%- for message in messages -%%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%%- if message.role == 'assistant' and message.content != 'Qx7 zebra' -%%}
%s
{%%- endif -%%}
{{ message.content + '<|im_end|>\\n' }}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}{{ '<|im_start|>assistant\\n' }}{%%- endif -%%}
"""
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


# fmt: off
_CASES = (
    ("wrong_type", "{{ message.prefix + 'x' if message.prefix }}", {"prefix": 3},
     r"unsupported operand .* \(TypeError at line 4 of the template: \{\{ message\.prefix \+",
     "without prefix in message 1"),
    ("undefined", "{% if message.tool_calls %}{{ message.title.text }}{% endif %}", {"tool_calls": [_CALL]},
     r"has no attribute 'title' \(UndefinedError at line 4 of the template: ", "without tool_calls in message 1"),
    ("refused", "{% if message.tool_calls %}{{ raise_exception('No calls!') }}{% endif %}", {"tool_calls": [_CALL]},
     r"\(user, assistant\): No calls!\. It accepts", "without tool_calls in message 1"),
    ("not_json", "{{ message.other | tojson }}", {}, r"not JSON serializable \(TypeError at line 4", ""),
    ("content", "{{ raise_exception('Empty') if not message.content.strip() and not add_generation_prompt }}", {},
     r": Empty\.", "with another content in message 1"),
    ("index", "{{ message.tool_calls[3].function.name if message.tool_calls }}", {"tool_calls": [_CALL]},
     r"UndefinedError at line 4", "without tool_calls in message 1"),
    ("division", "{{ 1 / message.zero if message.zero is defined }}", {"zero": 0},
     r"division by zero \(ZeroDivisionError at line 4", "without zero in message 1"),
    ("security", "{{ message.__class__.__mro__ }}", {}, r"SecurityError at line 4", ""),
    ("kwargs", "{{ raise_exception('mode?') if mode is defined and mode != 'a' }}",
     {"chat_template_kwargs": {"mode": "b"}}, r": mode\?\.", "without mode in chat_template_kwargs"),
    ("tools", "{{ raise_exception('tools?') if tools }}", {"tools": [{"name": "f"}]}, r": tools\?\.", "without tools"),
)
# fmt: on


class RefusedFieldsTest(parameterized.TestCase):
    @parameterized.named_parameters(*_CASES)
    def test_error_has_dialogue_reason_line_field_and_remedy(self, code, fields, reason, change):
        tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
        tokenizer.chat_template = _TEMPLATE % code
        record_fields = {key: fields.pop(key) for key in ("tools", "chat_template_kwargs") if key in fields}
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", **fields}]
        (dialogue,) = parsing.parse_records([{"messages": messages, **record_fields}], source="x.jsonl")
        with self.assertRaises(UserError) as caught:
            for sequences in Renderer(tokenizer).render([dialogue]):
                list(sequences)
        message = str(caught.exception)
        self.assertStartsWith(message, "dialogue 0 (x.jsonl[0]): the chat template refuses its first 2 messages")
        self.assertRegex(message, reason)
        self.assertIn("pass another chat template", message)
        self.assertIn("data.on_error=skip", message)
        self.assertNotIn("Traceback", message)
        if change:
            self.assertIn(f"It accepts them {change}; change the dialogue", message)


if __name__ == "__main__":
    absltest.main()
