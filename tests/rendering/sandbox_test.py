"""Templates that mean harm, by what they try: Python's objects, time, memory."""

import concurrent.futures
import pathlib
import tempfile
import time
from unittest import mock

from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.rendering import bounded, sandbox, sequences
from dialog_jax.rendering import chat_template as chat_template_lib
from dialog_jax.rendering.tokenizers import load_tokenizer
from tests.rendering import chat_templates

_DIALOGUE = Dialogue(
    id=7, messages=(Message(role="user", content="a"), Message(role="assistant", content="b")), where="said.jsonl:8"
)
_LAUGHS = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
_DOUBLES = (
    "{% set n = namespace(t='xxxxxxxxxxxxxxxx') %}{% for _ in range(100000) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
)
_LOOPS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
_WRITES = "{% for a in range(100000) %}{% for b in range(100000) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}"


def with_template(template):
    tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = template
    return tokenizer


class HarmTest(parameterized.TestCase):
    def assert_refused(self, template, reason):
        began = time.monotonic()
        with self.assertRaisesRegex(
            ValueError,
            rf"^dialogue 7 \(said.jsonl:8\): the chat template refuses its first 2 messages .*{reason}.*pass another",
        ):
            chat_template_lib.ChatTemplate(with_template(template)).text(_DIALOGUE, 2)
        self.assertLess(time.monotonic() - began, 15)

    @parameterized.parameters(
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{m.__class__.__mro__}'.format_map({'m': messages}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ self.__init__.__globals__ }}",
        "{% set n = namespace(__class__=1) %}",
    )
    def test_reaching_for_python_s_objects_is_refused(self, template):
        with mock.patch("os.popen", side_effect=AssertionError("reached Python")):
            self.assert_refused(template, "(unsafe|undefined|underscore)")

    @parameterized.parameters(
        "{{ raise_exception.__globals__ }}", "{{ strftime_now.__code__ }}", "{{ ''|attr('__class__')|attr('__mro__') }}"
    )
    def test_one_of_python_s_objects_by_itself_is_nothing(self, template):
        self.assertEqual(chat_template_lib.ChatTemplate(with_template(template)).text(_DIALOGUE, 2), "")

    @parameterized.parameters(_LOOPS, _LAUGHS)
    def test_a_template_that_runs_for_ever_is_ended(self, template):
        self.enter_context(mock.patch.object(bounded, "SECONDS", 1.0))
        self.assert_refused(template, r"it ran for [1-9]\.\d s, the limit is 1 s")

    def test_a_template_that_doubles_a_text_for_ever_is_ended(self):
        self.enter_context(mock.patch.object(bounded, "BYTES", 128 << 20))
        self.assert_refused(_DOUBLES, r"it took [\d,]+ MiB of memory, the limit is 128 MiB")

    def test_a_template_that_writes_for_ever_is_ended(self):
        self.enter_context(mock.patch.object(bounded, "BYTES", 64 << 20))
        self.enter_context(mock.patch.object(bounded, "SECONDS", 5.0))
        self.assert_refused(_WRITES, "the limit is")

    def test_a_text_beyond_all_sense_is_refused(self):
        self.enter_context(mock.patch.object(sandbox, "LONGEST", 1000))
        self.assert_refused("{% for _ in range(1001) %}x{% endfor %}", "it wrote 1,001 characters, the limit is 1,000")
        self.assertLen(chat_template_lib.ChatTemplate(with_template("{{ 'x' * 1000 }}")).text(_DIALOGUE, 2), 1000)

    @parameterized.parameters(
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10000000000) }}", "Range too big"),
        ("{{ 'x' * 100_000_000_000 }}", "multiplies by 100_000_000_000"),
        ("{{ 0x1000000000 * 'x' }}", "multiplies by 0x1000000000"),
        ("{% set n = 1000000000000000000 %}{{ 'x' * n * n }}", "(Memory|Overflow)Error|cannot fit"),
        ("{{ 1.5 * 'x' }}", ""),
        ("{{ 9 ** 9 ** 9 }}", "raises to a power"),
        ("{{ 1 | round(10000000000, 'floor') }}", "rounds otherwise"),
        ("{{ 1 | round(precision=9) }}", "rounds otherwise"),
        ("{{ [1] | map('round', 10000000000, 'floor') | list }}", "rounds otherwise"),
        ("{{ 1 | round(messages | length) }}", "rounds otherwise"),
    )
    def test_a_template_that_breaks_off_is_refused(self, template, reason):
        self.assert_refused(template, reason)

    @parameterized.parameters("{{ 3.14159 | round(2) }}", "{{ 3.14159|round }}", "{{ dict(**{'a': 1}).a }}")
    def test_harmless_numbers_are_written(self, template):
        self.assertNotEmpty(chat_template_lib.ChatTemplate(with_template(template)).text(_DIALOGUE, 2))

    def test_it_is_ended_in_the_thread_that_renders(self):
        self.enter_context(mock.patch.object(bounded, "SECONDS", 1.0))
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            harm = threads.submit(self.assert_refused, _LOOPS, "it ran for")
            plain = threads.submit(
                chat_template_lib.ChatTemplate(with_template("{{ messages[1].content }}")).text, _DIALOGUE, 2
            )
            self.assertEqual(plain.result(), "b")
            harm.result()

    def test_a_template_is_ended_when_the_tokenizer_is_loaded_and_when_a_renderer_is_made(self):
        self.enter_context(mock.patch.object(bounded, "SECONDS", 0.5))
        with tempfile.TemporaryDirectory() as directory:
            chat_templates.train_tokenizer("chatml").save_pretrained(directory)
            with self.assertRaisesRegex(ValueError, "the chat template was stopped: it ran for .* Pass another one"):
                load_tokenizer(pathlib.Path(directory), chat_template=_LOOPS)
        with self.assertRaisesRegex(ValueError, "dialogue probe: the chat template refuses .* it ran for"):
            sequences.Renderer(with_template(_LOOPS))

    def test_every_family_s_template_passes(self):
        for family in chat_templates.FAMILIES:
            sequences.Renderer(chat_templates.train_tokenizer(family))


if __name__ == "__main__":
    absltest.main()
