"""Plans full fine-tuning of the largest model of each family whose shape is in dialog_jax/planning/shapes.

    python -m scripts.benchmarks.plan_families [--only NAME ...]

Writes a Markdown table to the standard output. The devices are H100s, the smallest power of two of them whose memory is
twice that of weights, gradients and moments; from 16 devices on, 8 of them share a row. Rows have 2,048 tokens, one for
each group that shares a row, and every layer is computed again in the backward pass. Each plan compiles a train step on
the CPU; no weights are read.
"""

import argparse
import math
import pathlib
import re
import subprocess
import sys

from dialog_jax.model import hf_config, tensor_files
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.planning import estimating
from dialog_jax.training import metrics

_ROOT = pathlib.Path(__file__).parents[2]
_SHAPES = _ROOT / "dialog_jax" / "planning" / "shapes"
_STATE_BYTES = 16  # of a parameter: weight, gradient and two moments, float32


def main() -> None:
    """Plans each model in a process of its own: JAX simulates one number of devices for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names in dialog_jax/planning/shapes")
    largest = _find_largest()
    models = {name: largest[name] for name in parser.parse_args().only or sorted(largest)}
    print("| model | family | parameters | used by a token | H100s | mesh | GB of a device, at least |")
    print("|---|---|---:|---:|---:|---|---:|")
    for name, model in models.items():
        parameters, active = metrics.count_parameters(model)
        devices = 2 ** math.ceil(math.log2(2 * _STATE_BYTES * parameters / estimating.CHIPS["h100"].memory))
        tensor = 8 if devices >= 16 else 1
        lines = _plan(name, devices, tensor)
        size = re.search(r"at least +([\d.]+)", lines)
        assert size, lines
        mesh = f"fsdp={devices // tensor}, tensor={tensor}"
        billions = f"{parameters / 1e9:.1f} B | {active / 1e9:.1f} B"
        print(f"| {name} | `{model.family}` | {billions} | {devices} | {mesh} | {float(size[1]):.1f} |", flush=True)


def _find_largest() -> dict[str, DecoderConfig]:
    """Returns the largest model of each family, by its name."""
    models = {file.stem: hf_config.from_json(file, tensor_files.read_json(file)) for file in _SHAPES.glob("*.json")}
    by_size = sorted(models, key=lambda name: metrics.count_parameters(models[name])[0])
    return {name: models[name] for name in {models[name].family: name for name in by_size}.values()}


def _plan(name: str, devices: int, tensor: int) -> str:
    """Returns what `dialog_jax plan` prints."""
    fields = {
        "model": name,
        "mesh.fsdp": devices // tensor,
        "mesh.tensor": tensor,
        "rows": devices // tensor,
        "gradient_accumulation": 1,
    }
    command = ["plan", f"--config={_ROOT / 'experiments' / 'llama_70b.py'}", f"--devices={devices}", "--kind=h100"]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    ran = subprocess.run([sys.executable, "-m", "dialog_jax", *command], cwd=_ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"dialog_jax {' '.join(command)}\n{ran.stderr}")
    return ran.stdout


if __name__ == "__main__":
    main()
