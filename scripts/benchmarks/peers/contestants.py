"""Who is measured, in which configuration, and how each is started: settings -> a command, figures of a round."""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from dialog_jax.errors import UserError

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[2]

# glibc gives freed arrays back to the kernel, which zeroes the pages again in every micro-batch: large pages, of which
# there are fewer, or the three others, which keep it from that. JAX needs no more than the first; with all four its
# heap grew to twice the size in some runs.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",
    **LARGE_PAGES,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same for all contestants."""

    model: pathlib.Path
    """A directory of a published checkpoint."""
    inputs: pathlib.Path
    """What `shared_inputs.write` wrote."""
    max_length: int
    rows: int
    """Rows of `max_length` a step. We take them at once; a peer in micro-batches, as its arguments say."""
    warmup: int
    """Steps of a round that are not measured."""
    steps: int
    """Steps of a round that are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """Someone to measure."""

    label: str
    """In tables and plots."""
    environment: str = ""
    """A file of `requirements/`; empty for this repository's own."""
    script: str = ""
    arguments: tuple[str, ...] = ()
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the process's environment."""


CONTESTANTS = {
    "ours": Contestant(label="dialog_jax, large pages", variables=LARGE_PAGES),
    "ours_untuned": Contestant(label="dialog_jax"),
    "trl_packed": Contestant(
        label="TRL, packed (bfd), malloc tuned",
        environment="trl",
        script="trl_peer.py",
        arguments=("--batching=packed",),
        variables=MALLOC,
    ),
    "trl_packed_logits": Contestant(
        label="TRL, packed (bfd), malloc tuned, loss of transformers",
        environment="trl",
        script="trl_peer.py",
        arguments=("--batching=packed", "--head=logits"),
        variables=MALLOC,
    ),
    "trl_packed_untuned": Contestant(
        label="TRL, packed (bfd)", environment="trl", script="trl_peer.py", arguments=("--batching=packed",)
    ),
    "trl_padded": Contestant(
        label="TRL, padded, grouped by length, malloc tuned",
        environment="trl",
        script="trl_peer.py",
        arguments=("--batching=padded", "--batch=2"),
        variables=MALLOC,
    ),
    "tunix": Contestant(
        label="google-tunix, padded, large pages", environment="tunix", script="tunix_peer.py", variables=LARGE_PAGES
    ),
}

NOT_MEASURED = {
    "TRL with two rows a micro-batch, or with torch.compile": "tried once each, not faster; see [speed](speed.md)",
    "TRL with Liger kernels": "they are Triton kernels, for GPUs",
    "MaxText": "0.2.5 brings its dependencies in extras for CUDA and TPU only, none for a CPU; not tried further",
    "LoRA, any": "dialog_jax has none yet",
}


def measuring(name: str, settings: Settings, python: pathlib.Path, out: pathlib.Path) -> list[str]:
    """The command that measures one round of a contestant and writes its figures to `out`."""
    if CONTESTANTS[name].environment:
        return [*_peer(name, settings, python, out), f"--warmup={settings.warmup}", f"--steps={settings.steps}"]
    return [
        sys.executable,
        str(REPOSITORY / "scripts" / "benchmarks" / "train_step.py"),
        f"--model={settings.model}",
        f"--data={settings.inputs / 'dialogues.jsonl'}",
        f"--max_length={settings.max_length}",
        f"--rows={settings.rows}",
        "--gradient_accumulation=1",
        f"--steps={settings.steps}",
        f"--out={out}",
    ]


def comparing(name: str, settings: Settings, python: pathlib.Path, out: pathlib.Path) -> list[str]:
    """The command that writes a peer's `compared_loss` and `compared_targets` to `out`; trains nothing."""
    return [*_peer(name, settings, python, out), "--compare"]


def _peer(name, settings, python, out):
    one = CONTESTANTS[name]
    return [
        str(python),
        str(HERE / one.script),
        *one.arguments,
        f"--model={settings.model}",
        f"--inputs={settings.inputs}",
        f"--max_length={settings.max_length}",
        f"--rows={settings.rows}",
        f"--out={out}",
    ]


def run(name: str, command: list[str], out: pathlib.Path, *, seconds: float) -> dict[str, Any]:
    """What the command wrote to `out`, with speeds; `{"failed": why}` where it did not come to its end.

    It sees CPUs only, since that is what is compared here.

    Args:
      out: a JSON file; what the process says goes beside it, as `.log`.
      seconds: after which it is ended.
    """
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", *MALLOC)}
    if not CONTESTANTS[name].environment:
        variables["PYTHONPATH"] = str(REPOSITORY)
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | CONTESTANTS[name].variables
    variables |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    out.unlink(missing_ok=True)
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=variables, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode or not out.exists():
        return {"failed": f"ended with {done.returncode}; see {out.with_suffix('.log').name}"}
    try:
        return figures(json.loads(out.read_text(encoding="utf-8")))
    except ValueError as error:
        return {"failed": str(error)}


def figures(written: dict[str, Any]) -> dict[str, Any]:
    """What a contestant wrote, and where it measured steps their speeds: tokens of all of them over their seconds.

    Raises:
      UserError: it did not write one number of each kind for each step.
    """
    if "seconds" not in written:
        return written
    steps = {key: written[key] for key in ("seconds", "real_tokens", "response_tokens")}
    if not steps["seconds"] or len({len(values) for values in steps.values()}) > 1:
        raise UserError(
            f"it wrote {', '.join(f'{len(v)} {k}' for k, v in steps.items())}; each step needs one of each."
        )
    elapsed = sum(steps["seconds"])
    return written | {
        "seconds_a_step": statistics.median(steps["seconds"]),
        "tokens_a_step": statistics.mean(steps["real_tokens"]),
        "real_tokens_per_second": sum(steps["real_tokens"]) / elapsed,
        "response_tokens_per_second": sum(steps["response_tokens"]) / elapsed,
    }


def our_compared_loss(settings: Settings, out: pathlib.Path) -> tuple[float, int]:
    """(nats a target, targets) of dialog_jax on the dialogues that peers compute theirs on, by scripts/score.py.

    Raises:
      subprocess.CalledProcessError: it failed; what it said is on the console.
    """
    score = [
        sys.executable,
        str(REPOSITORY / "scripts" / "score.py"),
        f"--model={settings.model}",
        f"--data={settings.inputs / 'compared.jsonl'}",
        f"--out={out}",
    ]
    subprocess.run(score, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    targets = sum(record["tokens"] for record in records)
    return sum(record["nll"] for record in records) / targets, targets
