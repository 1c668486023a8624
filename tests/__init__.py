"""Settings of every test: eight CPU devices, checked shapes, no implicit rank promotion, no program of another run.

Set here, before any test imports JAX, so that `pytest` and `python -m tests.trees.prefix_tree_test` see the same.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
from absl import flags
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("dialog_jax", "beartype.beartype")
flags.FLAGS.mark_as_parsed()  # under pytest nobody else does; absltest.main parses them again
