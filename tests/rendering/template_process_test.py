"""Templates that mean harm, by what they try: Python's objects, time, memory; and the life of their process."""

import concurrent.futures
import copy
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.rendering import chat_template as chat_template_lib
from dialog_jax.rendering import sequences, template_process, template_rendering
from dialog_jax.rendering.template_process import TemplateStopped
from dialog_jax.rendering.template_rendering import Job
from tests.rendering import chat_templates

_DIALOGUE = Dialogue(
    id=7, messages=(Message(role="user", content="a"), Message(role="assistant", content="b")), where="said.jsonl:8"
)
_MESSAGES = [message.as_dict() for message in _DIALOGUE.messages]
_DOUBLES = (
    "{% set n = namespace(t='xxxxxxxxxxxxxxxx') %}{% for _ in range(100000) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
)
_LOOPS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
_WRITES = "{% for a in range(100000) %}{% for b in range(100000) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}"
_CALLS = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
_TOO_MUCH_MEMORY = "it needs more than 1,024 MiB of memory"


def with_template(template):
    tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = template
    return tokenizer


def render_text(template):
    return chat_template_lib.ChatTemplate(with_template(template)).text(_DIALOGUE, 2)


def child():
    """The process in which templates run."""
    template_process.render("", _MESSAGES, [Job(1)], {})
    return template_process._client(os.getpid())._child.process


def memory_of_this_process():
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10


class HarmTest(parameterized.TestCase):
    def limit_seconds(self, seconds):
        child()  # which takes longer to start
        self.enter_context(mock.patch.object(template_process, "SECONDS", seconds))

    def assert_refused(self, template, reason):
        with self.assertRaisesRegex(
            UserError,
            rf"^dialogue 7 \(said.jsonl:8\): the chat template refuses its first 2 messages .*{reason}.*pass another",
        ):
            render_text(template)

    def assert_stopped(self, template, reason):
        before = memory_of_this_process()
        with self.assertRaisesRegex(
            TemplateStopped,
            rf"^dialogue 7 \(said.jsonl:8\): the chat template was stopped: {reason}. Pass another chat template",
        ):
            render_text(template)
        self.assertLess(memory_of_this_process() - before, 64 << 20)
        self.assertEqual(render_text("{{ messages[1].content }}"), "b")

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
        self.assert_refused(template, "(unsafe|undefined|underscore)")

    @parameterized.parameters(
        "{{ raise_exception.__globals__ }}", "{{ strftime_now.__code__ }}", "{{ ''|attr('__class__')|attr('__mro__') }}"
    )
    def test_one_of_python_s_objects_by_itself_is_empty(self, template):
        self.assertEqual(render_text(template), "")

    @parameterized.parameters(
        _LOOPS,
        _CALLS,
        "{{ 10 ** (10 ** 9) }}",  # one operation of the interpreter, in its compiler
        "{{ (messages | length) ** (10 ** 10) }}",
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        "{{ 1 | round(10000000000, 'floor') }}",
        "{{ [1] | map('round', 10000000000, 'floor') | list }}",
    )
    @pytest.mark.quick_every(7)
    def test_a_template_that_runs_for_ever_is_stopped(self, template):
        self.limit_seconds(1.0)
        self.assert_stopped(template, f"(it ran for more than 1 s|{_TOO_MUCH_MEMORY})")

    @parameterized.parameters(
        _DOUBLES,
        "{{ 'x' * 100_000_000_000 }}",
        "{{ 0x1000000000 * 'x' }}",
        "{{ [0] * 10 ** 10 }}",
        "{% set n = 10 ** 18 %}{{ 'x' * n * n }}",
    )
    @pytest.mark.quick_every(5)
    def test_a_template_that_allocates_without_end_is_stopped(self, template):
        self.assert_stopped(template, _TOO_MUCH_MEMORY)

    @pytest.mark.full
    def test_a_template_that_writes_for_ever_is_stopped(self):
        self.limit_seconds(3.0)
        self.assert_stopped(_WRITES, f"(it ran for more than 3 s|{_TOO_MUCH_MEMORY})")

    def test_process_that_renders_by_itself_has_the_same_limits(self):
        program = f"""if True:
            import sys
            sys.path[:] = {sys.path!r}
            from dialog_jax.rendering import template_process as it
            it.SECONDS = 1.0
            it.render_in_this_process()
            for template in {[_LOOPS, _CALLS, _DOUBLES, _WRITES, "{{ 'x' * 100_000_000_000 }}"]!r}:
                for text in template, "{{{{ messages[1].content }}}}":
                    try:
                        print(*it.render(text, {_MESSAGES!r}, [it.Job(2)], {{}}))
                    except it.TemplateStopped as error:
                        print(error)
        """
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        stopped, rendered = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
        self.assertLen(stopped, 5, done.stderr)
        for line, reasons in zip(stopped, ["time", "time", "either", "either", "memory"], strict=True):
            expected = {"time": "it ran for more than 1 s", "memory": _TOO_MUCH_MEMORY}
            self.assertIn(line, expected.values() if reasons == "either" else [expected[reasons]])
        self.assertEqual(rendered, ["['b'] "] * 5)

    @parameterized.parameters(
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ 1.5 * 'x' }}", "float"),
        ("{{ 'x' * 67108865 }}", r"it wrote 67,108,865 characters, the limit is 67,108,864"),
        ("{{ messages[0].content }", "it is not Jinja at line 1"),
    )
    def test_a_template_that_breaks_off_is_refused(self, template, reason):
        self.assert_refused(template, reason)

    @parameterized.parameters("{{ 3.14159 | round(2) }}", "{{ 2 ** 10 }}", "{{ dict(**{'a': 1}).a }}")
    def test_harmless_numbers_are_written(self, template):
        self.assertNotEmpty(render_text(template))

    def test_a_renderer_of_a_harmful_template_is_not_made(self):
        self.limit_seconds(1.0)
        with self.assertRaisesRegex(TemplateStopped, "the chat template was stopped: it ran for more .* Pass another"):
            sequences.Renderer(with_template(_LOOPS))

    def test_a_template_that_is_not_jinja_is_named_with_its_line(self):
        tokenizer = with_template("{% for m in messages %}\n{{ m.role }\n{% endfor %}")
        tokenizer.name_or_path = "/somewhere/tiny-model"
        with self.assertRaisesRegex(UserError, "^tiny-model: the chat template .* not Jinja at line 2.*Correct it"):
            sequences.Renderer(tokenizer)

    def test_no_template_runs_in_this_process(self):
        with mock.patch.object(template_rendering, "_apply", side_effect=AssertionError("rendered here")):
            renderer = sequences.Renderer(chat_templates.train_tokenizer("qwen3"))
            (rendered,) = renderer.render([_DIALOGUE], full=True, locate=lambda message: message.role == "user")
            self.assertLen(list(rendered), 2)
            self.assertNotEmpty(renderer.encode_prompt(_DIALOGUE))
            self.assertNotEmpty(renderer.encode_shared_prefix(_DIALOGUE))


class ProcessTest(parameterized.TestCase):
    def test_the_limited_tokenizer_writes_what_the_tokenizer_does(self):
        for family in chat_templates.FAMILIES:
            tokenizer = chat_templates.train_tokenizer(family)
            limited = template_process.limit_template(tokenizer, "")
            for prompt in (False, True):
                self.assertEqual(
                    limited.apply_chat_template(_MESSAGES, tokenize=False, add_generation_prompt=prompt, x=1),
                    tokenizer.apply_chat_template(_MESSAGES, tokenize=False, add_generation_prompt=prompt, x=1),
                )

    def test_limited_tokenizer_takes_the_time_it_is_given(self):
        tokenizer = copy.copy(chat_templates.train_tokenizer("chatml"))
        tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M') }}"
        limited = template_process.limit_template(tokenizer, "2026-07-01T13:05:09")
        self.assertEqual(limited.apply_chat_template(_MESSAGES, tokenize=False), "01 Jul 2026 13:05")

    def test_every_text_that_can_be_in_a_message_comes_back(self):
        for content in ("", "é🙂\ud800\x00\u2028", "x" * (1 << 20)):
            messages = [{"role": "user", "content": content}]
            rendering = template_process.render("{{ messages[0].content }}", messages, [Job(1)], {})
            self.assertEqual(rendering, ([content], ""))

    @parameterized.parameters(([],), (["", "a", "ab", "ab", "xab", "", "b"],))
    def test_shortened_texts_are_restored(self, texts):
        self.assertEqual(template_process._restore(template_process._shorten(texts)), texts)
        self.assertEqual(template_process._shorten(["a", "ab", "x"]), [[0, "a"], [1, "b"], [0, "x"]])

    def test_texts_before_one_that_is_refused_are_returned(self):
        template = "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
        rendering = template_process.render(template, _MESSAGES, [Job(1), Job(1, True), Job(2), Job(1)], {})
        self.assertEqual(rendering, (["a", "a"], "no"))

    def test_one_process_serves_all_threads(self):
        process = child()
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            texts = list(threads.map(lambda number: render_text(str(number)), range(40)))
        self.assertEqual(texts, [str(number) for number in range(40)])
        self.assertIs(child(), process)

    def test_a_process_that_was_killed_is_an_error_and_replaced(self):
        process = child()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with self.assertRaisesRegex(TemplateStopped, r"its process was ended \(exit code -9\)"):
            render_text("x")
        self.assertEqual(render_text("x"), "x")

    def test_bug_in_the_process_keeps_its_traceback_and_the_process(self):
        process = child()
        client = template_process._client(os.getpid())
        with self.assertRaisesRegex(RuntimeError, "(?s)a bug in the process.*Traceback.*render_jobs.*TypeError"):
            client.render(("a request without messages",))
        self.assertIs(child(), process)
        self.assertEqual(render_text("x"), "x")

    @pytest.mark.full
    def test_an_idle_process_ends_and_the_next_text_starts_another(self):
        program = f"""if True:
            import os, sys
            sys.path[:] = {sys.path!r}
            from dialog_jax.rendering import template_process as it
            real = it.subprocess.Popen
            def popen(command, **options):
                command[2] = command[2].replace("child.serve(", "child._IDLE_SECONDS = 0.2; child.serve(")
                return real(command, **options)
            it.subprocess.Popen = popen
            job = "x", [{{"role": "user", "content": ""}}], [it.Job(1)], {{}}
            assert it.render(*job).texts == ["x"]
            first = it._client(os.getpid())._child.process
            assert first.wait(60) == 0
            assert it.render(*job).texts == ["x"]
            assert it._client(os.getpid())._child.process is not first
        """
        subprocess.run([sys.executable, "-c", program], timeout=120, check=True)

    @pytest.mark.full
    def test_the_process_ends_with_its_parent_even_in_a_loop(self):
        program = f"""if True:
            import os, sys, threading
            sys.path[:] = {sys.path!r}
            from dialog_jax.rendering import template_process as it
            messages = [{{"role": "user", "content": ""}}]
            real = it.subprocess.Popen
            def popen(command, **options):
                command[2] = command[2].replace("child.serve(", "child.SECONDS = 1.0; child.serve(")
                return real(command, **options)
            it.subprocess.Popen = popen
            it.render("", messages, [it.Job(1)], {{}})
            process = it._client(os.getpid())._child.process
            print(process.pid, flush=True)
            threading.Thread(target=it.render, args=({_LOOPS!r}, messages, [it.Job(1)], {{}}), daemon=True).start()
            threading.Event().wait(0.5)
            os._exit(0)
        """
        run = subprocess.run([sys.executable, "-c", program], timeout=120, check=True, stdout=subprocess.PIPE)
        pid = int(run.stdout)
        until = time.monotonic() + 60
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":  # ended, and nobody waits for it
                    break
            time.sleep(0.1)
        else:
            self.assertFalse(os.path.exists(f"/proc/{pid}"))

    @pytest.mark.full
    def test_a_fork_has_a_process_of_its_own(self):
        program = f"""if True:
            import os, sys
            sys.path[:] = {sys.path!r}
            from dialog_jax.rendering import template_process as it
            job = "x", [{{"role": "user", "content": ""}}], [it.Job(1)], {{}}
            it.render(*job)
            process = it._client(os.getpid())._child.process.pid
            if os.fork():
                _, status = os.wait()
                assert it.render(*job).texts == ["x"]
                os._exit(os.waitstatus_to_exitcode(status))
            assert it.render(*job).texts == ["x"]
            assert it._client(os.getpid())._child.process.pid != process
            os._exit(0)
        """
        subprocess.run([sys.executable, "-c", program], timeout=120, check=True)


if __name__ == "__main__":
    absltest.main()
