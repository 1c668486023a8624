"""What a run prints while it trains, and the clocks behind its figures."""

import contextlib
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Mapping

import rich.console
import rich.progress
import rich.table
import rich.text


def quiet_libraries() -> None:
    """Hides what transformers, orbax and the Hub's client log; errors are raised as well.

    Call it before transformers is imported: that import logs that PyTorch is missing.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.CRITICAL)


def make_console(*, quiet: bool) -> rich.console.Console:
    """Returns the console of a run. In a notebook it prints plain lines: rich's bars need widgets there."""
    in_notebook = rich.console.Console().is_jupyter
    return rich.console.Console(
        highlight=False,
        soft_wrap=True,
        quiet=quiet,
        force_jupyter=False,
        force_terminal=False if in_notebook else None,
    )


class Clock:
    """Measures seconds between updates, without evaluations and saves."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a lap."""
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the lap began and starts the next."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last


class Startup:
    """Seconds from `start_time` to the first step, by consecutive parts.

    Args:
      start_time: of the process, on the clock of `time.monotonic`; None for now. The time before now is `loading`.
    """

    def __init__(self, start_time: float | None = None) -> None:
        now = time.monotonic()
        self.parts: dict[str, float] = {} if start_time is None else {"loading": now - start_time}
        self._last = now

    def done(self, part: str) -> None:
        """Ends a part, which began where the previous one ended."""
        last, self._last = self._last, time.monotonic()
        self.parts[part] = self.parts.get(part, 0.0) + self._last - last

    @property
    def seconds(self) -> float:
        """Returns the sum over all parts."""
        return sum(self.parts.values())

    @property
    def line(self) -> str:
        """Returns "first step after 4.2 s: 2.0 s loading, 1.9 s preparing, 0.3 s compiling"."""
        parts = ", ".join(f"{seconds:.1f} s {part}" for part, seconds in self.parts.items())
        return f"first step after {self.seconds:.1f} s: {parts}"


def find_process_start() -> float:
    """Returns when this process started, on the clock of `time.monotonic`; the current time where /proc is missing."""
    now = time.monotonic()
    stat = pathlib.Path("/proc/self/stat")
    if not stat.exists():
        return now
    ticks = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return now - max(0.0, age)


def _format_time(seconds: float) -> str:
    """Returns "26:03:09", also for more than a day, where `datetime.timedelta` and rich take more columns."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class _Elapsed(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(_format_time(task.elapsed or 0.0))


class Progress:
    """Shows updates while it is open: a bar on a terminal, lines elsewhere."""

    def __init__(self, console: rich.console.Console, steps: int, start: int):
        self._console, self._steps = console, steps
        self._first: tuple[int, float] | None = None  # the first update that this process shows, and when
        self._bar = rich.progress.Progress(
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(bar_width=None, table_column=rich.table.Column(ratio=1)),  # what others leave
            rich.progress.TextColumn("{task.description}"),
            _Elapsed(),
            rich.progress.TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=steps, completed=start, left="")

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Shows one update."""
        parts = [f"loss {figures['loss']:.3f}", f"{figures['tokens_per_second']:,.0f} tokens/s"]
        if "peak_memory_gb" in figures:
            parts.append(f"{figures['peak_memory_gb']:.1f} GB")
        text, seconds = "  ".join(parts), self._estimate_seconds_left(step)
        if self._console.is_terminal:
            left = "" if seconds is None else f"{_format_time(seconds)} left"
            self._bar.update(self._task, completed=step, description=text, left=left)
        elif step <= 2 or step == self._steps or step % max(1, self._steps // 20) == 0:
            left = "" if seconds is None else f"  {_format_time(seconds)} left"
            self._console.print(f"step {step:,} of {self._steps:,}  {text}{left}")

    def _estimate_seconds_left(self, step: int) -> float | None:
        """Returns the remaining steps times the mean time of a step, with evaluations and saves; None at the first.

        The mean is over the steps after the first of this process, which contains compilation.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
            return None
        first_step, first_time = self._first
        return (self._steps - step) * (now - first_time) / (step - first_step)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Shows `evaluating` on the bar during the block."""
        before = self._bar.tasks[0].description
        self._bar.update(self._task, description="evaluating")
        yield
        self._bar.update(self._task, description=before)

    def print(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line)
