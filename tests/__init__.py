"""Settings of every test: eight CPU devices, checked shapes, no implicit rank promotion, quick compilation.

Set here, before any test imports JAX, so that `pytest` and `python -m tests.trees.prefix_tree_test` see the same. XLA
optimizes nothing, because compiling takes longer than running, unless XLA_FLAGS sets a level of optimization. Each
program is compiled once for all processes of a test run. Programs are kept in a directory that is removed at its end:
another CPU must not load them.
"""

# ruff: noqa: E402

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

_QUICK_COMPILATION = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The emitters that generate code for each fusion take three quarters of the time. Later releases have no others.
    _QUICK_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")

_COUNT = "--xla_force_host_platform_device_count"
_shared_flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_COUNT)]
if not any(flag.startswith("--xla_backend_optimization_level") for flag in _shared_flags):
    _shared_flags += _QUICK_COMPILATION


def xla_flags(*, devices: int) -> str:
    """Returns XLA_FLAGS for a process of a test with this number of CPU devices."""
    return " ".join([*_shared_flags, f"{_COUNT}={devices}"])


os.environ["XLA_FLAGS"] = xla_flags(devices=8)
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
# Tracing makes many objects that live on; by default Python looks for cycles among them again and again.
gc.set_threshold(100_000, 50, 100)
flags.FLAGS.mark_as_parsed()  # under pytest nobody else does; absltest.main parses them again
