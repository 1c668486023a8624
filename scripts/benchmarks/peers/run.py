"""Measures dialog_jax and its alternatives on the same weights, dialogues and loss.

    python scripts/benchmarks/peers/run.py --out=runs/benchmark_peers

Full fine-tuning, and LoRA of rank 16 on all linear layers, in float32 with AdamW (learning rate 2e-5 or 3e-4, gradient
norm clipped at 1), loss on responses and their end of turn. Each peer has its own environment, made once from
`requirements/` under --environments. Every round starts each contestant in a new process; the order rotates from round
to round, so that a machine that slows down slows all of them. Writes peers.json (everything), peers.md (a table) and
peers.png into --out, with the inputs, the logs and the figures of each round. A peer whose loss before any update
differs from ours is not compared.

Real tokens are all tokens but padding; response tokens are those with loss, which do not depend on how dialogues are
truncated or packed. Contestants that pack read the same dialogues, in an order of their choice; those that pad read a
sample over all lengths, grouped by length. To measure a subset: --contestants=ours,trl_packed.
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

_OUT = flags.DEFINE_string("out", None, "Directory for results, inputs and logs.", required=True)
_ENVIRONMENTS = flags.DEFINE_string("environments", "runs/peers", "Directory of the peers' environments.")
_MODEL = flags.DEFINE_string("model", "assets/smollm2-135m-instruct", "Model directory.")
_DATA = flags.DEFINE_string("data", "assets/chitchat/train.jsonl", "JSON lines with messages.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 256, "Number of dialogues, from the start of the file.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 1024, "Tokens per row.", lower_bound=2)
_ROWS = flags.DEFINE_integer("rows", 2, "Rows per step.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Runs of each contestant.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 4, "Measured steps per round, after one warm-up step.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 1200, "Time limit of a contestant's round.")
_CONTESTANTS = flags.DEFINE_list("contestants", list(CONTESTANTS), f"Subset of {', '.join(CONTESTANTS)}.")


def rotate_orders(names: list[str], rounds: int) -> list[list[str]]:
    """Returns the order of each round: [a b c], [b c a], [c a b], ..."""
    return [names[k % len(names) :] + names[: k % len(names)] for k in range(rounds)]


def describe_machine() -> str:
    """Returns the number of cores and the processor model."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores of {processor}"


def run(out: pathlib.Path, names: list[str]) -> dict:
    """Makes environments and inputs, measures, and returns all figures."""
    settings = Settings(
        model=pathlib.Path(_MODEL.value).absolute(),
        inputs=out.absolute() / "inputs",
        max_length=_MAX_LENGTH.value,
        rows=_ROWS.value,
        warmup=1,
        steps=_STEPS.value,
    )
    environment_names = dict.fromkeys(CONTESTANTS[name].environment for name in names)
    pythons = {"": pathlib.Path(sys.executable)}
    for name in filter(None, environment_names):
        print(f"environment {name}", flush=True)
        pythons[name] = environments.make_environment(name, pathlib.Path(_ENVIRONMENTS.value))
    inputs = shared_inputs.write_inputs(
        settings.inputs,
        model=_MODEL.value,
        data=_DATA.value,
        dialogues=_DIALOGUES.value,
        max_length=_MAX_LENGTH.value,
        warmup=settings.warmup * settings.rows,
        measured=settings.steps * settings.rows,
    )
    print(f"inputs {inputs}", flush=True)
    loss, targets = contestants.compute_our_loss(settings, out / "compared_scores.jsonl")
    ours = {"compared_loss": loss, "compared_targets": targets}
    compared: dict[str, dict[str, Any]] = dict.fromkeys(summary.OURS, ours)
    rounds: list[dict[str, Any]] = []
    for name in names:
        if CONTESTANTS[name].environment:
            file = out / f"{name}_compared.json"
            command = contestants.compare_command(name, settings, pythons[CONTESTANTS[name].environment], file)
            compared[name] = contestants.run_command(name, command, file, seconds=_SECONDS.value)
        print(f"{name}: {compared[name]}", flush=True)
    start = time.time()
    for number, order in enumerate(rotate_orders(names, _ROUNDS.value)):
        for name in order:
            file = out / f"{name}_{number}.json"
            command = contestants.measure_command(name, settings, pythons[CONTESTANTS[name].environment], file)
            result = contestants.run_command(name, command, file, seconds=_SECONDS.value)
            rounds.append({"contestant": name, "round": number, **result})
            with (out / "rounds.jsonl").open("a" if len(rounds) > 1 else "w", encoding="utf-8") as lines:
                lines.write(json.dumps(rounds[-1]) + "\n")
            outcome = rounds[-1].get("failed") or f"{rounds[-1]['real_tokens_per_second']:.1f} real tokens/s"
            print(f"round {number}, {name}: {outcome}; {(time.time() - start) / 60:.1f} min", flush=True)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "command": " ".join(["python", "scripts/benchmarks/peers/run.py", *_shown_flags()]),
        "minutes": round((time.time() - start) / 60, 1),
        "inputs": inputs,
        "compared": compared,
        "versions": {name or "ours": environments.list_versions(pythons[name]) for name in environment_names},
        "rounds": rounds,
    }


def _shown_flags() -> list[str]:
    """Returns the flags that were given, except --environments; absolute paths are shortened to their last part."""
    shown = [f"--out={pathlib.Path(_OUT.value).name if os.path.isabs(_OUT.value) else _OUT.value}"]
    for flag in (_MODEL, _DATA, _DIALOGUES, _MAX_LENGTH, _ROWS, _ROUNDS, _STEPS, _CONTESTANTS):
        if flag.present:
            value = ",".join(flag.value) if isinstance(flag.value, list) else str(flag.value)
            shown.append(f"--{flag.name}={os.path.basename(value) if os.path.isabs(value) else value}")
    return shown


def write_results(figures: dict, out: pathlib.Path) -> str:
    """Writes peers.json, peers.md and peers.png; returns the text of peers.md.

    Raises:
      UserError: dialog_jax, or every peer, is missing. peers.json is written before.
    """
    labels = {name: one.label for name, one in CONTESTANTS.items()}
    figures = figures | {"summary": summary.summarize(figures["rounds"], figures["compared"])}
    (out / "peers.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    verdict = summary.make_verdict(figures["summary"], labels)
    summary.plot(figures["summary"], labels, out / "peers.png")
    main_packages = ("jax", "flax", "torch", "transformers", "trl", "peft", "google-tunix")
    versions = [
        f"{name}: {', '.join(line.replace('==', ' ') for line in lines if line.partition('==')[0] in main_packages)}"
        for name, lines in figures["versions"].items()
    ]
    inputs = figures["inputs"]
    head = [
        f"Command: `{figures['command']}`",
        f"Date: {figures['date']}",
        f"Machine: {figures['machine']}; Python {figures['python']}",
        *versions,
        f"Time: {figures['minutes']} min",
        f"Inputs: {inputs['dialogues']} dialogues, {inputs['tokens']:,} tokens, {inputs['targets']:,} targets; "
        f"{inputs['longer_than_max_length']} dialogues are longer than a row. The last column is the loss before any "
        f"update, on {inputs['compared_targets']:,} targets of {inputs['compared_dialogues']} dialogues.",
    ]
    parts = [
        "  \n".join(head),
        verdict,
        summary.make_table(figures["summary"], labels, NOT_MEASURED),
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
            raise UserError(f"--contestants has {', '.join(sorted(unknown))}; known are {', '.join(CONTESTANTS)}.")
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        print(write_results(run(out, _CONTESTANTS.value), out))
    except (UserError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"run.py: {error}")


if __name__ == "__main__":
    app.run(main)
