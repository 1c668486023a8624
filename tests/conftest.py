"""Which tests are `full`: those so marked, of some directories, of most families, and of a file's `FULL_PARAMETERS`.

Of a parameterized test with the mark `quick_every(n)`, cases 0, n, 2 n, ... are quick and the others full.

Importing `tests` in pytest's first process also makes the directory of compiled programs that its workers share.
"""

import os
import pathlib
import re

import pytest

_TESTS = pathlib.Path(__file__).parent
_FULL_DIRECTORIES = ("benchmarks", "experiments")
_FULL_FILES = ("pallas_gpu_test.py", "splash_test.py", "compilation_cache_test.py")  # emulated kernels, many processes
_LONGEST_FILES = ("many_processes_test.py", "run_test.py", "trained_test.py", "kill_test.py", "disk_cache_test.py")
# One byte-level, one that strips reasoning from the history, one with SentencePiece's spaces.
_QUICK_FAMILIES = ("chatml", "qwen3", "mistral")
_FULL_FAMILIES = ("llama3", "gemma", "plain", "phi3")


def _is_in_full_place(item: pytest.Item) -> bool:
    return item.path.relative_to(_TESTS).parts[0] in _FULL_DIRECTORIES or item.path.name in _FULL_FILES


def _is_of_full_parameters(item: pytest.Item) -> bool:
    """Whether all families among a parameterized test's parameters are of the full tier, or one of its file's own."""
    parameters = getattr(getattr(item, "function", None), "__x_params_repr__", "")  # what absl shows of them
    own = getattr(getattr(item, "module", None), "FULL_PARAMETERS", ())
    quick, full, others = (
        any(f"'{name}'" in parameters for name in names) for names in (_QUICK_FAMILIES, _FULL_FAMILIES, own)
    )
    return others or (full and not quick)


def _is_between_quick_cases(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("quick_every")
    return mark is not None and int(re.search(r"\d+$", item.name)[0]) % mark.args[0] != 0


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not full":
        os.environ.setdefault("DIALOG_JAX_LAWS", "quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A file runs in one worker. The longest start first, so that no worker ends alone.
    long_files = {item.path for item in items if item.get_closest_marker("full") or _is_in_full_place(item)}
    items.sort(key=lambda item: (item.path.name not in _LONGEST_FILES, item.path not in long_files))
    for item in items:
        if _is_in_full_place(item) or _is_of_full_parameters(item) or _is_between_quick_cases(item):
            item.add_marker(pytest.mark.full)
