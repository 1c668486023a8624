"""What every command does: help, errors in one line, tracebacks of bugs, and no import that it does not need."""

import ast
import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import absltest, parameterized

from dialog_jax import __main__ as program
from dialog_jax.commands import help_text
from dialog_jax.dialogues import parsing
from dialog_jax.training import config as config_lib
from tests.commands import running

_ROOT = pathlib.Path(__file__).parents[2]
_COMMANDS = _ROOT / "dialog_jax" / "commands"
_CONFIGS = (
    config_lib.TrainConfig,
    config_lib.DataConfig,
    config_lib.ObjectiveConfig,
    config_lib.LoraConfig,
    config_lib.SoftPromptConfig,
    config_lib.LossConfig,
    config_lib.OptimizerConfig,
    config_lib.MeshConfig,
)


def run_python(*arguments):
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


class CommandsTest(parameterized.TestCase):
    def test_every_module_with_a_main_is_a_command(self):
        with_main = [
            file.stem
            for file in _COMMANDS.glob("*.py")
            if any(
                isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(file.read_text()).body
            )
        ]
        self.assertCountEqual(program.COMMANDS, with_main)

    def test_commands_are_listed_one_line_each(self):
        ran = run_python("-m", "dialog_jax")
        self.assertEqual((ran.returncode, ran.stderr), (0, ""))
        listed = [line.split()[0] for line in ran.stdout.splitlines()[2:]]
        self.assertEqual(listed, list(program.COMMANDS))
        self.assertEqual(run_python("-m", "dialog_jax", "--help").stdout, ran.stdout)

    def test_unknown_command_names_those_there_are(self):
        ran = run_python("-m", "dialog_jax", "trian")
        self.assertEqual((ran.returncode, ran.stdout), (1, ""))
        self.assertStartsWith(ran.stderr, "dialog_jax: 'trian' is not a command; the commands are train, audit, ")

    @parameterized.parameters("audit", "show")
    def test_commands_that_look_at_data_import_no_jax_and_print_no_advice(self, command):
        code = (
            "import sys; from dialog_jax import __main__ as program; "
            f"sys.argv = ['dialog_jax', {command!r}]; code = program.main(); "
            "print(code, [name for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax') if name in sys.modules])"
        )
        ran = run_python("-c", code)
        self.assertEqual(ran.stdout, "1 []\n")
        self.assertLen(ran.stderr.splitlines(), 1)  # what is missing

    @parameterized.parameters(*program.COMMANDS)
    def test_help_lists_flags_and_fields_with_defaults_and_docstrings(self, command):
        text, error = running.run(command, "--help")
        self.assertEmpty(error)
        lines = text.splitlines()
        self.assertLess(max(map(len, lines)), 101)
        self.assertIn("  --debug=False", lines)
        has_config = command not in ("select", "export", "plot", "diagnose", "init")
        self.assertEqual(has_config, "  --config.optimizer.learning_rate=-1.0" in lines)
        if has_config:
            self.assertIn("      Passes over the training data; read if steps is 0.", lines)
            for config in _CONFIGS:
                for field in config_lib.dataclasses.fields(config):
                    if not hasattr(config_lib.TrainConfig, field.name) or field.name not in ("data", "objective"):
                        self.assertRegex(text, rf"(--config\.(\w+\.)?|\n){field.name}\b")
        self.assertEqual("  --data=train" in lines, command in ("audit", "show", "check", "score", "compare"))

    def test_every_field_has_a_docstring(self):
        for config in _CONFIGS:
            for field, text in help_text.attribute_docstrings(config).items():
                nested = config is config_lib.TrainConfig and field in (
                    "data",
                    "objective",
                    "lora",
                    "soft_prompt",
                    "loss",
                    "optimizer",
                    "mesh",
                )
                self.assertEqual(bool(text), not nested, f"{config.__name__}.{field}")


class ErrorsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.flags = ("--config.tokenizer=x", "--config.data.train=missing.jsonl")

    def test_user_error_is_one_line_and_debug_adds_the_traceback(self):
        out, error = running.run("audit")
        self.assertEmpty(out)
        self.assertRegex(error, r"^dialog_jax audit: model and tokenizer are empty\. .*\n\[exit code 1\]$")
        _, error = running.run("audit", "--debug")
        self.assertStartsWith(error, "Traceback (most recent call last)")
        self.assertIn("\ndialog_jax audit: model and tokenizer are empty", error)

    def test_bug_keeps_its_traceback(self):
        with (
            mock.patch.object(parsing, "iterate_dialogues", side_effect=IndexError("a bug")),
            self.assertRaisesRegex(IndexError, "a bug"),
        ):
            running.run("show", *self.flags)

    def test_error_of_the_machine_is_one_line_and_another_of_the_system_a_bug(self):
        opened = "dialog_jax.training.config_renderer.open_renderer"
        with mock.patch(opened, side_effect=PermissionError(13, "Permission denied", "x")):
            _, error = running.run("audit", *self.flags)
        self.assertEqual(error, "dialog_jax audit: [Errno 13] Permission denied: 'x'\n[exit code 1]")
        with mock.patch(opened, side_effect=FileNotFoundError(2, "No such file")), self.assertRaises(FileNotFoundError):
            running.run("audit", *self.flags)

    def test_arguments_that_are_no_flags_and_unknown_flags_are_errors(self):
        _, error = running.run("plot", "runs/mine")
        self.assertStartsWith(error, "dialog_jax plot: got 'runs/mine'; all arguments are flags, see --help.")
        _, error = running.run("plot", "--rnu=x")
        self.assertStartsWith(error, "dialog_jax plot: Unknown command line flag 'rnu'. Did you mean: run")
        _, error = running.run("plot")
        self.assertStartsWith(error, "dialog_jax plot: --run is missing. Pass it, for instance --run=runs/mine.")

    def test_value_of_the_wrong_type_is_explained(self):
        for flag, needed in (
            ("config.rows=abc", "an integer"),
            ("config.epochs=x", "a number"),
            ("config.data.share_prefixes=maybe", "true or false"),
            ("config.data.chat_template_kwargs=abc", 'a dict such as {"a": 1}'),
            ("config.lora.rank_pattern={1: 2}", 'a dict such as {"a": 1}'),
            ("index=-1", "a non-negative integer"),
        ):
            name, _, value = flag.partition("=")
            _, error = running.run("show", *self.flags, f"--{flag}")
            self.assertEqual(
                error, f"dialog_jax show: --{name} is {value!r}; needed {needed}. --help describes it.\n[exit code 1]"
            )

    def test_config_file_that_is_no_config_is_an_error_in_one_line(self):
        file = pathlib.Path(self.create_tempdir().full_path) / "my.py"
        for text, message in (
            ("def get_config(:", r"my.py: invalid syntax in line 1 of .*my.py\. Correct it\."),
            ("x = 1", r"my.py: has no function get_config\(\)\. Copy"),
            ("def get_config(): pass", r"my.py: get_config\(\) returned NoneType; needed a ConfigDict"),
            ("from dialog_jax.errors import UserError\ndef get_config(): raise UserError('mine')", "mine"),
        ):
            file.write_text(text)
            _, error = running.run("audit", f"--config={file}", *self.flags)
            self.assertRegex(error, rf"^dialog_jax audit: .*{message}.*\n\[exit code 1\]$")
        file.write_text("import not_installed")
        with self.assertRaises(ModuleNotFoundError):
            running.run("audit", f"--config={file}", *self.flags)

    def test_output_where_no_file_can_be_is_an_error_before_anything_is_read(self):
        directory = pathlib.Path(self.create_tempdir().full_path)
        (directory / "file").touch()
        for out, message in (
            (directory, "is a directory"),
            (directory / "file" / "a" / "b", "file is not a directory"),
        ):
            for command in ("audit", "score"):
                _, error = running.run(command, *self.flags, f"--out={out}")
                self.assertRegex(error, rf"^dialog_jax {command}: --out=.*{message}.*\n\[exit code 1\]$")

    def test_interruption_is_one_line(self):
        with mock.patch("dialog_jax.training.config_renderer.open_renderer", side_effect=KeyboardInterrupt):
            _, error = running.run("audit", *self.flags)
        self.assertEqual(error, "dialog_jax audit: interrupted\n[exit code 130]")


if __name__ == "__main__":
    absltest.main()
