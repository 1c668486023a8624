"""Who is measured, in which configuration, and how each is started: settings -> a command, figures of a round."""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[1]

# glibc gives freed arrays back to the kernel, which zeroes the pages again in every micro-batch; not with the first
# three. With the last, it asks for large pages, of which there are fewer to zero.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
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
    "ours": Contestant(label="dialog_jax, malloc tuned", variables=MALLOC),
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
    "tunix": Contestant(label="google-tunix, padded", environment="tunix", script="tunix_peer.py"),
}

NOT_MEASURED = {
    "TRL with Liger kernels": "they are Triton kernels, for GPUs",
    "MaxText": "0.2.5 brings its dependencies in extras for CUDA and TPU only, none for a CPU; not tried further",
    "LoRA, any": "dialog_jax has none yet",
}


def command(name: str, settings: Settings, python: pathlib.Path, out: pathlib.Path, *, compare: bool) -> list[str]:
    """The command that measures one round of a contestant and writes its figures to `out`.

    Args:
      compare: whether a peer also computes its loss on the dialogues to compare; once is enough.
    """
    one = CONTESTANTS[name]
    if not one.environment:
        return [
            sys.executable,
            str(REPOSITORY / "scripts" / "benchmark.py"),
            f"--model={settings.model}",
            f"--data={settings.inputs / 'dialogues.jsonl'}",
            f"--max_length={settings.max_length}",
            f"--rows={settings.rows}",
            "--gradient_accumulation=1",
            f"--steps={settings.steps}",
            f"--out={out}",
        ]
    return [
        str(python),
        str(HERE / one.script),
        *one.arguments,
        f"--model={settings.model}",
        f"--inputs={settings.inputs}",
        f"--max_length={settings.max_length}",
        f"--rows={settings.rows}",
        f"--warmup={settings.warmup}",
        f"--steps={settings.steps}",
        f"--out={out}",
        *(["--compare"] if compare else []),
    ]


def measure(
    name: str, settings: Settings, python: pathlib.Path, out: pathlib.Path, *, compare: bool, seconds: float
) -> dict[str, Any]:
    """Figures of one round, from a process of its own; `{"failed": why}` where it did not come to its end.

    Args:
      out: a JSON file; what the process says goes beside it, as `.log`.
      seconds: after which it is ended.
    """
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if not CONTESTANTS[name].environment:
        variables["PYTHONPATH"] = str(REPOSITORY)
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | CONTESTANTS[name].variables
    out.unlink(missing_ok=True)
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command(name, settings, python, out, compare=compare),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode or not out.exists():
        return {"failed": f"ended with {done.returncode}; see {out.with_suffix('.log').name}"}
    return figures(json.loads(out.read_text(encoding="utf-8")))


def figures(written: dict[str, Any]) -> dict[str, Any]:
    """What a contestant wrote, with medians over the steps added where it gave the steps themselves."""
    if "seconds" not in written:
        return written
    steps = {key: written[key] for key in ("seconds", "real_tokens", "response_tokens")}
    if not steps["seconds"] or len({len(values) for values in steps.values()}) > 1:
        raise ValueError(
            f"a peer wrote {', '.join(f'{len(v)} {k}' for k, v in steps.items())}; each step needs one of each."
        )

    def rate(tokens: list[int]) -> float:
        return statistics.median(count / seconds for count, seconds in zip(tokens, steps["seconds"], strict=True))

    return written | {
        "seconds_a_step": statistics.median(steps["seconds"]),
        "real_tokens_per_second": rate(steps["real_tokens"]),
        "response_tokens_per_second": rate(steps["response_tokens"]),
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
