"""Figures that each tracker has after sessions that end in all ways, read back without its library."""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import pathlib
import signal
import socket
import sqlite3
import struct
import sys
from unittest import mock

import jax
import pytest
from absl.testing import absltest, parameterized
from tensorboardX.proto import event_pb2

from dialog_jax.errors import UserError
from dialog_jax.training import distributed, metrics, trackers
from dialog_jax.training.config import DataConfig, TrainConfig
from dialog_jax.training.signals import StoppedError


def run_session(directory, tracker, start, stop, report=print):
    """Writes and sends the figures of the steps after `start` up to `stop`; before step 6 a signal stops the run."""
    config = TrainConfig(model="/somewhere/else/a_model", data=DataConfig(train="t"), trackers=(tracker,))
    trackers.check(config)
    with trackers.open_trackers(config, directory, start, report) as opened:
        writer = metrics.Writer(directory, step=start)
        for step in range(start + 1, stop + 1):
            writer.train(step, {"loss": 1 / step})
            opened.train(step, {"loss": 1 / step})
            if step == 4:
                turns = [{"turn": "1+", "loss": 8.0}]
                writer.evaluation(step, {"loss": 7.0, "accuracy": 0.5, "turns": turns})
                opened.evaluation(step, {"loss": 7.0, "accuracy": 0.5, "turns": turns})
        writer.close()
        if stop < 6:
            raise StoppedError(signal.SIGTERM, stop)


def read_events(file):
    """What a file of TensorBoard holds: records of a length, a checksum, an event and a checksum."""
    data = file.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def read_wandb(file):
    """The records of a .wandb file: a log of LevelDB, with parts of records in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # no room for the header of a part
            place += 2**15 - place % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def collect(rows):
    """{name: [(step, value), ...]} of (step, {name: value})."""
    values = {}
    for step, figures in rows:
        for name, value in figures.items():
            values.setdefault(name, []).append((step, value))
    return values


_EXPECTED = {
    "train/loss": [(step, 1 / step) for step in range(1, 7)],
    "held_out/loss": [(4, 7.0)],
    "held_out/accuracy": [(4, 0.5)],
    "held_out_turns/1+": [(4, 8.0)],
}
# Steps 3 to 5 are repeated.
_BOTH_SESSIONS = {name: points * 2 for name, points in _EXPECTED.items()}
_BOTH_SESSIONS["train/loss"] = [(step, 1 / step) for step in (1, 2, 3, 4, 5, 3, 4, 5, 6)]


class Fake:
    """A tracker that keeps what it gets and fails at the step `bad`."""

    place = "a place"

    def __init__(self, *, bad=None):
        self.bad, self.rows, self.exit_codes = bad, [], []

    def log(self, step, figures):
        if step == self.bad:
            raise RuntimeError("no network")
        self.rows.append((step, figures))

    def close(self, exit_code):
        self.exit_codes.append(exit_code)


class TrackersTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.create_tempdir().full_path)
        self.lines = []

    def open(self, *fakes):
        names = ("tensorboard", "wandb", "trackio")[: len(fakes)]
        made = {name: lambda *_, fake=fake: fake for name, fake in zip(names, fakes, strict=True)}
        self.enterContext(mock.patch.dict(trackers._TRACKERS, made))
        config = TrainConfig(trackers=names)
        return trackers.open_trackers(config, self.directory, 0, self.lines.append)

    def test_tracker_that_fails_is_left_out_and_named_once(self):
        bad, good = Fake(bad=2), Fake()
        with self.open(bad, good) as opened:
            for step in (1, 2, 3):
                opened.train(step, {"loss": 0.5})
        self.assertEqual([step for step, _ in bad.rows], [1])
        self.assertEqual([step for step, _ in good.rows], [1, 2, 3])
        self.assertEqual((bad.exit_codes, good.exit_codes), ([], [0]))
        self.assertEqual(self.lines[:2], ["tensorboard: a place", "wandb: a place"])
        (line,) = self.lines[2:]
        self.assertEqual(
            line,
            "tensorboard failed and is left out of this session; metrics.jsonl and evaluation.jsonl have all figures. "
            "RuntimeError: no network",
        )

    def test_tracker_that_does_not_start_is_named_and_the_others_do(self):
        broken = {"trackio": mock.Mock(side_effect=OSError("no room"))}
        config = TrainConfig(trackers=("trackio", "tensorboard"))
        with (
            mock.patch.dict(trackers._TRACKERS, broken),
            trackers.open_trackers(config, self.directory, 0, self.lines.append) as opened,
        ):
            opened.train(1, {"loss": 0.5})
        (line,) = self.lines
        self.assertStartsWith(line, "trackio failed and is left out of this session;")
        self.assertEndsWith(line, "OSError: no room")
        (file,) = (self.directory / "tensorboard").iterdir()
        self.assertEqual([event.step for event in read_events(file) if event.summary.value], [1])

    @parameterized.parameters((None, 0), (StoppedError(signal.SIGTERM, 3), 255), (ValueError(), 1))
    def test_tracker_is_told_how_the_run_ended(self, error, exit_code):
        fake = Fake()
        with contextlib.suppress(StoppedError, ValueError), self.open(fake):
            if error:
                raise error
        self.assertEqual(fake.exit_codes, [exit_code])

    def test_other_processes_track_nothing(self):
        fake = Fake()
        with mock.patch.object(distributed, "is_primary", lambda: False), self.open(fake) as opened:
            opened.train(1, {"loss": 0.5})
        self.assertEqual((fake.rows, fake.exit_codes, self.lines), ([], [], []))

    def test_missing_library_is_an_error_with_the_command_that_installs_it(self):
        for name in ("wandb", "trackio"):
            with (
                mock.patch.object(importlib.util, "find_spec", lambda name: None),
                self.assertRaisesRegex(
                    UserError, rf"{name}, which is not installed. Run: pip install -e '.\[{name}\]'"
                ),
            ):
                trackers.check(TrainConfig(trackers=(name,)))

    def test_tensorboard_shows_each_step_once(self):
        shown = {}
        for number, (start, stop) in enumerate(((0, 3), (0, 5), (2, 6))):  # twice from the beginning, and from 2
            before = set((self.directory / "tensorboard").glob("*"))
            with contextlib.suppress(StoppedError):
                run_session(self.directory, "tensorboard", start, stop)
            (file,) = {*(self.directory / "tensorboard").iterdir()} - before
            for event in read_events(file):
                if event.session_log.status == event_pb2.SessionLog.START:
                    shown = {key: value for key, value in shown.items() if key[1] < event.step}
                for value in event.summary.value:
                    self.assertNotIn((value.tag, event.step), shown)
                    shown[value.tag, event.step] = value.simple_value
            file.rename(file.with_name(f"{number}"))  # two may begin in the same second
        values = collect((step, {name: value}) for (name, step), value in shown.items())
        self.assertEqual(values.keys(), _EXPECTED.keys())
        for name, points in _EXPECTED.items():
            self.assertSequenceAlmostEqual([*itertools.chain(*values[name])], [*itertools.chain(*points)], places=6)


@pytest.mark.full
class LibrariesTest(absltest.TestCase):
    """A session that ends after step 5 and one that resumes from step 2 are one run and one curve."""

    def setUp(self):
        super().setUp()
        home = pathlib.Path(self.create_tempdir().full_path)
        self.directory = home / "mine"
        self.directory.mkdir()
        self.environment = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "TRACKIO_DIR": str(home / "trackio"),  # read when trackio is imported, for the first time here
            "PASSPHRASE": "open sesame",
        }
        self.enterContext(mock.patch.object(socket, "gethostname", lambda: "name_of_the_machine"))
        self.addCleanup(lambda: "wandb" in sys.modules and sys.modules["wandb"].teardown())  # forgets the environment

    def run_sessions(self, tracker, **environment):
        """The lines that the two report; the library itself prints nothing."""
        lines, printed = [], io.StringIO()
        self.enterContext(mock.patch.dict(os.environ, self.environment | environment, clear=True))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            with self.assertRaises(StoppedError):
                run_session(self.directory, tracker, 0, 5, lines.append)
            run_session(self.directory, tracker, 2, 6, lines.append)
        self.assertEqual(printed.getvalue(), "")
        return lines

    def test_wandb_offline_has_one_curve_of_both_sessions_and_nothing_of_the_machine(self):
        lines = self.run_sessions("wandb", WANDB_MODE="offline", WANDB_PROJECT="a_project")
        places = sorted((self.directory / "wandb").glob("offline-run-*"))
        self.assertEqual(lines, [f"wandb: offline; upload with: wandb sync {place}" for place in places])
        (run_id,) = json.loads((self.directory / "trackers.json").read_text()).values()
        rows, configs, exit_codes = [], [], []
        for place in places:
            (file,) = place.glob("*.wandb")
            for record in read_wandb(file):
                if record.WhichOneof("record_type") == "run":
                    self.assertEqual((record.run.run_id, record.run.project), (run_id, "a_project"))
                    self.assertEqual(record.run.display_name, "mine")
                    configs.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
                if record.WhichOneof("record_type") == "history":
                    items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                    figures = {name: json.loads(text) for name, text in items.items() if not name.startswith("_")}
                    rows.append((figures.pop("step"), figures))
                if record.WhichOneof("record_type") == "exit":
                    exit_codes.append(record.exit.exit_code)
            everything = b"".join(path.read_bytes() for path in (file, *(place / "files").rglob("*")) if path.is_file())
            for secret in ("open sesame", "PASSPHRASE", "name_of_the_machine", str(self.directory), "/somewhere"):
                self.assertNotIn(secret.encode(), everything)
        self.assertEqual(collect(rows), _BOTH_SESSIONS)
        self.assertEqual(exit_codes, [255, 0])
        self.assertEqual(configs[0]["data.train"], "t")
        self.assertEqual(configs[0]["packages.jax"], jax.__version__)

    def test_wandb_without_a_login_is_an_error_with_a_remedy(self):
        with (
            mock.patch.dict(os.environ, self.environment, clear=True),
            self.assertRaisesRegex(UserError, "not logged in to Weights & Biases. Run: wandb login, or set WANDB_MODE"),
        ):
            run_session(self.directory, "wandb", 0, 6)

    def test_a_run_of_the_caller_at_wandb_stays_open_and_has_no_figures_of_ours(self):
        environment = self.environment | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        self.enterContext(mock.patch.dict(os.environ, environment, clear=True))
        import wandb

        own = wandb.init(project="own", dir=self.directory.parent)
        run_session(self.directory, "wandb", 0, 6)
        own.log({"mine": 1})
        own.finish()
        (file,) = self.directory.parent.glob("wandb/offline-run-*/*.wandb")
        records = [one.history for one in read_wandb(file) if one.WhichOneof("record_type") == "history"]
        names = [item.key or item.nested_key[0] for one in records for item in one.item]
        self.assertEqual([name for name in names if not name.startswith("_")], ["mine"])
        self.assertLen(list((self.directory / "wandb").glob("offline-run-*")), 1)

    def test_trackio_has_one_curve_of_both_sessions(self):
        lines = self.run_sessions("trackio", TRACKIO_PROJECT="a_project")
        line = "trackio: run mine; show it with: trackio show --project a_project"
        self.assertEqual(lines, [line, line])
        with contextlib.closing(sqlite3.connect(self.directory.parent / "trackio" / "a_project.db")) as database:
            rows = database.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
            ((config,),) = database.execute("select config from configs").fetchall()
        self.assertLen({(name, run_id) for name, run_id, *_ in rows}, 1)
        self.assertEqual(rows[0][0], "mine")
        self.assertEqual(collect((step, json.loads(figures)) for *_, step, figures in rows), _BOTH_SESSIONS)
        self.assertEqual(json.loads(config)["packages.jax"], jax.__version__)
        self.assertEqual(json.loads(config)["model"], "a_model")


if __name__ == "__main__":
    absltest.main()
