"""Pinned requirements -> the interpreter of a virtual environment with these packages."""

import pathlib
import subprocess
import sys

from dialog_jax.errors import UserError

REQUIREMENTS = pathlib.Path(__file__).parent / "requirements"


def make_environment(name: str, directory: pathlib.Path) -> pathlib.Path:
    """Returns the interpreter of the environment in `directory / name`, which is made anew if its pins have changed.

    Raises:
      UserError: pip failed; the message has its last line.
    """
    pins = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    home = directory.absolute() / name
    python, installed = home / "bin" / "python", home / "installed.txt"
    if installed.exists() and installed.read_text(encoding="utf-8") == pins:
        return python
    installed.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS / f"{name}.txt")]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{name}.txt could not be installed in {home}: {last}")
    installed.write_text(pins, encoding="utf-8")
    return python


def list_versions(python: pathlib.Path) -> list[str]:
    """Returns `name==version` of every installed package."""
    frozen = subprocess.run([str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
    return [line for line in frozen.stdout.splitlines() if "==" in line]
