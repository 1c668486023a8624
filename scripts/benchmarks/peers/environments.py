"""Pinned requirements -> the interpreter of a virtual environment that has them."""

import pathlib
import subprocess
import sys

from dialog_jax.errors import UserError

REQUIREMENTS = pathlib.Path(__file__).parent / "requirements"


def make(name: str, directory: pathlib.Path) -> pathlib.Path:
    """The interpreter of the environment `name`, made in `directory / name` if it is not there or not of these pins.

    Raises:
      UserError: pip could not install; its last line is told.
    """
    pins = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    home = directory.absolute() / name
    python, installed = home / "bin" / "python", home / "installed.txt"
    if installed.exists() and installed.read_text(encoding="utf-8") == pins:
        return python
    installed.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS / f"{name}.txt")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise UserError(f"{name}.txt could not be installed in {home}: {last}")
    installed.write_text(pins, encoding="utf-8")
    return python


def versions(python: pathlib.Path) -> list[str]:
    """`name==version` of every package there."""
    frozen = subprocess.run([str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
    return [line for line in frozen.stdout.splitlines() if "==" in line]
