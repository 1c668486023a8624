"""Measures dialog_jax and what a user would pick instead, in turn, on the same weights, dialogues and loss.

    python scripts/benchmarks/peers/run.py --out=runs/benchmark_peers

Full fine-tuning in float32 with AdamW (2e-5, gradients clipped at 1), loss on responses and their end of turn. Each
peer gets an environment of its own, made once from `requirements/` under --environments. Every round starts every
contestant as a process of its own, in an order that is rotated from round to round, so that a machine that slows down
slows all.
Writes peers.json (everything), peers.md (a table) and peers.png into --out, which also holds the inputs, the logs and,
as soon as it is measured, every round. A peer whose loss is another than ours before any update is not compared.

Real means: tokens of dialogues, padding not counted. Response means: tokens with loss, which is what all have in
common, however they cut or pack dialogues. Who packs reads the same dialogues in an order of its own; who pads reads
some of all lengths, grouped by length. Where less than all is wanted: --contestants=ours,trl_packed.
"""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import contestants
import environments
import shared_inputs
import summary
from absl import app, flags
from contestants import CONTESTANTS, NOT_MEASURED, Settings

from dialog_jax.errors import UserError

_OUT = flags.DEFINE_string("out", None, "A directory for results, inputs and logs.", required=True)
_ENVIRONMENTS = flags.DEFINE_string("environments", "runs/peers", "Where the peers' environments are, or are made.")
_MODEL = flags.DEFINE_string("model", "assets/smollm2-135m-instruct", "Model directory.")
_DATA = flags.DEFINE_string("data", "assets/chitchat/train.jsonl", "Dialogues: lines of JSON with messages.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 256, "How many of them, from the first on.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 1024, "Tokens of a row.", lower_bound=2)
_ROWS = flags.DEFINE_integer("rows", 2, "Rows of a step.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "How often each contestant runs.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 4, "Measured steps of a round, after one that is not.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 1200, "After which a contestant's round is ended, and counts as failed.")
_CONTESTANTS = flags.DEFINE_list("contestants", list(CONTESTANTS), f"Some of {', '.join(CONTESTANTS)}.")


def orders(names: list[str], rounds: int) -> list[list[str]]:
    """The order of each round: [a b c], [b c a], [c a b], ..."""
    return [names[turn % len(names) :] + names[: turn % len(names)] for turn in range(rounds)]


def machine() -> str:
    """What computes, in words that name no machine."""
    described = pathlib.Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    kind = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores of {kind}"


def run(out: pathlib.Path, names: list[str]) -> dict:
    """Makes environments and inputs, measures, and returns everything that was seen."""
    settings = Settings(
        model=pathlib.Path(_MODEL.value).absolute(),
        inputs=out.absolute() / "inputs",
        max_length=_MAX_LENGTH.value,
        rows=_ROWS.value,
        warmup=1,
        steps=_STEPS.value,
    )
    needed = dict.fromkeys(CONTESTANTS[name].environment for name in names)
    pythons = {"": pathlib.Path(sys.executable)}
    for name in filter(None, needed):
        print(f"environment {name}", flush=True)
        pythons[name] = environments.make(name, pathlib.Path(_ENVIRONMENTS.value))
    written = shared_inputs.write(
        settings.inputs,
        model=_MODEL.value,
        data=_DATA.value,
        dialogues=_DIALOGUES.value,
        max_length=_MAX_LENGTH.value,
        first=settings.warmup * settings.rows,
        spread=settings.steps * settings.rows,
    )
    print(f"inputs {written}", flush=True)
    loss, targets = contestants.our_compared_loss(settings, out / "compared_scores.jsonl")
    ours = {"compared_loss": loss, "compared_targets": targets}
    compared: dict[str, dict[str, Any]] = dict.fromkeys(summary.OURS, ours)
    rounds: list[dict[str, Any]] = []
    for name in names:
        if CONTESTANTS[name].environment:
            file = out / f"{name}_compared.json"
            command = contestants.comparing(name, settings, pythons[CONTESTANTS[name].environment], file)
            compared[name] = contestants.run(name, command, file, seconds=_SECONDS.value)
        print(f"{name}: {compared[name]}", flush=True)
    started = time.time()
    for number, order in enumerate(orders(names, _ROUNDS.value)):
        for name in order:
            file = out / f"{name}_{number}.json"
            command = contestants.measuring(name, settings, pythons[CONTESTANTS[name].environment], file)
            rounds.append(
                {"contestant": name, "round": number, **contestants.run(name, command, file, seconds=_SECONDS.value)}
            )
            with (out / "rounds.jsonl").open("a" if len(rounds) > 1 else "w", encoding="utf-8") as lines:
                lines.write(json.dumps(rounds[-1]) + "\n")
            told = rounds[-1].get("failed") or f"{rounds[-1]['real_tokens_per_second']:.1f} real tokens/s"
            print(f"round {number}, {name}: {told}; {(time.time() - started) / 60:.1f} min", flush=True)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "python": platform.python_version(),
        "command": " ".join(["python", "scripts/benchmarks/peers/run.py", *_shown_flags()]),
        "minutes": round((time.time() - started) / 60, 1),
        "inputs": written,
        "compared": compared,
        "versions": {name or "ours": environments.versions(pythons[name]) for name in needed},
        "rounds": rounds,
    }


def _shown_flags() -> list[str]:
    """Those that are given, but where environments are; an absolute path by its last part, since the file is shared."""
    shown = [f"--out={pathlib.Path(_OUT.value).name if os.path.isabs(_OUT.value) else _OUT.value}"]
    for flag in (_MODEL, _DATA, _DIALOGUES, _MAX_LENGTH, _ROWS, _ROUNDS, _STEPS, _CONTESTANTS):
        if flag.present:
            value = ",".join(flag.value) if isinstance(flag.value, list) else str(flag.value)
            shown.append(f"--{flag.name}={os.path.basename(value) if os.path.isabs(value) else value}")
    return shown


def write(seen: dict, out: pathlib.Path) -> str:
    """Writes peers.json, peers.md and peers.png; returns the text of the table.

    Raises:
      UserError: ours, or every peer, is missing; peers.json is written nevertheless.
    """
    labels = {name: one.label for name, one in CONTESTANTS.items()}
    seen = seen | {"summary": summary.summarise(seen["rounds"], seen["compared"])}
    (out / "peers.json").write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    told = summary.verdict(seen["summary"], labels)
    summary.plot(seen["summary"], labels, out / "peers.png")
    main_packages = ("jax", "flax", "torch", "transformers", "trl", "google-tunix")
    versions = [
        f"{name}: {', '.join(line.replace('==', ' ') for line in lines if line.partition('==')[0] in main_packages)}"
        for name, lines in seen["versions"].items()
    ]
    inputs = seen["inputs"]
    head = [
        f"Command: `{seen['command']}`",
        f"Date: {seen['date']}",
        f"Machine: {seen['machine']}; Python {seen['python']}",
        *versions,
        f"Time: {seen['minutes']} min",
        f"Inputs: {inputs['dialogues']} dialogues, {inputs['tokens']:,} tokens, {inputs['targets']:,} targets; "
        f"{inputs['longer_than_max_length']} dialogues are longer than a row. The last column is the loss on "
        f"{inputs['compared_targets']:,} targets of {inputs['compared_dialogues']} dialogues before any update.",
    ]
    parts = [
        "  \n".join(head),
        told,
        summary.table(seen["summary"], labels, NOT_MEASURED),
        "![peers](peers.png)",
    ]
    text = "\n\n".join(parts) + "\n"
    (out / "peers.md").write_text(text, encoding="utf-8")
    return text


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
    try:
        if unknown := set(_CONTESTANTS.value) - set(CONTESTANTS):
            raise UserError(f"--contestants has {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}.")
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        print(write(run(out, _CONTESTANTS.value), out))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"run.py: {error}")


if __name__ == "__main__":
    app.run(main)
