"""experiments/colab.ipynb, executed on the CPU with a tiny model, and by themselves the cells for what is not here."""

import ast
import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import matplotlib.pyplot as plt
import nbclient
import nbformat
from absl.testing import absltest, parameterized

import tests
from dialog_jax.training import metrics
from tests.experiments import tiny_run

_ROOT = pathlib.Path(__file__).parents[2]
_NOTEBOOK = _ROOT / "experiments" / "colab.ipynb"
_STEPS = 4


def read():
    return nbformat.read(_NOTEBOOK, as_version=4)


def code_of(name):
    """The source of the cell with this id."""
    return next(cell.source for cell in read().cells if cell.id == name)


def files_of(directory):
    """{file: (size, time of writing)}, without what Python and git keep for themselves."""
    hidden = {"__pycache__", ".git", ".venv", "assets", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
    return {
        file: (file.stat().st_size, file.stat().st_mtime_ns)
        for file in directory.rglob("*")
        if file.is_file() and not hidden & set(file.relative_to(directory).parts)
    }


class ExecutedTest(absltest.TestCase):
    """One execution, looked at from several sides."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.output_dir = cls.directory / "run"
        tiny_run.save_model(cls.directory)
        cls.held_out = tiny_run.records(40, seed=1)[2:]  # so that dialogue 36 has a response 2
        for name, records in (("train", tiny_run.records(48)), ("validation", cls.held_out)):
            (cls.directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = {
            "OUTPUT_DIR": str(cls.output_dir),
            "STEPS": _STEPS,
            "MODEL": str(cls.directory / "model"),
            "TRAIN": str(cls.directory / "train.jsonl"),
            "VALIDATION": str(cls.directory / "validation.jsonl"),
        }
        notebook = read()
        place = next(number for number, cell in enumerate(notebook.cells) if cell.id == "settings")
        lines = [f"{name} = {value!r}" for name, value in settings.items()]
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
        cls.before = files_of(_ROOT)
        # One device, as a person has it, not the eight of the tests.
        environment = os.environ | {
            "XLA_FLAGS": tests.xla_flags(devices=1),
            "PYTHONPATH": str(_ROOT),
            "IPYTHONDIR": str(cls.directory / "ipython"),
        }
        client = nbclient.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(_NOTEBOOK.parent)}}
        )
        cls.notebook = client.execute(env=environment)
        cls.after = files_of(_ROOT)

    def outputs(self, name):
        return next(cell.outputs for cell in self.notebook.cells if cell.id == name)

    def text(self, name):
        return "".join(output.text for output in self.outputs(name) if output.output_type == "stream")

    def test_training_takes_the_steps_and_tells_of_them(self):
        lines = metrics.read_records(self.output_dir / "metrics.jsonl")
        self.assertEqual([line["step"] for line in lines], list(range(1, _STEPS + 1)))
        self.assertIn("1 x cpu", self.text("device"))
        self.assertIn(f"step 2 of {_STEPS}  loss ", self.text("training"))
        self.assertNotIn("\x1b", self.text("training"))  # no bars of a terminal
        self.assertRegex(self.text("training"), rf"held-out loss \d\.\d+ before, \d\.\d+ after {_STEPS} steps")
        asked = json.loads((self.output_dir / "config.json").read_text())
        self.assertEqual((asked["rows"], asked["gradient_accumulation"], asked["data"]["max_length"]), (1, 2, 512))
        self.assertEqual((asked["checkpoint_every"], asked["compute_dtype"]), (1, "float32"))

    def test_tree_of_a_dialogue_is_shown(self):
        (shown,) = [output for output in self.outputs("tree") if output.output_type == "display_data"]
        first = json.loads((self.directory / "train.jsonl").read_text().splitlines()[0])
        self.assertIn(first["id"], shown.data["text/html"])
        self.assertRegex(shown.data["text/html"], r'class="on" style="--w:1.0" title="token \d+, position \d+')

    def test_plot_is_shown(self):
        (shown,) = [output for output in self.outputs("plot") if output.output_type == "display_data"]
        self.assertIn("image/png", shown.data)
        image = plt.imread(self.output_dir / "plot.png")
        self.assertGreater(image.shape[1], 1200)
        self.assertGreater(image.std(), 0.02)

    def test_model_before_and_after_answer_a_held_out_dialogue(self):
        told = self.text("compare")
        record = self.held_out[36]
        self.assertIn(f"{record['id']} (validation.jsonl:37), response 2", told)
        self.assertRegex(told, rf" human wrote  {re.escape(record['messages'][5]['content'])}\n")
        self.assertRegex(told, r"run/model writes  \S")

    def test_reply_is_text(self):
        command, reply = self.text("chat").split("\n", 1)
        self.assertStartsWith(command, "$ python -m dialog_jax chat")
        self.assertNotEmpty(reply.strip())

    def test_nothing_is_written_in_the_repository(self):
        self.assertEqual(self.after, self.before)


class CellsTest(parameterized.TestCase):
    """Cells by themselves, in a directory of their own."""

    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())).resolve()
        self.enter_context(contextlib.chdir(self.directory))

    def execute(self, name, **names):
        """The names that the cell has defined."""
        defined = {"os": os, "pathlib": pathlib, "shutil": shutil, "subprocess": subprocess} | names
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code_of(name), defined)
        return defined

    def make_repository(self, name):
        (self.directory / name / "scripts").mkdir(parents=True)
        (self.directory / name / "scripts" / "prepare_demo.py").touch()
        return self.directory / name

    def test_uploaded_archive_is_unpacked_once(self):
        made = self.make_repository("dialog_jax-main")
        shutil.make_archive("uploaded", "zip", self.directory, made.name)
        shutil.rmtree(made)
        self.execute("repository", REPOSITORY="uploaded.zip", OUTPUT_DIR="run")
        self.assertEqual(pathlib.Path.cwd(), made)
        self.execute("repository", REPOSITORY="there is none.zip", OUTPUT_DIR="run")
        self.assertEqual(pathlib.Path.cwd(), made)

    def test_address_is_cloned(self):
        def clone(command, check):
            self.assertEqual(command[:2] + command[3:], ["git", "clone", "https://example.org/it.git", "dialog_jax"])
            self.make_repository(command[-1])

        with mock.patch.object(subprocess, "run", clone):
            self.execute("repository", REPOSITORY="https://example.org/it.git", OUTPUT_DIR="run")
        self.assertEqual(pathlib.Path.cwd(), self.directory / "dialog_jax")

    def test_missing_repository_is_explained(self):
        with self.assertRaisesRegex(ValueError, "Set REPOSITORY in the settings"):
            self.execute("repository", REPOSITORY="", OUTPUT_DIR="run")

    @parameterized.parameters(
        ("580.65.06", "", ["--editable=.[cuda]"]),
        ("550.54.15", "", ["--editable=.", "jax[cuda12]"]),
        (None, "tpu\n", ["--editable=.[tpu]"]),
        (None, "cpu\n", ["--editable=."]),
        (None, "", ["--editable=."]),
    )
    def test_jax_is_installed_for_what_the_runtime_has(self, driver, backend, expected):
        commands = []

        def run(command, **_):
            commands.append(command)
            told = driver if command[0] == "nvidia-smi" else backend
            return subprocess.CompletedProcess(command, 0, told)

        missing = importlib.metadata.PackageNotFoundError
        with (
            mock.patch.object(subprocess, "run", run),
            mock.patch.object(shutil, "which", lambda name: name if driver else None),
            mock.patch.object(importlib.metadata, "version", side_effect=missing),
        ):
            defined = self.execute("install")
        self.assertEqual(defined["PYTHON"], ".venv/bin/python")
        self.assertIn([sys.executable, "-m", "virtualenv", "--quiet", ".venv"], commands)
        self.assertEqual(commands[-1], [".venv/bin/python", "-m", "pip", "install", "--quiet", *expected])

    def test_installed_package_is_used_as_it_is(self):
        with mock.patch.object(subprocess, "run", side_effect=AssertionError):
            self.assertEqual(self.execute("install")["PYTHON"], sys.executable)

    @parameterized.parameters("cpu", "Tesla T4", "NVIDIA L4", "NVIDIA A100-SXM4-40GB", "TPU v2", "TPU v5 lite")
    def test_rows_are_divided_by_all_devices_and_checkpoints_are_four(self, device):
        asked = {}
        settings = dict.fromkeys(("OUTPUT_DIR", "MODEL", "TRAIN", "VALIDATION"), "x") | {"STEPS": 0, "DEVICE": device}
        self.execute(
            "training", run=lambda *flags: asked.update(flag.split("=", 1) for flag in flags if "=" in flag), **settings
        )
        if device == "TPU v2":  # eight cores
            self.assertEqual(int(asked["--config.rows"]) % 8, 0)
        self.assertEqual(int(asked["--config.steps"]), 4 * int(asked["--config.checkpoint_every"]))
        self.assertEqual(asked["--config.checkpoint_every"], asked["--config.evaluate_every"])

    def test_unknown_device_is_explained(self):
        with self.assertRaisesRegex(ValueError, "no row for 'Abacus'"):
            self.execute("training", DEVICE="Abacus")

    def script(self, source, told):
        """Calls the cell's `run` with a script of this source; what it prints goes to `told`."""
        (self.directory / "scripts").mkdir()
        (self.directory / "scripts" / "it.py").write_text(source)
        run = self.execute("data", PYTHON=sys.executable, MODEL="m", TRAIN="t", VALIDATION="v")["run"]
        with contextlib.redirect_stdout(told):
            run("scripts/it.py", "--flag=a b")

    def test_script_that_fails_stops_the_notebook(self):
        told = io.StringIO()
        with self.assertRaisesRegex(RuntimeError, "ended with code 3"):
            self.script("import sys; print(sys.argv[1:]); sys.exit(3)", told)
        self.assertEqual(told.getvalue(), "$ python scripts/it.py '--flag=a b'\n['--flag=a b']\n")

    def test_stop_button_lets_the_script_finish(self):
        class Stopped(io.StringIO):
            def write(self, text):
                if text == "ready\n":
                    raise KeyboardInterrupt
                return super().write(text)

        source = """
import time
try:
    print("ready")
    time.sleep(60)
except KeyboardInterrupt:
    print("saved")
"""
        told = Stopped()
        self.script(source, told)
        self.assertEndsWith(told.getvalue(), "saved\n")


class FileTest(absltest.TestCase):
    def test_cells_have_no_outputs(self):
        for cell in read().cells:
            if cell.cell_type == "code":
                self.assertEqual((cell.outputs, cell.execution_count), ([], None), cell.id)

    def test_table_of_the_text_is_that_of_the_code(self):
        lines = [line.strip("| ").split(" | ") for line in code_of("about-training").splitlines() if line[:1] == "|"]
        shown = [(*(int(cell.replace(",", "")) for cell in line[1:-1]), line[-1]) for line in lines[2:]]
        table = ast.literal_eval(re.search(r"TABLE = (\{.*?\n\})", code_of("training"), re.DOTALL)[1])
        self.assertEqual(shown, list(table.values()))

    def test_links_of_the_table_of_contents_lead_somewhere(self):
        text = "\n".join(cell.source for cell in read().cells)
        links = re.findall(r"\]\(#(\w+)\)", text)
        self.assertNotEmpty(links)
        self.assertEqual(set(links), set(re.findall(r'<a name="(\w+)">', text)))

    def test_cells_are_formatted_and_sound(self):
        for command in (["check"], ["format", "--check"]):
            checked = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--no-cache", _NOTEBOOK], capture_output=True, text=True
            )
            self.assertEqual(checked.returncode, 0, checked.stdout + checked.stderr)


if __name__ == "__main__":
    absltest.main()
