"""Many processes as one run: JAX's distributed runtime started, and what processes tell each other beside arrays.

They agree through the key-value store of that runtime and not by a collective, because a collective gives up when one
process is much slower than another (on CPUs after 30 seconds), as the one that prepares the data is.

A user error of one process within `run_on_all_hosts` or `run_primary_first` ends all of them at once. A process that
dies or fails elsewhere ends the others too: the runtime stops them with an error after at most `_PATIENCE` seconds.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dialog_jax.errors import UserError

_PATIENCE = 100  # seconds without a sign of life after which a process counts as dead
_SLOWEST = 7 * 24 * 3600  # seconds that the slowest process may take to prepare what the others wait for
_CLUSTERS = "Slurm, Open MPI, Kubernetes and Cloud TPU"

_rounds = itertools.count()
T = TypeVar("T")


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    patience: int = _PATIENCE,
) -> None:
    """Joins this process to the others, before anything touches a device.

    Args:
      coordinator_address: HOST:PORT of process 0; None, as the next two, where JAX detects the cluster.
      patience: seconds without a sign of life after which a process counts as dead, and all end.

    Raises:
      UserError: some of the three are missing or wrong, or none are given and JAX detects no cluster.
    """
    _check(coordinator_address, num_processes, process_id)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=patience,
            shutdown_timeout_seconds=patience,
        )
    except RuntimeError as error:
        raise UserError(
            f"--distributed: the processes did not find each other ({error}). Start all of them, and see that each can "
            "reach the coordinator's address and port."
        ) from error
    except ValueError as error:
        raise UserError(
            f"--distributed: JAX detects no cluster here ({error}) It knows {_CLUSTERS}. Elsewhere give each process "
            "--coordinator_address=HOST:PORT (of process 0), --num_processes=N and --process_id=I."
        ) from error


def _check(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == 3:
        return
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: give --coordinator_address=HOST:PORT, --num_processes=N and "
            f"--process_id=I together, or none of them where JAX detects the cluster ({_CLUSTERS})."
        )
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address is {coordinator_address!r}; it must be HOST:PORT of process 0.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id} and --num_processes {num_processes}; ids are 0 to --num_processes - 1."
        )


def is_primary() -> bool:
    """Whether this process is the one that prints and writes what all have in common."""
    return jax.process_index() == 0


def all_gather_strings(text: str) -> list[str]:
    """Returns what each process, in their order, gave to this call; waits for the slowest."""
    if jax.process_count() == 1:
        return [text]
    client, number = ocp.multihost.get_jax_distributed_client(), next(_rounds)
    client.key_value_set(f"dialog_jax/{number}/{jax.process_index()}", text)
    return [
        client.blocking_key_value_get(f"dialog_jax/{number}/{process}", _SLOWEST * 1000)
        for process in range(jax.process_count())
    ]


def run_on_all_hosts(function: Callable[[], T]) -> T:
    """Returns what `function` gives this process, when all have theirs.

    Raises:
      UserError: with the words of the first process for which the function raised ValueError or OSError.
    """
    try:
        result, said = function(), ""
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            raise
        said = f"process {jax.process_index()}: {error}"
    if failures := [text for text in all_gather_strings(said) if text]:
        raise UserError(failures[0])
    return result


def run_primary_first(function: Callable[[], T]) -> T:
    """As `together`, but the first process goes first, so that the others find what it prepares."""
    if jax.process_count() == 1:
        return function()
    if is_primary():
        result = run_on_all_hosts(function)
        run_on_all_hosts(lambda: None)
        return result
    run_on_all_hosts(lambda: None)
    return run_on_all_hosts(function)


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raises UserError, on every process, if the facts of some process differ from those of the first."""
    told = [json.loads(text) for text in all_gather_strings(json.dumps(facts, sort_keys=True, default=str))]
    for process, other in enumerate(told):
        differing = [name for name in sorted(told[0] | other) if told[0].get(name) != other.get(name)]
        if differing:
            raise UserError(
                f"process {process} has another {what} of {', '.join(differing)} than process 0. Start all processes "
                "with the same flags and the same files."
            )


def announce_past_steps(start: int) -> bool:
    """Says that the next step is the one after `start`; whether to stop before it, the same on all processes.

    JAX's runtime makes processes stop at the step after the last one that any of them has told: for a signal that came
    before this, at step 1, which a run that goes on has passed. So all steps are told, and none is passed over.
    """
    return any([multihost_utils.reached_preemption_sync_point(step) for step in range(1, start + 1)])


def stop_requested(step: int) -> bool:
    """Whether to save after `step` and stop: the same step on all processes, soon after one of them got SIGTERM.

    To be called after every step. JAX's runtime takes the signal, and the notices of preemption that JAX knows, as long
    as no handler of SIGTERM is installed after `start`.
    """
    return multihost_utils.reached_preemption_sync_point(step)
