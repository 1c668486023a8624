"""One process of a run, as the tests of many processes start it: several runs, one after the other, to save start-ups.

The first argument is a JSON file, {"patience": seconds, "runs": [{"output_dir", "fields", ...}, ...]}. `fields` are
those of TrainConfig by their paths. A run may have {"trouble": {"process", "step", "kind"}}: before that process writes
the figures of that step it gets SIGTERM, raises an error, is killed, or stops for good.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import sys
import time
from unittest import mock

from absl import logging

from dialog_jax.training import config, hosts, loop, metrics
from dialog_jax.training.config import DataConfig, TrainConfig


def configured(fields):
    """The TrainConfig with `fields`, given by their paths."""
    data = DataConfig(train="required", validation="required")
    made = config.to_config_dict(TrainConfig(model="required", data=data))
    made.update_from_flattened_dict(fields)
    return config.from_config_dict(made)


def troubled(process, step, kind):
    """A patch of `metrics` that makes trouble for one process."""

    def train(writer, number, figures):
        time.sleep(0.1)
        if number != step:
            return
        if kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise RuntimeError("trouble")

    assert process > 0, "the first process has another writer"
    return mock.patch.object(metrics.Silent, "train", train)


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
    hosts.start(asked.coordinator_address, asked.num_processes, asked.process_id, patience=job.get("patience", 100))
    for run in job["runs"]:
        fields = run["fields"] | run.get("only", {}).get(str(asked.process_id), {})
        trouble = run.get("trouble")
        mine = trouble and trouble["process"] == asked.process_id
        with troubled(**trouble) if mine else contextlib.nullcontext():
            try:
                loop.run(configured(fields), run["output_dir"])
            except ValueError as error:
                sys.exit(f"refused: {error}")


if __name__ == "__main__":
    main()
