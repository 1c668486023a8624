"""One process of a run, as the tests of many processes start it: several runs, one after the other, to save start-ups.

The first argument is a JSON file, {"patience": seconds, "runs": [{"output_dir", "config"}, ...]}. A run may have

  "trouble": {"process", "step", "kind"}: when that process (not the first) has the figures of that step, it gets
      SIGTERM or SIGINT, is killed, stops for good, or raises an error;
  "other": {"process", "field", "value"}: a field of `config.data` that is otherwise for that process.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import sys
import time
from typing import Any
from unittest import mock

import ml_collections
from absl import logging

from dialog_jax.training import config, distributed, metrics
from dialog_jax.training import run as run_lib
from dialog_jax.training.signals import StoppedError

_SIGNALS = {
    "interrupted": signal.SIGINT,
    "terminated": signal.SIGTERM,
    "killed": signal.SIGKILL,
    "frozen": signal.SIGSTOP,
}


def troubled(step, kind):
    """A patch of `metrics` that slows a process down and makes trouble for it at `step`.

    JAX's runtime looks for a signal once a second, which the run must not end before.
    """

    def train(writer, number, figures):
        time.sleep(0.3)
        if number == step:
            if kind not in _SIGNALS:
                raise RuntimeError("trouble")
            os.kill(os.getpid(), _SIGNALS[kind])

    return mock.patch.object(metrics.NullWriter, "train", train)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator_address")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    asked = parser.parse_args()
    job = json.loads(pathlib.Path(asked.job).read_text())
    logging.set_verbosity(logging.WARNING)
    distributed.start(
        asked.coordinator_address, asked.num_processes, asked.process_id, patience=job.get("patience", 100)
    )
    for run in job["runs"]:
        fields, trouble, other = run["config"], run.get("trouble"), run.get("other")
        if other and other["process"] == asked.process_id:
            fields["data"][other["field"]] = other["value"]
        patch: Any = contextlib.nullcontext()
        if trouble and trouble["process"] == asked.process_id:
            patch = troubled(trouble["step"], trouble["kind"])
        with patch:
            try:
                run_lib.run(config.from_config_dict(ml_collections.ConfigDict(fields)), run["output_dir"])
            except ValueError as error:
                print(f"refused: {error}", flush=True)
            except StoppedError as stop:
                print(stop, flush=True)
                sys.exit(130 if stop.signal == signal.SIGINT else 0)


if __name__ == "__main__":
    main()
