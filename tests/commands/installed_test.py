"""A wheel in an environment of its own, outside the checkout: it trains, audits and chats. So does README's Python."""

import pathlib
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv

import pytest
from absl.testing import absltest

import tests
from tests.training import tiny

pytestmark = pytest.mark.full
_ROOT = pathlib.Path(__file__).parents[2]


class InstalledTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory())).resolve()
        tiny.run_config(cls.directory)  # writes a model and dialogues
        (cls.directory / "train.jsonl").rename(cls.directory / "my.jsonl")
        source = cls.directory / "source"
        source.mkdir()
        subprocess.run(
            f"git -C {_ROOT} ls-files -z setup.py pyproject.toml README.md LICENSE dialog_jax |"
            f" (cd {_ROOT} && xargs -0 cp --parents -t {source})",
            shell=True,
            check=True,
        )
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        build = [*pip, "wheel", "--no-deps", f"--wheel-dir={cls.directory}", source]
        subprocess.run(build, check=True)
        (wheel,) = cls.directory.glob("*.whl")
        environment = cls.directory / "environment"
        venv.create(environment, with_pip=False, symlinks=True)
        cls.bin = environment / "bin"
        subprocess.run([*pip, f"--python={cls.bin / 'python'}", "install", "--no-deps", wheel], check=True)
        # Third-party packages are those of the tests. Of a plain path, the .pth files there are not read, so that an
        # editable installation of the checkout stays hidden.
        (packages,) = environment.glob("lib/python*/site-packages")
        (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run_in(self, *command):
        """(standard output, standard error) of a command in a directory that holds dialogues and a model."""
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.directory),
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "XLA_FLAGS": tests.xla_flags(devices=1),
        }
        ran = subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True)
        self.assertEqual(ran.returncode, 0, ran.stdout + ran.stderr)
        return ran.stdout, ran.stderr

    def test_command_trains_audits_and_chats(self):
        told, _ = self.run_in(self.bin / "python", "-c", "import dialog_jax; print(dialog_jax.__file__)")
        self.assertTrue(pathlib.Path(told.strip()).is_relative_to(self.bin.parent), told)
        command = self.bin / "dialog_jax"
        data = "--config.data.train=my.jsonl", "--config.data.max_length=256"
        told, error = self.run_in(command, "audit", "--config.model=model", *data)
        self.assertIn("24 dialogues have something to train on", told)
        self.assertEmpty(error)
        share = "--config.data.validation_share=0.2"
        told, error = self.run_in(command, "train", "--config.model=model", *data, share, "--output_dir=run")
        self.assertRegex(told, r"20% of my\.jsonl is held out.*\n(.*\n)*held-out loss .* before, .* steps\n$")
        self.assertEmpty(error)
        self.run_in(command, "export", "--run=run", "--out=run/model")
        told, _ = self.run_in(command, "chat", "--config.model=run/model", "--message=Hi", "--max_new_tokens=4")
        self.assertLen(told.splitlines(), 1)
        (package,) = self.bin.parent.glob("lib/python*/site-packages/dialog_jax")
        self.assertTrue((package / "py.typed").is_file())
        self.assertNotEmpty(list((package / "planning" / "shapes").glob("*.json")))
        self.assertTrue((package / "report" / "templates" / "report.html.jinja").is_file())

    def test_python_of_the_readme_trains_and_replies(self):
        (code,) = re.findall(r"```python\n(.*?)```", (_ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        code = code.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"model"')
        code = code.replace('train="my.jsonl"', 'train="my.jsonl", max_length=256, validation_share=0.2')
        told, _ = self.run_in(self.bin / "python", "-c", code)
        self.assertIn("step 1 of ", told)
        self.assertTrue((self.directory / "runs" / "mine" / "model" / "config.json").exists())


if __name__ == "__main__":
    absltest.main()
