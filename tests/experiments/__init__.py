"""The experiments are scripts that import each other by file name; so do their tests."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments"))
