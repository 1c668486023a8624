"""Trains a model on dialogues as a config says; started again with the same flags, it goes on where it stopped.

    python scripts/train.py --config=experiments/quickstart.py --output_dir=runs/mine \\
        --config.data.train=my.jsonl --config.optimizer.learning_rate=1e-5

Every field of `dialog_jax.training.config.TrainConfig` is a flag: `--config.` and its path, as listed below. What the
run writes is listed at the top of `dialog_jax/training/run_directory.py`.

On many hosts each process is started with the same flags and `--distributed`; --output_dir is on a file system that all
share. Slurm, Open MPI, Kubernetes and Cloud TPU are detected; elsewhere each is told by three more flags who it is:

    --distributed --coordinator_address=10.0.0.1:8476 --num_processes=2 --process_id=0
"""

import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from dialog_jax.errors import UserError
from dialog_jax.training import compilation_cache, config, console, distributed, run
from dialog_jax.training.config import DataConfig, TrainConfig
from dialog_jax.training.signals import StoppedError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as experiments/quickstart.py.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory of the run; made if missing.", required=True)
_ALLOW_CHANGES = flags.DEFINE_bool(
    "allow_changes", False, "Go on with the run in --output_dir even if its config or data were others."
)
_DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "Join the other processes of a run on many hosts.")
_COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.mark_flag_as_required("config")


def config_fields() -> dict[str, Any]:
    """Every field that a flag can set, with its default: {"optimizer.learning_rate": 2e-05, ...}."""
    example = TrainConfig(model="required", data=DataConfig(train="required", validation="required"))
    return dict(_flat(config.to_config_dict(example).to_dict(), ""))


def _flat(fields: Mapping[str, Any], prefix: str):
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _listed(fields: Mapping[str, Any]) -> str:
    return "\n".join(f"  --config.{name}={value}" for name, value in fields.items())


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parses the command line. A field that does not exist ends the program with a list of those that do."""
    fields = config_fields()
    for argument in arguments[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.startswith("config."):
            path = name.removeprefix("config.")
            # A mapping, such as data.chat_template_kwargs, has the keys that the experiment gives it.
            if path not in fields and not any(path.startswith(f"{field}.") for field in fields):
                _no_field(path, fields)
    try:
        return app.parse_flags_with_usage(list(arguments))
    except (AttributeError, KeyError) as error:
        _no_field(str(error), fields)


def _no_field(path: str, fields: Mapping[str, Any]) -> NoReturn:
    sys.exit(f"The fields, with their defaults, are:\n{_listed(fields)}\ntrain.py: {path} is none of these fields")


def _join() -> None:
    address = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value:
        distributed.start(*address)
    elif address != (None, None, None):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id are for runs on many hosts. Add --distributed."
        )


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
    logging.set_verbosity(logging.FATAL)  # orbax tells of every file, and errors with a traceback besides raising them
    try:
        asked = config.from_config_dict(_CONFIG.value.copy_and_resolve_references())
    except OSError as error:  # what ml_collections keeps until the config is read
        sys.exit(f"train.py: the experiment cannot be read. {str(error).rpartition('Failed loading ')[2].strip()}")
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    start_time = console.find_process_start()
    compilation_cache.enable(lambda line: print(f"train.py: {line}", file=sys.stderr))
    try:
        _join()
        result = run.run(asked, _OUTPUT_DIR.value, allow_changes=_ALLOW_CHANGES.value, start_time=start_time)
    except StoppedError as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        sys.exit(0 if stop.signal == signal.SIGTERM else 130)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        print("train.py: stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    if distributed.is_primary():
        print(
            f"held-out loss {result.initial['loss']:.4f} before, {result.final['loss']:.4f} after {result.step:,} steps"
        )


if __name__ == "__main__":
    __doc__ = f"{__doc__}\nFields and defaults, which an experiment file replaces:\n{_listed(config_fields())}\n"
    app.run(main, flags_parser=parse_flags)
