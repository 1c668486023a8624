"""The text of a config: it has the values it was given, and ruff leaves it as it is."""

import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

from dialog_jax.commands import config_flag
from dialog_jax.drafting import config_text
from dialog_jax.drafting.config_text import Entry
from dialog_jax.errors import UserError
from dialog_jax.training import config

_ENTRIES = [
    Entry("model", "a 'model'", "Why " * 60),
    Entry("lora.rank", 8),
    Entry("data.train", 'C:\\dir\\"x".jsonl', 'with """ and \\ in it'),
    Entry("data.roles", {'It\'s "A"': "user", "Bot": "assistant"}),
    Entry("rows", 4),
    Entry("lora.targets", ("q_proj", "v_proj")),
    Entry("data.mix", {}),
    Entry("optimizer.learning_rate", 2e-5),
]


def load(text, directory):
    """The config of a file, as --config=FILE has it."""
    file = pathlib.Path(directory) / "my_config.py"
    file.write_text(text, encoding="utf-8")
    return config.from_config_dict(config_flag._load(file))


class ConfigTextTest(parameterized.TestCase):
    def test_file_has_the_values_it_was_given(self):
        text = config_text.write_config('A "title"\\ """.\n', _ENTRIES)
        values = load(text, self.create_tempdir().full_path)
        self.assertEqual(values, config_text.build_config(_ENTRIES))
        self.assertEqual(values.model, "a 'model'")
        self.assertEqual(values.data.train, 'C:\\dir\\"x".jsonl')
        self.assertEqual(dict(values.data.roles), {'It\'s "A"': "user", "Bot": "assistant"})
        self.assertEqual((values.rows, values.lora.rank, values.lora.targets), (4, 8, ("q_proj", "v_proj")))
        self.assertIn("learning_rate=2e-5,", text)

    @parameterized.product(width=(80, 120), docstring=("A title.\n", "A title.\n\nMore.\n"))
    def test_ruff_changes_nothing(self, width, docstring):
        text = config_text.write_config(docstring, _ENTRIES)
        for command in (["format", "--diff"], ["check", "--select=E4,E7,E9,F,I,W"]):
            ran = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--isolated", f"--line-length={width}", "-"],
                input=text,
                capture_output=True,
                text=True,
            )
            self.assertEqual(ran.returncode, 0, ran.stdout + ran.stderr)

    def test_value_that_is_not_valid_is_an_error(self):
        with self.assertRaisesRegex(UserError, "rows is 0"):
            config_text.build_config([Entry("rows", 0)])


if __name__ == "__main__":
    absltest.main()
