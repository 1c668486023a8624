"""An experiment's flags, and its numbers as files: a table in Markdown and a picture, with how they came to be.

Knows nothing of what is measured.
"""

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import matplotlib
from absl import app, flags, logging

matplotlib.use("Agg")  # no window, and none needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dialog_jax.trees import disk_cache

GREY, BLUE, ORANGE, GREEN = "#6b7682", "#1f5fa8", "#c2681f", "#3a7d44"
DPI = 120
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What an experiment is told."""

    name: str
    """Of the script and of its results."""
    model: str = "assets/smollm2-135m-instruct"
    """A Hugging Face model directory, a .gguf file, or a hub name."""
    train: str = "assets/chitchat/train.jsonl"
    """Dialogues to train on."""
    validation: str = "assets/chitchat/validation.jsonl"
    """Held-out dialogues."""
    results_dir: str = "experiments/results"
    """Where the table and the picture go; made if missing."""
    steps: int = 0
    """Updates of each training; 0 where nothing is trained."""
    seed: int = 0
    """Of the order of the training data."""

    @property
    def command(self) -> str:
        """The command line, without what is as usual; absolute paths by their last part, since the file is shared."""
        shown = [f"--steps={self.steps}", f"--seed={self.seed}"] if self.steps else []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("model", "train", "validation") and value != field.default:
                name = os.path.basename(value.rstrip(os.sep)) if os.path.isabs(value) else value
                shown.append(f"--{field.name}={name}")
        return " ".join(["python", f"experiments/{self.name}.py", *shown])


def run_script(main: Callable[[Options], None], name: str, *, steps: int = 0) -> None:
    """Runs an experiment from the command line.

    Args:
      steps: the default of --steps; 0 for an experiment that trains nothing and has no such flag.
    """
    defaults = Options(name=name, steps=steps)
    flags.DEFINE_string("model", defaults.model, "A Hugging Face model directory, a .gguf file, or a hub name.")
    flags.DEFINE_string("train", defaults.train, "Dialogues to train on.")
    flags.DEFINE_string("validation", defaults.validation, "Held-out dialogues.")
    flags.DEFINE_string("results_dir", defaults.results_dir, "Where the table and the picture go; made if missing.")
    names = ["model", "train", "validation", "results_dir"]
    if steps:
        flags.DEFINE_integer("steps", steps, "Updates of each training.", lower_bound=1)
        flags.DEFINE_integer("seed", defaults.seed, "Of the order of the training data.", lower_bound=0)
        names += ["steps", "seed"]

    def run(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
        logging.set_verbosity(logging.WARNING)
        try:
            given: dict[str, Any] = {flag: flags.FLAGS[flag].value for flag in names}
            main(Options(name=name, **given))
        except (ValueError, FloatingPointError, OSError) as error:
            sys.exit(f"{name}.py: {error}")

    app.run(run)


def style():
    """A context in which figures look alike."""
    return plt.rc_context(
        {"font.size": 10, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False}
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers and stand to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def write(options: Options, figure: Figure, paragraphs: Sequence[str], *, seconds: float) -> list[pathlib.Path]:
    """Writes NAME.md and NAME.png into the directory of results, and returns them.

    Args:
      paragraphs: what follows the lines that say how the numbers came to be.
      seconds: of wall time that the experiment took. CPU time is given beside it, since it is much the same on a
        machine that is shared.
    """
    directory = pathlib.Path(options.results_dir)
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / f"{options.name}.png"
    unfinished = directory / f".{options.name}.unfinished.png"
    figure.savefig(unfinished, dpi=DPI)
    plt.close(figure)
    unfinished.replace(picture)
    head = "  \n".join(
        [
            f"Command: `{options.command}`",
            f"Date: {datetime.date.today().isoformat()}",
            f"Versions: {versions()}",
            f"Machine: {machine()}",
            f"Time: {seconds / 60:.1f} min, {time.process_time() / 60:.1f} min of CPU time over all cores",
        ]
    )
    text = directory / f"{options.name}.md"
    disk_cache.write_atomically(text, "\n\n".join([head, *paragraphs, f"![{options.name}]({picture.name})"]) + "\n")
    return [text, picture]


def versions() -> str:
    """Python 3.11.9, JAX 0.10.2, ..."""
    packages = ("jax", "flax", "optax", "transformers", "numpy")
    shown = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join([f"Python {platform.python_version()}", *shown])


def machine() -> str:
    """What computes, in words that name no machine: `two cores of an AMD EPYC with AVX-512`."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{_count(len(devices))} {devices[0].device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    described = pathlib.Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kind = fields.get("model name") or platform.machine()
    vectors = " with AVX-512" if "avx512f" in fields.get("flags", "").split() else ""
    article = "an" if kind[:1] in "AEIOUaeiou" else "a"
    return f"{_count(cores)} core{'s' if cores != 1 else ''} of {article} {kind}{vectors}"


def _count(number: int) -> str:
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes (x, y, text, colour) right of where lines end, far enough apart to be read."""
    low, high = axes.get_ylim()
    apart = 0.065 * (high - low)
    right = max(x for x, _, _, _ in ends)
    lowest = -float("inf")
    for _, y, text, color in sorted(ends, key=lambda end: end[1]):
        lowest = max(y, lowest + apart)
        axes.annotate(
            text, (right, lowest), (8, 0), textcoords="offset points", va="center", color=color, annotation_clip=False
        )
