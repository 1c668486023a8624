"""The measured configurations: settings -> commands that start them, and the figures of a round."""

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

# glibc returns freed arrays to the kernel, which zeroes their pages again in every micro-batch. Large pages make this
# cheap; the three other settings prevent it. JAX needs only the first; with all four its heap doubled in some runs.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",
    **LARGE_PAGES,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all contestants share."""

    model: pathlib.Path
    """Model directory."""
    inputs: pathlib.Path
    """Directory written by `shared_inputs.write_inputs`."""
    max_length: int
    rows: int
    """Rows of `max_length` tokens per step: one micro-batch here; a peer's arguments set its micro-batches."""
    warmup: int
    """Unmeasured steps at the start of a round."""
    steps: int
    """Measured steps per round."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One configuration to measure."""

    label: str
    """Shown in tables and plots."""
    environment: str = ""
    """Name of a file in `requirements/`; empty for the environment of this repository."""
    script: str = ""
    arguments: tuple[str, ...] = ()
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables of the process."""


CONTESTANTS = {
    "ours": Contestant(label="dialog_jax, large pages", variables=LARGE_PAGES),
    "ours_untuned": Contestant(label="dialog_jax"),
    "ours_lora": Contestant(
        label="dialog_jax, LoRA of rank 16, large pages", arguments=("--lora_rank=16",), variables=LARGE_PAGES
    ),
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
    "trl_lora": Contestant(
        label="TRL, packed (bfd), LoRA of rank 16, malloc tuned, loss of transformers",
        environment="trl",
        script="trl_peer.py",
        arguments=("--batching=packed", "--head=logits", "--lora_rank=16"),
        variables=MALLOC,
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
    "TRL with two rows per micro-batch, or with torch.compile": (
        "tried once each and not faster; see [performance](../../docs/performance.md)"
    ),
    "TRL with Liger kernels": "these are Triton kernels, which need a GPU",
    "MaxText": "0.2.5 has extras for CUDA and TPU only, none for CPU",
}


def measure_command(name: str, settings: Settings, python: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Returns the command that measures one round of a contestant and writes its figures to `out`."""
    if CONTESTANTS[name].environment:
        return [*_peer_command(name, settings, python, out), f"--warmup={settings.warmup}", f"--steps={settings.steps}"]
    return [
        sys.executable,
        str(REPOSITORY / "scripts" / "benchmarks" / "train_step.py"),
        f"--model={settings.model}",
        f"--data={settings.inputs / 'dialogues.jsonl'}",
        f"--max_length={settings.max_length}",
        f"--rows={settings.rows}",
        "--gradient_accumulation=1",
        *CONTESTANTS[name].arguments,
        f"--steps={settings.steps}",
        f"--out={out}",
    ]


def compare_command(name: str, settings: Settings, python: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Returns the command that writes a peer's `compared_loss` and `compared_targets` to `out` without training."""
    return [*_peer_command(name, settings, python, out), "--compare"]


def _peer_command(name, settings, python, out):
    peer = CONTESTANTS[name]
    return [
        str(python),
        str(HERE / peer.script),
        *peer.arguments,
        f"--model={settings.model}",
        f"--inputs={settings.inputs}",
        f"--max_length={settings.max_length}",
        f"--rows={settings.rows}",
        f"--out={out}",
    ]


def run_command(name: str, command: list[str], out: pathlib.Path, *, seconds: float) -> dict[str, Any]:
    """Returns the figures that the command wrote to `out`, with speeds, or `{"failed": reason}`.

    The process sees CPUs only.

    Args:
      out: a JSON file; the output of the process goes to the same name with suffix `.log`.
      seconds: time limit.
    """
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", *MALLOC)}
    if not CONTESTANTS[name].environment:
        variables["PYTHONPATH"] = str(REPOSITORY)
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | CONTESTANTS[name].variables
    variables |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    out.unlink(missing_ok=True)
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        try:
            process = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=variables, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
    if process.returncode or not out.exists():
        return {"failed": f"ended with {process.returncode}; see {out.with_suffix('.log').name}"}
    try:
        return add_speeds(json.loads(out.read_text(encoding="utf-8")))
    except (UserError, json.JSONDecodeError) as error:
        return {"failed": str(error)}


def add_speeds(figures: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a contestant, with speeds if it measured steps: total tokens over total seconds.

    Raises:
      UserError: the numbers of seconds, real tokens and response tokens differ.
    """
    if "seconds" not in figures:
        return figures
    steps = {key: figures[key] for key in ("seconds", "real_tokens", "response_tokens")}
    if not steps["seconds"] or len({len(values) for values in steps.values()}) > 1:
        raise UserError(
            f"it wrote {', '.join(f'{len(v)} {k}' for k, v in steps.items())}; each step needs one of each."
        )
    elapsed = sum(steps["seconds"])
    return figures | {
        "seconds_a_step": statistics.median(steps["seconds"]),
        "tokens_a_step": statistics.mean(steps["real_tokens"]),
        "real_tokens_per_second": sum(steps["real_tokens"]) / elapsed,
        "response_tokens_per_second": sum(steps["response_tokens"]) / elapsed,
    }


def compute_our_loss(settings: Settings, out: pathlib.Path) -> tuple[float, int]:
    """Returns (nats per target, targets) of dialog_jax on the dialogues that all contestants are compared on.

    Raises:
      subprocess.CalledProcessError: scoring failed; its output is on the console.
    """
    score = [
        sys.executable,
        "-m",
        "dialog_jax",
        "score",
        f"--config.model={settings.model}",
        f"--config.data.train={settings.inputs / 'compared.jsonl'}",
        f"--out={out}",
    ]
    subprocess.run(score, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    targets = sum(record["tokens"] for record in records)
    return sum(record["nll"] for record in records) / targets, targets
