"""Compiled programs kept from one process to the next, so that a second start compiles nothing.

JAX does the keeping; here is where, unless the user has told JAX. XLA's programs for a CPU are machine code, so each
kind of machine has a directory of its own, should a home be shared by several. What lies there is run as it is, so
nobody else may write to it. Entries are small (some hundred kilobytes for a training step) and are never removed; the
directory can be, at any time.
"""

import hashlib
import os
import pathlib
import platform
import tempfile
from collections.abc import Callable

import jax


def enable(tell: Callable[[str], None]) -> None:
    """Lets JAX keep compiled programs in the user's cache directory; called before anything is compiled.

    What JAX has been told stands: JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=false
    turns this off, and so does an empty directory's name.

    Args:
      tell: given a sentence if the directory cannot be used; programs are then compiled as without it.
    """
    told = jax.config.values
    if told["jax_compilation_cache_dir"] is not None or not told["jax_enable_compilation_cache"]:
        return
    try:
        directory = default_directory()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_own(directory)
        with tempfile.TemporaryFile(dir=directory):
            pass  # it can be written to
    except OSError as error:
        tell(
            f"compiled programs are not kept for the next start: {error}. Set JAX_COMPILATION_CACHE_DIR to a directory "
            "that can be written to, or JAX_ENABLE_COMPILATION_CACHE=false to keep none."
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default what took less than a second is not kept, but a start compiles a dozen such programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def default_directory() -> pathlib.Path:
    """Where programs for this kind of machine are kept: below $XDG_CACHE_HOME, or else ~/.cache.

    Raises:
      OSError: there is no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = pathlib.Path(given) if os.path.isabs(given) else pathlib.Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return cache / "dialog_jax" / "compiled" / _machine()


def _machine() -> str:
    """`x86_64-` and a hash of what the processors can do."""
    described = pathlib.Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8", errors="replace").splitlines() if described.exists() else []
    told = {line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")}
    text = "\n".join(sorted(told)) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _check_own(directory: pathlib.Path) -> None:
    """Raises OSError if somebody else could put a program there."""
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{directory} is another user's, or others may write to it")
