"""Starts dialog_jax train as N processes of one run on this machine, joined over loopback.

    python experiments/launch/local.py --processes=4 -- --config=experiments/quickstart.py --output_dir=runs/four

The arguments after `--` are flags of dialog_jax train. Each line of output is prefixed with the number of its process.
SIGINT and SIGTERM are passed on to all processes. When one fails, the others get a few seconds to finish and are then
killed; the exit code is that of the first failure, or 128 + N for signal N. Here all processes see all devices; on a
machine with GPUs use a cluster's launcher instead, which gives each process its own.
"""

import argparse
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

_GRACE = 5.0  # seconds for the other processes to finish after a failure


def launch(command: Sequence[str], processes: int, *, environment: Mapping[str, str] | None = None) -> int:
    """Runs `command` once per process, with the flags that join them, and returns the exit code of the launch."""
    address = f"127.0.0.1:{_free_port()}"
    started = [
        subprocess.Popen(
            [
                *command,
                "--distributed",
                f"--coordinator_address={address}",
                f"--num_processes={processes}",
                f"--process_id={process}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the processes only through `forward`
        )
        for process in range(processes)
    ]
    shown = [
        threading.Thread(target=_show, args=(process, child), daemon=True) for process, child in enumerate(started)
    ]
    for thread in shown:
        thread.start()

    def forward(number: int, _) -> None:
        for child in started:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(started)
    finally:
        for child in started:
            child.kill()
        for thread in shown:
            thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _show(process: int, child: subprocess.Popen) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        sys.stdout.write(f"[{process}] {line}")
        sys.stdout.flush()


def _wait(started: Sequence[subprocess.Popen]) -> int:
    """Waits for all processes, or for `_GRACE` seconds after the first failure; returns the exit code."""
    code, deadline = 0, float("inf")
    while None in (codes := [child.poll() for child in started]) and time.monotonic() < deadline:
        failed = [code for code in codes if code]
        if failed and not code:
            code, deadline = failed[0], time.monotonic() + _GRACE
        time.sleep(0.05)
    code = code or next((one for one in codes if one), 0)
    return 128 - code if code < 0 else code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="number of processes")
    parser.add_argument("flags", nargs="+", metavar="-- FLAGS", help="of dialog_jax train")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes is {arguments.processes}; it must be at least 1")
    sys.exit(launch([sys.executable, "-m", "dialog_jax", "train", *arguments.flags], arguments.processes))


if __name__ == "__main__":
    main()
