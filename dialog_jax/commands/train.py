"""Fine-tunes a model on dialogues; started again with the same flags, it resumes from the last checkpoint.

    dialog_jax train --config.model=MODEL --config.data.train=my.jsonl --output_dir=runs/mine
    dialog_jax train --config=experiments/finetune.py --config.epochs=2 --output_dir=runs/mine

Every field of the config is a flag, --config.FIELD, as listed below; without --config=FILE the defaults apply.
The files of a run are listed in `dialog_jax/training/run_directory.py`.

On many hosts, start the command on each with the same flags and --distributed; --output_dir must be on a file system
that all of them share. Slurm, Open MPI, Kubernetes and Cloud TPU are detected. Elsewhere three more flags say which
process this is:

    --distributed --coordinator_address=10.0.0.1:8476 --num_processes=2 --process_id=0

Exit code: 0 when the run is finished, or was stopped by SIGTERM or SIGHUP (a closed terminal) and saved; 130 when
Ctrl-C stopped it; 1 on an error.
"""

import signal

from absl import flags

from dialog_jax.commands import config_flag, entry
from dialog_jax.errors import UserError
from dialog_jax.training import compilation_cache, console, distributed, run
from dialog_jax.training.signals import StoppedError

_CONFIG = config_flag.define()
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory of the run; created if missing.")
_ALLOW_CHANGES = flags.DEFINE_bool(
    "allow_changes", False, "Resume the run in --output_dir although its config or data have changed."
)
_DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "Join the other processes of a run on many hosts.")
_COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")

_INTERRUPTED = 130


def main() -> int:
    output_dir = entry.required(_OUTPUT_DIR, "runs/mine")
    start_time = console.find_process_start()
    compilation_cache.enable(entry.print_message)
    _join()
    try:
        result = run.run(
            config_flag.read(_CONFIG), output_dir, allow_changes=_ALLOW_CHANGES.value, start_time=start_time
        )
    except StoppedError as stop:
        entry.print_message(str(stop))
        return _INTERRUPTED if stop.signal == signal.SIGINT else 0
    except KeyboardInterrupt:
        entry.print_message("interrupted; the same command resumes from the last checkpoint")
        return _INTERRUPTED
    if distributed.is_primary():
        before, after = result.initial["loss"], result.final["loss"]
        print(f"held-out loss {before:.4f} before, {after:.4f} after {result.step:,} steps")
    return 0


def _join() -> None:
    address = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value:
        distributed.start(*address)
    elif address != (None, None, None):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id are for runs on many hosts. Add --distributed."
        )
