"""The files of a run to what a page says about it: facts, config, sessions, and what it was trained on."""

import hashlib
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dialog_jax.training import metrics, run_directory, sessions, trainable
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.run_directory import RunModel
from dialog_jax.training.trained_models import Checkpoint

_NAMES_SHOWN = 50  # dialogues per reason


class Run(NamedTuple):
    """What is read of a run's directory."""

    name: str
    path: pathlib.Path
    config: TrainConfig
    model: RunModel
    checkpoint: Checkpoint
    """The one that the page is about."""
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    sessions: list[dict[str, Any]]

    @property
    def before(self) -> dict[str, Any] | None:
        """The held-out figures before training."""
        return next((line for line in self.evaluations if line["step"] == 0), None)

    @property
    def after(self) -> dict[str, Any] | None:
        """The held-out figures of the checkpoint."""
        return next((line for line in self.evaluations if line["step"] == self.checkpoint.step), None)


class Table(NamedTuple):
    """A table of texts."""

    headings: list[str]
    rows: list[list[str]]


def read_run(path: pathlib.Path, config: TrainConfig, model: RunModel, checkpoint: Checkpoint) -> Run:
    """Returns the run with its figures."""
    return Run(
        name=path.resolve().name,
        path=path,
        config=config,
        model=model,
        checkpoint=checkpoint,
        metrics=metrics.read_records(path / "metrics.jsonl"),
        evaluations=metrics.read_records(path / "evaluation.jsonl"),
        sessions=sessions.read_sessions(path),
    )


def list_facts(run: Run) -> list[tuple[str, str]]:
    """Returns (name, value) of each fact; what the run did not record is said to be missing."""
    hashes = run_directory.read_hashes(run.path)
    last = run.metrics[-1] if run.metrics else {}
    steps = max(hashes.get("steps", 0), last.get("step", 0))
    checkpoint = run.checkpoint
    kind = "the best by held-out loss" if checkpoint.step == checkpoint.best else "the latest; none was evaluated"
    facts = [
        ("base model", run.model.base.hub_name or run.config.model),
        ("parameters", "; ".join(line for line in trainable.describe(run.model.selection) if not line.startswith(" "))),
        ("updates", f"{last.get('step', 0):,} of {steps:,}" + _describe_skipped(last)),
        ("checkpoint of this page", f"step {checkpoint.step:,}, {kind}"),
        ("held-out loss", _describe_change(run, "loss", "{:.4f}", " nats per token")),
        ("held-out accuracy", _describe_change(run, "accuracy", "{:.2%}", "")),
        ("computed in", hashes.get("compute_dtype", "not recorded")),
    ]
    if run.metrics:
        tokens, targets = (sum(line[name] for line in run.metrics) for name in ("tokens", "targets"))
        seconds = sum(line["seconds"] for line in run.metrics)
        speed = statistics.median(line["tokens_per_second"] for line in run.metrics)
        facts += [
            ("tokens read", f"{tokens:,}, of them {targets:,} targets"),
            ("time in updates", f"{format_seconds(seconds)}; median {speed:,.0f} tokens/s"),
        ]
    startups = [line["startup_seconds"] for line in run.metrics if "startup_seconds" in line]
    if startups:
        facts.append(("time to the first update", ", ".join(map(format_seconds, startups))))
    return facts


def _describe_skipped(last: Mapping[str, Any]) -> str:
    return f", {last['skipped']:,} skipped because loss or gradient was not finite" if last.get("skipped") else ""


def _describe_change(run: Run, name: str, form: str, unit: str) -> str:
    values = [form.format(line[name]) for line in (run.before, run.after) if line]
    return " → ".join(values) + unit if values else "not evaluated"


def format_seconds(seconds: int | float) -> str:
    """Returns 0.4 s, 75 s as 1 min 15 s, and so on."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def compare_configs(configs: Mapping[str, TrainConfig]) -> Table:
    """Returns the fields in which one of the configs differs from the defaults or from another."""
    defaults = run_directory.flatten_config(TrainConfig().resolve())
    flat = [run_directory.flatten_config(config.resolve()) for config in configs.values()]
    # A mapping such as data.mix is flattened to fields that the defaults lack.
    fields = dict.fromkeys([*defaults, *(field for one in flat for field in one)])
    rows = [
        [field, *(_format_value(one.get(field, "")) for one in (defaults, *flat))]
        for field in fields
        if any(one.get(field, "") != defaults.get(field, "") for one in flat)
    ]
    return Table(["field", "default", *configs], rows)


def _format_value(value: Any) -> str:
    return value or "(empty)" if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tabulate_sessions(run: Run) -> Table:
    """Returns one row per process that trained here."""
    rows = [
        [
            one["started"].replace("T", " "),
            f"{one['step']:,}",
            ", ".join(f"{count} x {kind}" for kind, count in one["devices"].items()) + f" ({one['system']})",
            f"{one['processes']:,}",
            f"Python {one['python']}, " + ", ".join(f"{name} {version}" for name, version in one["packages"].items()),
        ]
        for one in run.sessions
    ]
    return Table(["started", "from step", "devices", "processes", "versions"], rows)


class TrainedSet(NamedTuple):
    """What became of one set of dialogues."""

    field: str
    figures: list[tuple[str, int]]
    named: list[tuple[str, int, list[str]]]
    """(reason, number, the first of the dialogues) for what is not trained on completely."""


def read_sets(run: Run) -> list[TrainedSet]:
    """Returns what the run's prepared data says of each set; a set whose files are not there is left out."""
    hashes = run_directory.read_hashes(run.path)
    fields = {value: field for field, value in hashes.items() if field.startswith("data.")}
    cache = pathlib.Path(run.config.data.cache_dir) if run.config.data.cache_dir else run.path / "trees"
    sets = []
    for file in sorted(cache.glob("*/report.json")):
        key = json.loads((file.parent / "key.json").read_text(encoding="utf-8"))
        key.pop("format")
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if digest in fields:
            sets.append(_describe_set(fields[digest], json.loads(file.read_text(encoding="utf-8"))))
    return sorted(sets, key=lambda one: list(hashes).index(one.field))


def _describe_set(field: str, report: Mapping[str, Any]) -> TrainedSet:
    columns = {
        "dialogues": report["dialogues"],
        "trees": report["trees"],
        "that branch": report["branching"],
        "divided": report["divided"],
        "tokens": report["tokens"],
        "targets": report["targets"],
        "responses": report["turns"],
        "behind a shortened history": report["turns_shortened"],
        "responses left out": report["turns_cut"],
        "dialogues dropped, too long": report["dropped_too_long"],
        "dialogues dropped, no target": report["dropped_no_target"],
        "records skipped": report["skipped"],
    }
    named: Sequence[tuple[str, list[str]]] = sorted(report["named"].items())
    return TrainedSet(
        field, list(columns.items()), [(reason, len(names), names[:_NAMES_SHOWN]) for reason, names in named]
    )
