"""Sends the figures of a run to experiment trackers, each through its own library.

All of them get the same figures under the same names: train/loss, held_out/loss, held_out_turns/0 and so on. The run's
own files always have these figures, so a tracker that fails is reported and left out, and the run goes on. Only process
0 has trackers. A library is imported only by a run that names its tracker.

A run that was killed repeats the steps after its last checkpoint, with the same losses. They are sent again: the last
figures before the kill may not have arrived, and plotted over the step both passes coincide.
"""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.training import distributed, run_directory, sessions
from dialog_jax.training.config import TrainConfig

_IDS = "trackers.json"
_PROJECT = "dialog_jax"
_EXTRAS = ("wandb", "trackio")  # trackers whose library is an extra of the same name
_CONNECT_SECONDS, _UPLOAD_SECONDS = 20, 30  # timeouts at the start, and for pending uploads at the end of a run
_OFFLINE = ("offline", "dryrun", "disabled")  # modes of wandb that need no login
_INTERRUPTED = 255  # exit code that wandb gives a run which Ctrl-C ended


class Tracker(Protocol):
    """One program. Any method can raise any error of its library."""

    place: str
    """Where its figures are, to be printed; empty if there is nothing to print."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends figures of a step."""

    def close(self, exit_code: int) -> None:
        """Ends the run: 0 if it is finished, 255 if a signal stopped it, 1 after an error."""


def check(config: TrainConfig) -> None:
    """Raises UserError if a tracker's library is not installed, or Weights & Biases has no login."""
    for name in _EXTRAS:
        if name in config.trackers and importlib.util.find_spec(name) is None:
            raise UserError(
                f"trackers names {name}, which is not installed. Run: pip install -e '.[{name}]', or pip install {name}"
            )
    if "wandb" in config.trackers:
        _check_login()


def _check_login() -> None:
    wandb = _import_wandb()
    settings = wandb.setup(wandb.Settings(show_info=False)).settings  # warnings, such as of failed uploads, are shown
    # Of the environment of now, not of wandb's first use in this process.
    if os.environ.get("WANDB_MODE", settings.mode) in _OFFLINE or wandb.run is not None:
        return
    try:
        has_login = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise UserError(f"wandb: {error} Run: wandb login, or set WANDB_MODE=offline.") from error
    if not has_login:
        raise UserError(
            "trackers includes wandb, but you are not logged in to Weights & Biases. Run: wandb login, or set "
            "WANDB_MODE=offline to upload later."
        )


def _import_wandb():
    """Returns the module of wandb, which reports its own errors, with paths of this machine, unless told not to."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


class _TensorBoard:
    """Event files in tensorboard/, one per session. The newest hides steps of the earlier ones that it repeats."""

    place = ""

    def __init__(self, directory: pathlib.Path, step: int, config: Mapping[str, Any]):
        del config
        (directory / "tensorboard").mkdir(exist_ok=True)
        # Not a SummaryWriter: its thread ends at the first error, such as a full disk, and later writes block forever.
        self._writer = event_file_writer.EventsWriter(str(directory / "tensorboard" / "events"), f".{step}")
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # hides earlier events of later steps
        self._writer.write_event(event_pb2.Event(step=step + 1 if step else 0, session_log=session))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        # Not tensorboardX.summary.scalar, which changes names.
        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        summary = summary_pb2.Summary(value=values)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        del exit_code
        self._writer.close()


class _Wandb:
    """Weights & Biases. All sessions are one run there, or several directories of one run if they are offline."""

    def __init__(self, directory: pathlib.Path, step: int, config: Mapping[str, Any]):
        del step
        wandb = _import_wandb()
        # An id of the environment, such as that of a sweep's trial, comes first.
        run_id = os.environ.get("WANDB_RUN_ID") or _find_run_id(directory, "wandb")
        settings = wandb.Settings(
            silent=True,
            reinit="create_new",  # a run of the caller's own, in a notebook, stays as it is
            init_timeout=_CONNECT_SECONDS,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            host="",
            x_disable_machine_info=True,  # hardware, path and arguments of the program, e-mail address
            x_disable_stats=True,
            x_save_requirements=False,
            finish_timeout=_UPLOAD_SECONDS,
            finish_timeout_raises=True,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", directory.resolve().name),
            mode=os.environ.get("WANDB_MODE"),
            id=run_id,
            resume="allow",
            dir=directory,
            config=dict(config),
            allow_val_change=True,
            settings=settings,
        )
        # The step is a figure like others, because wandb drops what is logged below its own count of steps.
        self._run.define_metric("step", hidden=True)
        for name in ("train/*", "held_out/*", "held_out_turns/*"):
            self._run.define_metric(name, step_metric="step")
        self._upload = f"wandb sync {pathlib.Path(self._run.dir).parent}"
        self.place = f"offline; upload with: {self._upload}" if self._run.offline else self._run.url or "disabled"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError as error:
            raise TimeoutError(f"not all was uploaded in {_UPLOAD_SECONDS} s; run: {self._upload}") from error


class _Trackio:
    """Trackio. All sessions are one run there. Its library warns on its own of figures that it could not write."""

    def __init__(self, directory: pathlib.Path, step: int, config: Mapping[str, Any]):
        del step
        import trackio
        from trackio import context_vars

        run_id = _find_run_id(directory, "trackio")
        project, name = os.environ.get("TRACKIO_PROJECT", _PROJECT), directory.resolve().name
        # Ours is not the current run: that may be the caller's own, and is finished with a line when the process ends.
        token = context_vars.current_run.set(None)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._run = trackio.init(
                    project, name, config=dict(config), embed=False, auto_log_gpu=False, auto_log_cpu=False
                )
        finally:
            context_vars.current_run.reset(token)
        self._run.id = run_id  # trackio resumes by name alone, and directories in several places may have the same name
        self.place = f"run {name}; {self._run.url or f'show it with: trackio show --project {project}'}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, exit_code: int) -> None:
        del exit_code  # a run has no state there
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


_TRACKERS: dict[str, Callable[[pathlib.Path, int, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def _find_run_id(directory: pathlib.Path, name: str) -> str:
    """Returns the id that a run has at a tracker, the same in all its sessions."""
    file = directory / _IDS
    ids = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if name not in ids:
        ids[name] = secrets.token_hex(8)
        atomic_files.write_text(file, json.dumps(ids) + "\n")
    return ids[name]


class Trackers:
    """The open trackers of a run; `report` prints a line."""

    def __init__(self, report: Callable[[str], None]):
        self._report = report
        self._open: dict[str, Tracker] = {}

    def open(self, name: str, directory: pathlib.Path, step: int, config: Mapping[str, Any]) -> None:
        """Opens a tracker for a run that begins at `step`, or resumes from there."""
        with self._survive_errors(name):
            self._open[name] = tracker = _TRACKERS[name](directory, step, config)
            if tracker.place:
                self._report(f"{name}: {tracker.place}")

    def train(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends the figures of update `step`."""
        self._log(step, {f"train/{name}": value for name, value in figures.items()})

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Sends the result of `metrics.Evaluation.figures` after update `step`."""
        values = {f"held_out/{name}": figures[name] for name in ("loss", "accuracy")}
        turns = {f"held_out_turns/{turn['turn']}": turn["loss"] for turn in figures["turns"]}
        self._log(step, values | turns)

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            with self._survive_errors(name):
                tracker.log(step, figures)

    def close(self, exit_code: int) -> None:
        """Ends the run at every tracker, see `Tracker.close`."""
        for name, tracker in list(self._open.items()):
            with self._survive_errors(name):
                tracker.close(exit_code)

    @contextlib.contextmanager
    def _survive_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # errors of these libraries have no common class, and none is worth a run
            self._open.pop(name, None)
            described = " ".join(f"{type(error).__name__}: {error}".split())
            self._report(
                f"{name} failed and is left out of this session; metrics.jsonl and evaluation.jsonl have all figures. "
                f"{described}"
            )


@contextlib.contextmanager
def open_trackers(
    config: TrainConfig, directory: pathlib.Path, step: int, report: Callable[[str], None]
) -> Iterator[Trackers]:
    """Opens the trackers of the config on process 0, and no other; closes them with the outcome of the block.

    Args:
      step: from which the run resumes.
      report: prints a line.
    """
    trackers = Trackers(report)
    exit_code = 1
    try:
        if distributed.is_primary():
            versions = {f"packages.{name}": version for name, version in sessions.read_versions().items()}
            for name in config.trackers:
                trackers.open(name, directory, step, run_directory.flatten_config(config) | versions)
        yield trackers
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = _INTERRUPTED
        raise
    finally:
        trackers.close(exit_code)
