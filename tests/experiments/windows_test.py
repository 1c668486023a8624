"""The experiment on windows at tiny sizes: to table and picture."""

import pathlib
import tempfile

import windows
from absl.testing import absltest
from report import Options

from tests.experiments import tiny_run  # noqa: F401  (experiments/ is on the path)


class WindowsTest(absltest.TestCase):
    def test_experiment_writes_table_and_picture(self):
        directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        sizes = windows.Sizes(lengths=(32, 64), windows=(0, 16), width=16, repeats=1)
        windows.main(Options(name="windows", results_dir=str(directory)), sizes)
        page = (directory / "windows.md").read_text(encoding="utf-8")
        self.assertIn("| tokens of a dialogue | no window | window 16 |", page)
        self.assertRegex(page, r"\| 64 \| [\d.]+ \| [\d.]+ \|")
        self.assertGreater((directory / "windows.png").stat().st_size, 5_000)


if __name__ == "__main__":
    absltest.main()
