"""What a run reads before it starts: bad records that stop it, or that it leaves out and lists."""

import dataclasses
import io
import json
import pathlib

import rich.console
from absl.testing import absltest

from dialog_jax.errors import UserError
from dialog_jax.training import run_inputs
from tests.training import tiny

_BAD_LINES = [
    "{",
    json.dumps({"id": "bot", "messages": [{"role": "bot", "content": "Hi"}]}),
    json.dumps({"id": "late", "messages": [{"role": "assistant", "content": "Hi"}]}),
]


class BadRecordsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.create_tempdir().full_path)
        self.config = tiny.run_config(self.directory)
        self.output = io.StringIO()

    def read(self, config):
        (self.directory / "run").mkdir(exist_ok=True)
        console = rich.console.Console(file=self.output, highlight=False, soft_wrap=True)
        return run_inputs.read_inputs(config, self.directory / "run", console)

    def add_bad_lines(self):
        file = self.directory / "train.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        file.write_text("\n".join([*lines[:3], *_BAD_LINES, *lines[3:]]) + "\n", encoding="utf-8")

    def skip(self, **changes):
        return dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, on_error="skip", **changes))

    def test_skipped_records_are_listed_in_the_run_and_the_rest_is_trained_on(self):
        clean = self.read(self.config)
        self.assertFalse((self.directory / "run" / "skipped.txt").exists())
        self.add_bad_lines()
        with self.assertRaisesRegex(UserError, "train.jsonl:4: not JSON"):
            self.read(self.config)
        skipped = self.read(self.skip())
        self.assertEqual(skipped.train.tokens.tolist(), clean.train.tokens.tolist())
        self.assertEqual(list(skipped.train.ids), list(clean.train.ids))
        lines = (self.directory / "run" / "skipped.txt").read_text(encoding="utf-8").splitlines()
        self.assertLen(lines, 3)
        for line, name in zip(lines, ("train.jsonl:4: not JSON", "dialogue bot", "dialogue late"), strict=True):
            self.assertStartsWith(line, name)
        log = self.output.getvalue()
        self.assertIn("24 dialogues read", log)
        self.assertIn("3 skipped because of errors, listed in skipped.txt", log)
        (self.directory / "run" / "skipped.txt").unlink()
        self.read(self.skip())  # the trees are there
        self.assertEqual((self.directory / "run" / "skipped.txt").read_text(encoding="utf-8").splitlines(), lines)

    def test_skipped_records_are_listed_once_if_a_share_is_held_out(self):
        self.add_bad_lines()
        inputs = self.read(self.skip(validation="", validation_share=0.2))
        self.assertEqual(inputs.train.report.skipped + inputs.held_out.report.skipped, 3)
        self.assertEqual(inputs.train.report.dialogues + inputs.held_out.report.dialogues, 24)
        self.assertLen((self.directory / "run" / "skipped.txt").read_text(encoding="utf-8").splitlines(), 3)


if __name__ == "__main__":
    absltest.main()
