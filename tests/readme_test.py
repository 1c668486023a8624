"""README, BUILD.md and docs/ name only what exists: tests, files, modules, functions, commands, flags and fields."""

import ast
import dataclasses
import pathlib
import re
import shlex
import typing
from collections.abc import Iterator

from absl.testing import absltest, parameterized

from dialog_jax import __main__ as entry
from dialog_jax.training.config import TrainConfig

_ROOT = pathlib.Path(__file__).parents[1]
_DOCS = ("README.md", "BUILD.md", *(f"docs/{file.name}" for file in sorted((_ROOT / "docs").glob("*.md"))))
_RESULTS = tuple(f"experiments/results/{file.name}" for file in sorted((_ROOT / "experiments/results").glob("*.md")))
_EXPERIMENTS = tuple(f"experiments/{file.name}" for file in sorted((_ROOT / "experiments").glob("*.py")))
# Written by commands in the documents.
_GENERATED = ("runs/", "assets/", "damaged/")
_COMMAND_FILES = {name: _ROOT / "dialog_jax/commands" / f"{name}.py" for name in entry.COMMANDS}
_SHARED_FLAGS = {
    "config": "config_flag.define",
    "data": "config_inputs.define_data",
    "adapter": "config_inputs.define_adapter",
    "base": "config_inputs.define_base",
}
_SUFFIXES = ("py", "md", "json", "jsonl", "png")


def _read(name: str) -> str:
    """Returns the text of a document, or the docstring of a Python file."""
    text = (_ROOT / name).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(text)) or "" if name.endswith(".py") else text


def _defined_names(file: pathlib.Path) -> set[str]:
    """Returns the names that a module defines at its top level, and `Class.attribute` for its classes."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    names.add(f"{node.name}.{item.name}")
                elif isinstance(item, ast.AnnAssign):
                    names.add(f"{node.name}.{ast.unparse(item.target)}")
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def _imported_names(file: pathlib.Path) -> set[str]:
    """Returns the names that a module imports at its top level, which can be imported from it."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}


def _modules() -> dict[str, pathlib.Path]:
    """Returns {dotted name: file} of the package."""
    files = (_ROOT / "dialog_jax").rglob("*.py")
    return {".".join(file.relative_to(_ROOT).with_suffix("").parts): file for file in files}


def _config_fields(config: type = TrainConfig, prefix: str = "") -> Iterator[str]:
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        yield prefix + field.name
        if dataclasses.is_dataclass(types[field.name]):
            yield from _config_fields(types[field.name], f"{prefix}{field.name}.")


def _command_lines(text: str) -> Iterator[list[str]]:
    """Yields the words of each `dialog_jax COMMAND ...` in code blocks and in code spans."""
    blocks = re.findall(r"^ {4}(?:.*\\\n)*.*", text, re.MULTILINE)
    for code in [*blocks, *re.findall(r"`([^`\n]+)`", text)]:
        match = re.search(r"(?:^|[\s/=\d])dialog_jax ([a-z]+\b.*)", code.replace("\\\n", " "), re.DOTALL)
        if match:
            yield shlex.split(match[1], comments=True)


class DocumentTest(parameterized.TestCase):
    @parameterized.parameters(*_DOCS, *_RESULTS)
    def test_tests_exist(self, name):
        files = "".join(file.read_text(encoding="utf-8") for file in (_ROOT / "tests").rglob("*_test.py"))
        defined = set(re.findall(r"def (test_\w+)\(", files))
        self.assertEmpty(set(re.findall(r"`(test_\w+)`", _read(name))) - defined)

    @parameterized.parameters(*_DOCS, *_RESULTS, *_EXPERIMENTS)
    def test_files_exist(self, name):
        paths = re.findall(
            r"(?<![\w./-])(?:\.\./|\./)*[\w-]+(?:/[\w.-]+)*/[\w.-]+\.(?:py|sh|ipynb|md|yaml|json|png|jinja|txt)\b",
            _read(name),
        )
        paths += re.findall(
            r"(?<![\w./-])(?:scripts|experiments|tests|docs|dialog_jax)(?:/[\w-]+)+(?![\w./*-])", _read(name)
        )
        bases = (_ROOT / name).parent, _ROOT, _ROOT / "dialog_jax"
        missing = [path for path in paths if not any((base / path).exists() for base in bases)]
        self.assertEmpty([path for path in missing if not path.startswith(_GENERATED)])

    @parameterized.parameters(*_DOCS, *_RESULTS)
    def test_links_lead_to_files_and_headings(self, name):
        for target in re.findall(r"\]\(([^)\s]+)\)", _read(name)):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (_ROOT / name).parent / path if path else _ROOT / name
            self.assertTrue(file.exists(), target)
            if anchor:
                headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                self.assertIn(anchor, anchors)

    @parameterized.parameters(*_DOCS, *_RESULTS)
    def test_modules_and_their_names_exist(self, name):
        modules = _modules()
        text = _read(name)
        for module, names in re.findall(r"from (dialog_jax[\w.]*) import ([\w, ]+)", text):
            for imported in names.split(", "):
                file = modules.get(module)
                names = _defined_names(file) | _imported_names(file) if file else set()
                self.assertTrue(f"{module}.{imported}" in modules or imported in names, f"{module} {imported}")
        fields = set(_config_fields())
        short_names = {dotted.rpartition(".")[2]: file for dotted, file in modules.items()}
        for module, attribute in re.findall(r"`(?:[\w.]+\.)?([a-z_]+)\.([A-Za-z_]\w*(?:\.\w+)?)(?:\(\))?`", text):
            if module in short_names and f"{module}.{attribute}" not in fields and attribute not in _SUFFIXES:
                self.assertIn(attribute, _defined_names(short_names[module]), f"{module}.{attribute}")

    @parameterized.parameters(*_DOCS)
    def test_config_fields_exist(self, name):
        fields = set(_config_fields())
        sections = "|".join(sorted({field.partition(".")[0] for field in fields if "." in field}))
        text = _read(name)
        named = re.findall(r"--config\.([a-z_.0-9]+)=", text) + re.findall(rf"`((?:{sections})\.[a-z_0-9]+)[`=]", text)
        self.assertEmpty({field for field in named if not field.endswith(".py")} - fields)

    @parameterized.parameters(*_DOCS, *_EXPERIMENTS)
    def test_commands_and_their_flags_exist(self, name):
        for command, *words in _command_lines(_read(name)):
            self.assertIn(command, entry.COMMANDS)
            source = _COMMAND_FILES[command].read_text(encoding="utf-8")
            flags = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | {"help", "debug"}
            flags |= {name for name, function in _SHARED_FLAGS.items() if f"{function}(" in source}
            used = {re.split(r"[=.]", word.removeprefix("--"))[0] for word in words if word.startswith("--")}
            self.assertEmpty(used - flags, f"dialog_jax {command}")

    def test_readme_links_every_document(self):
        self.assertEmpty(set(_DOCS[1:]) - set(re.findall(r"\]\(([^)\s#]+)", _read("README.md"))))

    def test_every_document_checks_something(self):
        text = "".join(map(_read, _DOCS))
        self.assertGreater(len(re.findall(r"`(test_\w+)`", text)), 50)
        self.assertGreater(len(list(_command_lines(text))), 20)
        self.assertGreater(len(re.findall(r"--config\.", text)), 10)

    def test_readme_has_at_most_130_lines_and_names_every_command(self):
        text = _read("README.md")
        self.assertLessEqual(len(text.splitlines()), 130)
        listed = re.findall(r"^    dialog_jax (\w+)  ", text, re.MULTILINE)
        self.assertCountEqual(listed, entry.COMMANDS)


if __name__ == "__main__":
    absltest.main()
