"""Evaluation sums to figures, FLOPs of a step, and figures to JSONL files."""

import contextlib
import json
import math
import os
import pathlib
import re
import resource
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dialog_jax.errors import UserError
from dialog_jax.model import adapters, decoder, parameter_trees, tensor_names
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.training import trainable
from dialog_jax.training.score_steps import EvaluationSums
from dialog_jax.training.trainable import Selection

# Published peak of dense bfloat16 matmuls in FLOP/s, by the beginning of `jax.Device.device_kind`. NVIDIA's data sheets
# give the peak with sparsity, which is twice the dense one.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def count_flops(
    config: DecoderConfig,
    *,
    tokens: int | float,
    attention_pairs: int | float,
    targets: int | float,
    selection: Selection | None = None,
) -> float:
    """Returns the FLOPs that forward and backward pass need, without padding, masked pairs, or logits without a target.

    A multiply-add is two FLOPs. Each product is needed in the forward pass, again for the gradient of its input if
    something before it is trained, and again for that of its matrix if that is trained: 6 FLOPs per token and trained
    weight, 4 per frozen one; of experts, those that are active count. Recomputation and dequantization do not count.

    Args:
      attention_pairs: pairs of a token and a token that it sees, itself included; the mean over the layers.
      selection: what is trained; None for everything.
    """
    selection = selection or trainable.select_all(config)
    trained = selection.trained_paths | selection.scales.keys()
    through_layers = bool(selection.soft_prompt.tokens) or any(
        path == "embedding" or path.startswith("layers/") for path in trained
    )
    unembedding = "embedding" if config.tie_embeddings else "lm_head"

    def count_passes(path: str, *, has_input_gradient: bool) -> int:
        return 1 + has_input_gradient + (path in selection.trained_paths)

    multiply_adds = 0.0
    for path, leaf in parameter_trees.flatten(decoder.abstract_parameters(config)).items():
        if path.startswith("layers/") and path.rpartition("/")[2].startswith("w_"):
            weights = leaf.size * _find_active_share(config, path)
            multiply_adds += count_passes(path, has_input_gradient=through_layers) * weights * tokens
    head_dims = sum(len(config.parts[name]) * heads.head_dim for name, heads in config.attention_heads.items())
    attention = 2 * config.heads * head_dims  # of a pair, in all layers: scores and weighted sum
    multiply_adds += (3 if through_layers else 1) * attention * attention_pairs
    passes = count_passes(unembedding, has_input_gradient=through_layers or "final_norm" in trained)
    multiply_adds += passes * config.vocab_size * config.width * targets
    for path, scale in selection.scales.items():
        inputs, outputs = adapters.find_matrix_shape(config, path)
        sides = outputs if path == "embedding" else inputs + outputs  # rows of `lora_a` of an embedding are looked up
        if path in tensor_names.EXPERT_MATRICES:
            assert config.experts is not None
            sides *= config.experts.active
        multiply_adds += 3 * np.count_nonzero(scale) * sides * (targets if path == "lm_head" else tokens)
    return 2.0 * multiply_adds


def count_parameters(config: DecoderConfig) -> tuple[int, int]:
    """Returns (the number of parameters, how many of them a token uses: of experts, those that are active)."""
    sizes = {path: leaf.size for path, leaf in parameter_trees.flatten(decoder.abstract_parameters(config)).items()}
    active = sum(size * _find_active_share(config, path) for path, size in sizes.items())
    return sum(sizes.values()), round(active)


def _find_active_share(config: DecoderConfig, path: str) -> float:
    """Returns the share of a parameter that a token uses."""
    is_of_experts = path in (*tensor_names.EXPERT_MATRICES, *tensor_names.EXPERT_BIASES)
    return config.experts.active / config.experts.count if config.experts and is_of_experts else 1.0


def find_peak_flops(device: jax.Device) -> float | None:
    """Returns the peak dense bfloat16 FLOP/s of a device; None where it is unknown, as on CPUs."""
    kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def measure_peak_memory(devices: Sequence[jax.Device]) -> int | None:
    """Returns the most bytes that one of the devices has had in use; None where it is not known.

    The memory of a CPU is that of this process: its largest resident size since it started.
    """
    if all(device.platform == "cpu" for device in devices):
        status = pathlib.Path("/proc/self/status")
        if status.exists():  # on Linux, where getrusage may give the peak of the process that started this one
            peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(errors="replace"))
            return int(peak[1]) * 1024 if peak else None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on macOS, in bytes
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return max((peak for peak in peaks if peak is not None), default=None)


class Evaluation:
    """Held-out figures, summed over batches in float64."""

    def __init__(self) -> None:
        self._sums: list[np.ndarray] | None = None

    def add(self, sums: EvaluationSums) -> None:
        """Adds one batch's sums."""
        wide = [np.asarray(array, np.float64) for array in sums]
        self._sums = wide if self._sums is None else list(map(np.add, self._sums, wide))

    def figures(self) -> dict[str, Any]:
        """Returns {"loss", "accuracy", "targets", "turns": [{"turn", "loss", "accuracy", "targets"}, ...]}.

        "loss" is a weighted mean in nats. "turns" lists the turns that have targets; the last entry, whose "turn" ends
        in "+", is of all later turns together.
        """
        assert self._sums is not None, "no batch was added"
        nll, weight, targets, correct = self._sums
        turns = []
        for turn in range(len(nll) - 1):
            index = turn + 1  # bin 0 holds the targets outside responses
            if weight[index] > 0:
                turns.append(
                    {
                        "turn": turn if index < len(nll) - 1 else f"{turn}+",
                        "loss": nll[index] / weight[index],
                        "accuracy": correct[index] / targets[index],
                        "targets": int(targets[index]),
                    }
                )
        return {
            "loss": nll.sum() / weight.sum(),
            "accuracy": correct.sum() / targets.sum(),
            "targets": int(targets.sum()),
            "turns": turns,
        }


@contextlib.contextmanager
def _write_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"metrics could not be written: {error.strerror}. Make room on the disk, or the directory writable; the "
            "same command resumes from the last checkpoint."
        ) from error


class Writer:
    """Appends figures to `metrics.jsonl` and `evaluation.jsonl` in a run's directory.

    Lines are only appended. Values that are not finite are null.

    Args:
      directory: created if missing.
      step: from which the run resumes; lines of later steps, left by an interrupted run, are removed.

    Raises:
      UserError: a file cannot be written; from any method.
    """

    @_write_errors()
    def __init__(self, directory: pathlib.Path, *, step: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._train = _open_from(directory / "metrics.jsonl", step)
        self._evaluation = _open_from(directory / "evaluation.jsonl", step)

    @_write_errors()
    def train(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of update `step` (the first is 1)."""
        _write_line(self._train, {"step": step, **figures})

    @_write_errors()
    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes the result of `Evaluation.figures` after update `step`."""
        _write_line(self._evaluation, {"step": step, **figures})

    @_write_errors()
    def sync(self) -> None:
        """Waits until all lines are on the disk and survive a power failure."""
        for file in (self._train, self._evaluation):
            os.fsync(file.fileno())

    @_write_errors()
    def close(self) -> None:
        """Flushes and closes the files."""
        with contextlib.ExitStack() as stack:  # all of them, even if closing one fails
            for file in (self._train, self._evaluation):
                stack.callback(file.close)


class NullWriter:
    """Replaces `Writer` on all processes of a run but the primary one."""

    def train(self, step: int, figures: Mapping[str, float]) -> None:
        """Does nothing."""

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file that `Writer` wrote, without a last line that was cut off.

    Raises:
      UserError: another line is not a record of a step.
    """
    return [record for record, _ in _parse_records(path)]


def _parse_records(path: pathlib.Path) -> list[tuple[dict[str, Any], int]]:
    """Returns each record with the number of bytes up to its end."""
    data = path.read_bytes() if path.exists() else b""
    records, end = [], 0
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(keepends=True), 1):
        end += len(line)
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path.name}:{number}: not a record of a step ({error}). Another program wrote it: restore it or "
                "remove the line."
            ) from None
        records.append((record, end))
    return records


def _open_from(path: pathlib.Path, step: int):
    """Returns the file opened for appending, without the lines of steps after `step`; at step 0 without any."""
    size = max((end for record, end in _parse_records(path) if step and record["step"] <= step), default=0)
    file = path.open("a", encoding="utf-8")
    file.truncate(size)
    return file


def _write_line(file, record: Mapping[str, Any]) -> None:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    file.write(json.dumps(finite, allow_nan=False) + "\n")
    file.flush()
