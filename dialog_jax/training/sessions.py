"""The sessions of a run: each process that trained in its directory, its versions and devices, in sessions.jsonl."""

import collections
import datetime
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import jax

from dialog_jax.training import metrics

FILE = "sessions.jsonl"
_PACKAGES = ("dialog_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


def add_session(directory: pathlib.Path, step: int) -> None:
    """Appends a line for this process, which trains from `step`. The machine is not named.

    {"step": 0, "started": "2026-07-01T12:00:00+00:00", "devices": {"NVIDIA H100": 8}, "processes": 1,
     "python": "3.11.2", "system": "Linux x86_64", "packages": {"jax": "0.10.2", ...}}
    """
    session = {
        "step": step,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "devices": collections.Counter(device.device_kind for device in jax.devices()),
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": read_versions(),
    }
    with (directory / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(session) + "\n")


def read_versions() -> dict[str, str]:
    """Returns the versions of the packages on which a run's numbers depend."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def read_sessions(directory: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the sessions in their order; empty for a run of a version that wrote none."""
    return metrics.read_records(directory / FILE)
