"""Settings of every test: eight CPU devices, checked shapes, no implicit rank promotion, quick compilation.

Set here, before any test imports JAX, so that `pytest` and `python -m tests.trees.prefix_tree_test` see the same. XLA
optimizes nothing, because compiling takes longer than running. Each program is compiled once for all processes of a
test run. Programs are kept in a directory that is removed at its end: another CPU must not load them.
"""

# ruff: noqa: E402

import atexit
import os
import shutil
import tempfile

_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}

_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"{name}={value}" for name, value in _FLAGS.items() if name not in _given)]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # inherited by pytest's workers and by processes of tests
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dialog_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
from absl import flags
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("dialog_jax", "beartype.beartype")
flags.FLAGS.mark_as_parsed()  # under pytest nobody else does; absltest.main parses them again
