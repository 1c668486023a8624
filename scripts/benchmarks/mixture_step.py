"""Time of a train step of a mixture of experts relative to that of a dense model that computes as much.

    python scripts/benchmarks/mixture_step.py --layers=30 --rows=2 --length=512

Both models have the widths of SmolLM2-135M. The mixture has 8 experts of half the feed-forward's width, of which 2 are
active. Parameters and tokens are random, all tokens are targets, products are float32.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from dialog_jax.batching.batches import Batch
from dialog_jax.model import decoder
from dialog_jax.model.decoder_config import DecoderConfig, Experts
from dialog_jax.model.rotary import Rotary
from dialog_jax.training import optimizer, sharding, train_step
from dialog_jax.training.config import MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig


def make_models(layers: int) -> dict[str, DecoderConfig]:
    """Returns the dense model and the mixture."""
    dense = DecoderConfig(
        family="llama", vocab_size=49152, width=576, layers=layers, heads=9, kv_heads=3, head_dim=64, feed_forward=1536,
        max_length=8192, rotary=(Rotary(theta=100000.0),), tie_embeddings=True,
    )  # fmt: skip
    experts = Experts(count=8, active=2, width=dense.feed_forward // 2, normalize=True)
    return {"dense": dense, "mixture": dataclasses.replace(dense, experts=experts)}


def make_batch(vocabulary: int, rows: int, length: int) -> Batch:
    """Returns one micro-batch of rows that are one random dialogue each."""
    shape = (1, rows, length)
    index = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
    ones, ends = np.ones(shape, np.int32), np.full(shape, length, np.int32)
    return Batch(tokens, index, ends, ones, index, tokens, np.ones(shape, np.float32), np.zeros(shape, np.int32))


def measure(model: DecoderConfig, batch: Batch, steps: int) -> tuple[float, float]:
    """Returns (seconds of all cores, seconds) of a step; of both, the least of `steps` steps."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    transform = optimizer.make_optimizer(OptimizerConfig(), 100)
    state = train_step.initialize_state(mesh, decoder.init_parameters(model, jax.random.key(0)), transform)
    step = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.float32, remat="none")
    times = []
    for _ in range(steps + 1):
        cpu, wall = time.process_time(), time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(cpu for cpu, _ in times[1:]), min(wall for _, wall in times[1:])


def main() -> None:
    """Prints one line for each model, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 30), ("rows", 2), ("length", 512), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    results = {}
    for name, model in make_models(arguments.layers).items():
        size = sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract_parameters(model)))
        batch = make_batch(model.vocab_size, arguments.rows, arguments.length)
        results[name] = measure(model, batch, arguments.steps)
        cpu, wall = results[name]
        print(f"{name}: {size / 1e6:.0f} M parameters, {cpu:.2f} s of CPU time and {wall:.2f} s a step", flush=True)
    print("ratio: " + ", ".join(f"{b / a:.2f}" for a, b in zip(results["dense"], results["mixture"], strict=True)))


if __name__ == "__main__":
    main()
