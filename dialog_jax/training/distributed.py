"""Many processes as one run: starts JAX's distributed runtime and exchanges strings between processes.

Processes agree through the key-value store of that runtime rather than by a collective: a collective times out when one
process is much slower than another (on CPUs after 30 seconds), as the process that prepares the data is.

An error of one process in `run_on_all_hosts` or `run_primary_first` ends all of them at once. A process that dies or
fails elsewhere ends the others too: the runtime stops them with an error after at most `_PATIENCE` seconds.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dialog_jax.errors import UserError

_PATIENCE = 100  # seconds without a heartbeat after which a process counts as dead
_SLOWEST = 7 * 24 * 3600  # seconds that the slowest process may take to prepare what the others wait for
_CLUSTERS = "Slurm, Open MPI, Kubernetes and Cloud TPU"

_exchanges = itertools.count()
_T = TypeVar("_T")


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    patience: int = _PATIENCE,
) -> None:
    """Joins this process to the others of its run. Call it before anything touches a device.

    Args:
      coordinator_address: HOST:PORT of process 0. None for all three where JAX detects the cluster.
      patience: seconds without a heartbeat after which a process counts as dead and all end.

    Raises:
      UserError: some of the three are missing or wrong, or all are None and JAX detects no cluster.
    """
    _check_flags(coordinator_address, num_processes, process_id)
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
            f"--distributed: the processes did not find each other ({error}). Start all of them, and make sure that "
            "each can reach the coordinator's address and port."
        ) from error
    except ValueError as error:
        raise UserError(
            f"--distributed: JAX detects no cluster here ({error}) It detects {_CLUSTERS}. Elsewhere pass each process "
            "--coordinator_address=HOST:PORT (of process 0), --num_processes=N and --process_id=I."
        ) from error


def _check_flags(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    values = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in values.items() if value is None]
    if len(missing) == 3:
        return
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: pass --coordinator_address=HOST:PORT, --num_processes=N and "
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
    """Returns whether this is process 0, which prints and which writes the files that all processes share."""
    return jax.process_index() == 0


def all_gather_strings(text: str) -> list[str]:
    """Returns the `text` of each process, in the order of their numbers; waits for the slowest.

    Process 0 calls all_gather_strings("a"), process 1 calls all_gather_strings("b"): both return ["a", "b"].
    """
    if jax.process_count() == 1:
        return [text]
    exchange = _send(text)
    client = ocp.multihost.get_jax_distributed_client()
    return [
        client.blocking_key_value_get(f"dialog_jax/{exchange}/{process}", _SLOWEST * 1000)
        for process in range(jax.process_count())
    ]


def _send(text: str) -> int:
    """Stores this process's part of an exchange and returns the number of the exchange."""
    exchange = next(_exchanges)
    ocp.multihost.get_jax_distributed_client().key_value_set(f"dialog_jax/{exchange}/{jax.process_index()}", text)
    return exchange


def run_on_all_hosts(function: Callable[[], _T]) -> _T:
    """Returns the result of `function` on this process once it has returned on all of them.

    Raises:
      UserError: some process raised UserError or OSError; the message names the first of them.
      RuntimeError: some other process raised any other exception, which is a bug. That process keeps its traceback.
    """
    if jax.process_count() == 1:
        return function()
    name = f"process {jax.process_index()}"
    outcome = {}
    try:
        result = function()
    except (UserError, OSError) as error:
        outcome = {"user_error": f"{name}: {error}"}
    except BaseException as error:
        # Reports the bug to the others, which would otherwise wait until the runtime misses this process.
        _send(json.dumps({"bug": f"{name} raised {type(error).__name__}; see the traceback that it printed"}))
        raise
    outcomes = [json.loads(text) for text in all_gather_strings(json.dumps(outcome))]
    for failure in outcomes:
        if "bug" in failure:
            raise RuntimeError(failure["bug"])
    for failure in outcomes:
        if "user_error" in failure:
            raise UserError(failure["user_error"])
    return result


def run_primary_first(function: Callable[[], _T]) -> _T:
    """Does what `run_on_all_hosts` does, but on process 0 first, so that the others find the files it prepares."""
    if is_primary():
        result = run_on_all_hosts(function)
        run_on_all_hosts(lambda: None)
        return result
    run_on_all_hosts(lambda: None)
    return run_on_all_hosts(function)


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raises UserError on every process if the facts of some process differ from those of process 0."""
    gathered = [json.loads(text) for text in all_gather_strings(json.dumps(facts, sort_keys=True, default=str))]
    expected = gathered[0]
    for process, other in enumerate(gathered):
        differing = [name for name in sorted(expected | other) if expected.get(name) != other.get(name)]
        if differing:
            raise UserError(
                f"process {process} has another {what} of {', '.join(differing)} than process 0. Start all processes "
                "with the same flags and the same files."
            )


def announce_past_steps(start: int) -> bool:
    """Announces steps 1 to `start`; returns whether to stop before the next one, the same on all processes.

    JAX's runtime stops all processes at the step after the last one that any of them has announced. For a signal that
    arrives before the first announcement that is step 1, which a resumed run would never announce.
    """
    return any([multihost_utils.reached_preemption_sync_point(step) for step in range(1, start + 1)])


def stop_requested(step: int) -> bool:
    """Returns whether to save after `step` and stop: the same step on all processes, soon after one received SIGTERM.

    Call it after every step. JAX's runtime receives SIGTERM, and the preemption notices that it knows, as long as no
    handler of SIGTERM is installed after `start`.
    """
    return multihost_utils.reached_preemption_sync_point(step)
