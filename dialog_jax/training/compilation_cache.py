"""JAX's cache of compiled programs in the user's cache directory, so that a second start compiles nothing.

XLA's programs for a CPU are machine code, so each kind of machine has its own directory: a home may be shared by
several. The programs are executed unchecked, so nobody else may write to the directory. Entries are small (a few
hundred kilobytes for a train step) and are never removed; the directory may be removed at any time.
"""

import hashlib
import os
import pathlib
import platform
import tempfile
from collections.abc import Callable

import jax


def enable(warn: Callable[[str], None]) -> None:
    """Makes JAX keep compiled programs in the user's cache directory. Call it before anything is compiled.

    JAX's own settings take precedence: JAX_COMPILATION_CACHE_DIR names another directory, an empty name or
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.

    Args:
      warn: called with a sentence if the directory cannot be used; nothing is kept then.
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is not None or not settings["jax_enable_compilation_cache"]:
        return
    try:
        directory = default_directory()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(directory)
        with tempfile.TemporaryFile(dir=directory):
            pass  # raises OSError if the directory is not writable
    except OSError as error:
        warn(
            f"compiled programs are not kept for the next start: {error}. Set JAX_COMPILATION_CACHE_DIR to a directory "
            "that can be written to, or JAX_ENABLE_COMPILATION_CACHE=false to keep none."
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default programs that compile in less than a second are not kept, but a start compiles a dozen of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def default_directory() -> pathlib.Path:
    """Returns the directory for this kind of machine, below $XDG_CACHE_HOME or ~/.cache.

    Raises:
      OSError: there is no home.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = pathlib.Path(cache_home) if os.path.isabs(cache_home) else pathlib.Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return cache / "dialog_jax" / "compiled" / _describe_machine()


def _describe_machine() -> str:
    """Returns `x86_64-` and a hash of the processors' models and features."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    features = {line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")}
    text = "\n".join(sorted(features)) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _check_owner(directory: pathlib.Path) -> None:
    """Raises OSError if another user could write a program there."""
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} belongs to another user, or others may write to it")
