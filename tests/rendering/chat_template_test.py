"""Texts of a dialogue's turns against the tokenizer's own `apply_chat_template`, called for each of them."""

import copy
import datetime
import pickle
import re
from unittest import mock

import jinja2
import numpy as np
from absl.testing import absltest, parameterized
from jinja2 import sandbox
from transformers.utils import chat_template_utils

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.rendering import chat_template, sequences, template_rendering
from dialog_jax.rendering.template_rendering import Job
from tests.rendering import chat_templates

# What published templates do and those of the seven families do not: macros and settings inside the template, defaults
# for variables that are missing, a namespace, a generation block, comments, white space at both ends.
_ELABORATE = """\

  {% if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
  {#- who speaks #}
{%- macro header(role) -%}
{{ '<|im_start|>' + role + '\\n' }}{% if add_generation_prompt %}{{ '(to be answered)' }}{% endif %}
{%- endmacro -%}
{%- set count = namespace(value=0) -%}
{%- if messages[0].role == 'system' %}{% set rules = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{{ header('system') + 'Today is ' + date_string + ' of ' ~ messages | length }}{{ rules }}
{% for message in messages %}
{%- set count.value = count.value + 1 %}
    {% generation %}{{ header(message['role']) + message['content'] | trim }} #{{ count.value }}{% endgeneration %}

  {% endfor %}
{{ tools | tojson if tools }}
  {% if add_generation_prompt %}
{{ header('assistant') }}
  {%- endif %}
"""
# As in Llama 3.2: the date of today.
_CLOCK = """\
{%- if strftime_now is defined %}{% set today = strftime_now("%d %b %Y %H:%M") %}{% endif -%}
{%- macro one(message) %}{{ strftime_now("%Y") }} {{ message.role }}: {{ message.content }}|{% endmacro -%}
{{ today }}|{% for message in messages %}{{ one(message) }}{% endfor %}
{%- if add_generation_prompt %}{{ "assistant:" }}{% endif %}
"""
_TEMPLATES = {
    **chat_templates.TEMPLATES,
    "elaborate": _ELABORATE,
    "elaborate, then white space": _ELABORATE + "\n  \t",
    "elaborate, then a line": _ELABORATE + "100 %s of it\n\n",
    "elaborate, then a block": _ELABORATE.rstrip(),
}


def with_template(template):
    tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = template
    return tokenizer


class SandboxTest(parameterized.TestCase):
    @parameterized.parameters(
        "m.content", "m.items", "m.missing", "m['content'].startswith('H')", "m.content.format", "m.__class__", "m.pop",
        "'{0.__class__}'.format(m)", "[].append", "[].append(1)", "''.__class__.__mro__", "messages.append(m)",
        "m.update({'a': 1})", "m.content.__class__", "ns.__init__", "ns.x", "ns.y", "ns.x.upper()", "joiner('-')",
        "loop.index0", "loop.__class__", "raise_exception.__globals__", "m.clear()", "m.empty", "m.empty.x",
        "m['get']('content')", "m.get('content')", "m | attr('content')", "m | attr('pop')", "cycler.__init__",
    )  # fmt: skip
    def test_an_expression_gives_what_an_unchanged_sandbox_gives(self, expression):
        template = (
            "{% set ns = namespace(x='a') %}{% for m in messages %}[{{ " + expression + " }}]"
            "{{ (" + expression + ") is defined }}{% endfor %}"
        )
        messages = [{"role": "user", "content": "Hi", "empty": "", "items": 3}] * 2
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= chat_template_utils._cached_compile_jinja_template("").environment.globals
        expected = []
        for count in (1, 2):
            try:
                expected.append(environment.from_string(template).render(messages=messages[:count]))
            except (jinja2.TemplateError, TypeError, ValueError):
                break
        rendering = template_rendering.render_jobs(
            template, messages, [Job(1), Job(2), Job(2)][: len(expected) + 1], {}
        )
        number = re.compile("0x[0-9a-f]+")  # an address
        self.assertEqual(
            [number.sub("", text) for text in rendering.texts[:2]], [number.sub("", text) for text in expected]
        )
        self.assertEqual(bool(rendering.refusal), len(expected) < 2)


class TurnsTest(parameterized.TestCase):
    def expected(self, tokenizer, dialogue, **kwargs):
        messages = [message.as_dict() for message in dialogue.messages]
        tools = list(dialogue.tools) if dialogue.tools else None
        return [
            (
                k,
                tokenizer.apply_chat_template(
                    messages[:k], tools=tools, tokenize=False, add_generation_prompt=True, **kwargs
                ),
                tokenizer.apply_chat_template(messages[: k + 1], tools=tools, tokenize=False, **kwargs),
            )
            for k, message in enumerate(dialogue.messages)
            if message.role == "assistant" and message.weight > 0
        ]

    @parameterized.parameters(*_TEMPLATES)
    def test_turns_rendered_together_are_those_rendered_alone(self, name):
        tokenizer = with_template(_TEMPLATES[name])
        rng = np.random.default_rng(0)
        for kwargs in ({}, {"date_string": "today", "enable_thinking": False}):
            template = chat_template.ChatTemplate(tokenizer, kwargs)
            for turns in (1, 4, 5, 9):
                system = name not in ("gemma",) and turns != 4
                dialogue = chat_templates.random_dialogue(rng, turns=turns, system=system, reasoning=True, weights=True)
                self.assertEqual(list(template.turns(dialogue)), self.expected(tokenizer, dialogue, **kwargs))

    @parameterized.parameters(*_TEMPLATES)
    def test_several_texts_are_rendered_by_one_call(self, name):
        jobs, tokens = [Job(1), Job(1, True), Job(2)], {"bos_token": "<s>", "eos_token": "</s>"}
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        expected = template_rendering.render_jobs(_TEMPLATES[name], messages, jobs, tokens)  # which compares them
        with mock.patch.object(template_rendering, "_apply", wraps=template_rendering._apply) as apply:
            self.assertEqual(template_rendering.render_jobs(_TEMPLATES[name], messages, jobs, tokens), expected)
        apply.assert_called_once()

    def test_tools_and_fields_reach_the_template(self):
        tokenizer = with_template(_TEMPLATES["elaborate"])
        dialogue = Dialogue(
            id=0,
            messages=(Message(role="user", content="a"), Message(role="assistant", content="b")),
            tools=({"type": "function", "function": {"name": "é<"}},),
        )
        ((_, prompt, _),) = chat_template.ChatTemplate(tokenizer).turns(dialogue)
        self.assertIn('"é<"', prompt)
        self.assertEqual(
            list(chat_template.ChatTemplate(tokenizer).turns(dialogue)), self.expected(tokenizer, dialogue)
        )

    def test_a_later_turn_that_is_refused_leaves_the_earlier_ones(self):
        messages = [Message(role="user", content="a"), Message(role="assistant", content="b")]
        dialogue = Dialogue(id=7, messages=(*messages, *messages, messages[1]), where="a.jsonl:8")
        turns = chat_template.ChatTemplate(with_template(_TEMPLATES["gemma"])).turns(dialogue)
        self.assertEqual([next(turns)[0], next(turns)[0]], [1, 3])
        with self.assertRaisesRegex(ValueError, r"dialogue 7 \(a.jsonl:8\): the chat template refuses its first 5"):
            next(turns)

    def test_a_template_that_renders_otherwise_in_a_macro_is_rendered_alone(self):
        # A macro has the special name `varargs`, which is undefined outside.
        tokenizer = with_template("{{ varargs is defined }}" + _TEMPLATES["chatml"])
        dialogue = chat_templates.random_dialogue(np.random.default_rng(0), turns=6)
        template = chat_template.ChatTemplate(tokenizer)
        for _ in range(2):
            self.assertEqual(list(template.turns(dialogue)), self.expected(tokenizer, dialogue))

    def test_the_mark_between_turns_may_stand_in_a_message(self):
        tokenizer = with_template(_TEMPLATES["chatml"])
        messages = [Message(role="user", content=template_rendering._MARK), Message(role="assistant", content="b")]
        dialogue = Dialogue(id=0, messages=(*messages, *messages))
        template = chat_template.ChatTemplate(tokenizer)
        for shown in (chat_templates.random_dialogue(np.random.default_rng(0), turns=1), dialogue):
            self.assertEqual(list(template.turns(shown)), self.expected(tokenizer, shown))


class ClockTest(parameterized.TestCase):
    def make_renderer(self, template, **options):
        tokenizer = copy.copy(chat_templates.train_tokenizer("chatml"))
        tokenizer.chat_template = template
        return sequences.Renderer(tokenizer, **options)

    def render(self, renderer):
        messages = (Message(role="user", content="Hi"), Message(role="assistant", content="Hello"))
        return renderer.render_text(Dialogue(id=0, messages=messages), 2)

    @parameterized.parameters(
        ("2026-07-01T13:05:59", "01 Jul 2026 13:05|2026 user: Hi|2026 assistant: Hello|"),
        ("2031-01-09", "09 Jan 2031 00:00|2031 user: Hi|2031 assistant: Hello|"),
    )
    def test_time_of_the_template_is_the_one_that_is_set(self, time, expected):
        renderer = self.make_renderer(_CLOCK, template_time=time)
        self.assertEqual(self.render(renderer), expected)
        self.assertEqual(self.render(pickle.loads(pickle.dumps(renderer))), expected)
        self.assertEqual(renderer.template_time, time)

    def test_time_is_that_of_the_renderer_s_start_in_all_processes(self):
        before = datetime.datetime.now().replace(microsecond=0)
        renderer = self.make_renderer(_CLOCK.replace("%M", "%M:%S"))
        after = datetime.datetime.now()
        time = datetime.datetime.fromisoformat(renderer.template_time)
        self.assertBetween(time, before, after)
        with mock.patch.object(chat_template, "datetime"):  # whatever it is now
            other = pickle.loads(pickle.dumps(renderer))
            for one in (renderer, other):
                self.assertStartsWith(self.render(one), time.strftime("%d %b %Y %H:%M:%S|"))
        self.assertEqual(other.template_time, renderer.template_time)

    def test_template_without_a_clock_has_no_time(self):
        self.assertEqual(self.make_renderer(_ELABORATE, template_time="2026-07-01").template_time, "")


if __name__ == "__main__":
    absltest.main()
