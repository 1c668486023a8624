"""Flags of an experiment, and its results as files: a Markdown table and a plot, with command, versions and machine.

Does not know what is measured.
"""

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import matplotlib
from absl import app, flags, logging

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dialog_jax import atomic_files
from dialog_jax.errors import UserError

GREY, BLUE, ORANGE, GREEN = "#6b7682", "#1f5fa8", "#c2681f", "#3a7d44"
DPI = 120
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of an experiment."""

    name: str
    """Name of the script and of its result files."""
    model: str = "assets/smollm2-135m-instruct"
    """Hugging Face model directory, .gguf file or Hub name."""
    train: str = "assets/chitchat/train.jsonl"
    """File of training dialogues."""
    validation: str = "assets/chitchat/validation.jsonl"
    """File of held-out dialogues."""
    results_dir: str = "experiments/results"
    """Directory for table and plot, created if missing."""
    runs_dir: str = ""
    """Directory for runs, which are kept and not trained again; empty for an experiment that keeps none."""
    steps: int = 0
    """Updates of each training; 0 if nothing is trained or the experiment determines them."""
    seed: int = 0
    """Seed of the order of the training data."""

    @property
    def command(self) -> str:
        """The command line without defaults; absolute paths are shortened to their last part."""
        shown = [f"--steps={self.steps}", f"--seed={self.seed}"] if self.steps else []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("model", "train", "validation") and value != field.default:
                name = os.path.basename(value.rstrip(os.sep)) if os.path.isabs(value) else value
                shown.append(f"--{field.name}={name}")
        return " ".join(["python", f"experiments/{self.name}.py", *shown])


def run_script(main: Callable[[Options], None], name: str, *, steps: int = 0, runs_dir: str = "") -> None:
    """Runs an experiment from the command line.

    Args:
      steps: default of --steps; 0 for an experiment that has no such flag.
      runs_dir: default of --runs_dir; empty for an experiment that keeps no runs.
    """
    defaults = Options(name=name, steps=steps)
    flags.DEFINE_string("model", defaults.model, "Hugging Face model directory, .gguf file or Hub name.")
    flags.DEFINE_string("train", defaults.train, "File of training dialogues.")
    flags.DEFINE_string("validation", defaults.validation, "File of held-out dialogues.")
    flags.DEFINE_string("results_dir", defaults.results_dir, "Directory for table and plot, created if missing.")
    names = ["model", "train", "validation", "results_dir"]
    if runs_dir:
        flags.DEFINE_string("runs_dir", runs_dir, "Directory for runs, which are kept and not trained again.")
        names.append("runs_dir")
    if steps:
        flags.DEFINE_integer("steps", steps, "Updates of each training.", lower_bound=1)
        flags.DEFINE_integer("seed", defaults.seed, "Seed of the order of the training data.", lower_bound=0)
        names += ["steps", "seed"]

    def run(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
        logging.set_verbosity(logging.WARNING)
        try:
            values: dict[str, Any] = {flag: flags.FLAGS[flag].value for flag in names}
            main(Options(name=name, **values))
        except (UserError, OSError) as error:
            sys.exit(f"{name}.py: {error}")

    app.run(run)


def style():
    """Returns a context with the common style of figures."""
    return plt.rc_context(
        {"font.size": 10, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False}
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; all columns but the first are right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def write(options: Options, figure: Figure, paragraphs: Sequence[str], *, seconds: float | None) -> list[pathlib.Path]:
    """Writes NAME.md and NAME.png into the results directory and returns their paths.

    Args:
      paragraphs: text after the head with command, date, versions, machine and time.
      seconds: wall time of the experiment. CPU time is reported as well, since it depends less on other load. None for
        an experiment that keeps its runs, of which this process may have made a part.
    """
    directory = pathlib.Path(options.results_dir)
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / f"{options.name}.png"
    with atomic_files.replace(picture) as unfinished:
        figure.savefig(unfinished, dpi=DPI)
    plt.close(figure)
    head = [
        f"Command: `{options.command}`",
        f"Date: {datetime.date.today().isoformat()}",
        f"Versions: {versions()}",
        f"Machine: {machine()}",
    ]
    if seconds is not None:
        head.append(f"Time: {seconds / 60:.1f} min, {_cpu_seconds() / 60:.1f} min of CPU time over all cores")
    text = directory / f"{options.name}.md"
    atomic_files.write_text(
        text, "\n\n".join(["  \n".join(head), *paragraphs, f"![{options.name}]({picture.name})"]) + "\n"
    )
    return [text, picture]


def _cpu_seconds() -> float:
    """Returns the CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def versions() -> str:
    """Returns the versions of Python and packages: `Python 3.11.9, jax 0.10.2, ...`."""
    packages = ("jax", "flax", "optax", "transformers", "numpy")
    shown = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join([f"Python {platform.python_version()}", *shown])


def machine() -> str:
    """Returns a description such as `two cores of an AMD EPYC with AVX-512`."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{_count(len(devices))} {devices[0].device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kind = fields.get("model name") or platform.machine()
    vectors = " with AVX-512" if "avx512f" in fields.get("flags", "").split() else ""
    article = "an" if kind[:1] in "AEIOUaeiou" else "a"
    return f"{_count(cores)} core{'s' if cores != 1 else ''} of {article} {kind}{vectors}"


def _count(number: int) -> str:
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes labels (x, y, text, color) to the right of line ends, spaced so that they do not overlap."""
    low, high = axes.get_ylim()
    spacing = 0.065 * (high - low)
    right = max(x for x, _, _, _ in ends)
    lowest = -float("inf")
    for _, y, text, color in sorted(ends, key=lambda end: end[1]):
        lowest = max(y, lowest + spacing)
        axes.annotate(
            text, (right, lowest), (8, 0), textcoords="offset points", va="center", color=color, annotation_clip=False
        )
