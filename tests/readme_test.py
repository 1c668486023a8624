"""The README says nothing that cannot be found: the tests, files and fields that it names are there."""

import pathlib
import re

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parents[1]


class ReadmeTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.text = (_ROOT / "README.md").read_text(encoding="utf-8")

    def test_tests_that_it_names_are_there(self):
        named = set(re.findall(r"`(test_\w+)`", self.text))
        self.assertGreater(len(named), 30)
        written = "".join(file.read_text(encoding="utf-8") for file in (_ROOT / "tests").rglob("*_test.py"))
        self.assertEmpty(named - set(re.findall(r"def (test_\w+)\(", written)))

    def test_files_that_it_names_are_there(self):
        named = set(re.findall(r"\b((?:scripts|experiments)/[\w/.-]+\.(?:py|sh|ipynb|md|yaml))\b", self.text))
        self.assertGreater(len(named), 15)
        self.assertEmpty([name for name in sorted(named) if not (_ROOT / name).is_file()])


if __name__ == "__main__":
    absltest.main()
