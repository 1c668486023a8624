"""A run's train step, compiled for devices that are not present: what each would hold, compute and exchange.

In: a config and a mesh of simulated devices. Out: bytes and counts of one device. Nothing is allocated and no weights
are read: every array is a shape with a sharding. Knows no chips and no seconds; see `planning.estimating`.
"""

import contextlib
import functools
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from dialog_jax import atomic_files
from dialog_jax.attention import blockwise
from dialog_jax.batching.batches import Batch
from dialog_jax.errors import UserError
from dialog_jax.inference import loading
from dialog_jax.model import grouped_products, peft_reading
from dialog_jax.model.decoder_config import DecoderConfig, Experts
from dialog_jax.planning import hlo
from dialog_jax.planning.hlo import Collective, Products, Program
from dialog_jax.training import loss, optimizer, sharding, train_step, trainable
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.trainable import Selection

TEACHER_TOKENS = 16  # assumed per target if the config names a teacher; its file is not read

# XLA dumps the program after the partitioner or, for one device, which needs no partitioner, after calls are inlined.
# Both are before the CPU's own passes, which compute bfloat16 in float32 and fuse products into kernels. The machine
# code never runs, so it is not optimized.
_OPTIONS: dict[str, Any] = {
    "xla_dump_hlo_as_text": True,
    "xla_dump_hlo_pass_re": "spmd-partitioning|call-inliner",
    "xla_backend_optimization_level": 0,
}


class Memory(NamedTuple):
    """Bytes of one device."""

    trained: int
    """Of the trained parameters."""
    frozen: int
    """Of the other parameters."""
    moments: int
    batch: int
    gradients: int
    """With several micro-batches, their sum and the part of one micro-batch's gradient that exists at the same time."""
    activations: int
    """Activations that the forward pass stores for the backward pass, in the types of the program."""
    temporaries: int
    """Everything but state and batch, gradients and activations included, in the layout of the CPU's compiler."""

    @property
    def parameters(self) -> int:
        """Bytes of all parameters."""
        return self.trained + self.frozen

    @property
    def lower_bound(self) -> int:
        """Bytes that any compiler needs."""
        return self.parameters + self.moments + self.batch + self.gradients + self.activations

    @property
    def compiled(self) -> int:
        """Bytes that the CPU's compiler needs."""
        return self.parameters + self.moments + self.batch + self.temporaries


class LargestArray(NamedTuple):
    """The largest temporary array of the CPU's program."""

    bytes: int
    shape: str
    operation_name: str


class StepPlan(NamedTuple):
    """One step on one device."""

    memory: Memory
    largest: LargestArray
    products: Products
    collectives: list[Collective]
    uneven_layouts: list[str]
    """From `sharding.describe_uneven_layouts`."""
    seconds: float
    """Of the compilation on this machine."""
    selection: Selection
    """What the step trains."""


def compile_step(
    config: TrainConfig,
    model: DecoderConfig,
    mesh: Mesh,
    *,
    compute_dtype: jax.typing.DTypeLike,
    tokens: int,
    targets: int,
    attention_pairs: int,
) -> StepPlan:
    """Returns what one step of the run costs a device of `mesh`.

    Args:
      tokens: per row, without padding; determines the trip count of the loop over blocks of an expert's tokens.
      targets: per row; determines the trip count of the loop over tiles of targets.
      attention_pairs: pairs of a token and a token that it sees, per row; determines the trip count of the loop over
        pairs of blocks.

    Raises:
      UserError: rows do not divide evenly over the mesh, the model's context is shorter than a row, the run is not
        longer than its warm-up, or this version of XLA writes its program in another format.
    """
    loading.check_context(model, config.data.max_length)
    # The schedule's values change no shape, so any number of steps above the warm-up will do.
    transform = optimizer.make_optimizer(config.optimizer, config.steps or max(1, config.optimizer.warmup_steps + 1))
    config = config.resolve()
    adapter = peft_reading.read_adapter(atomic_files.expand_home(config.adapter), model) if config.adapter else None
    selection = trainable.select(config, model, compute_dtype, adapter)
    shapes = trainable.abstract_parameters(selection)
    state = train_step.abstract_state(shapes, mesh, transform)
    batch = _make_abstract_batch(config, mesh)
    step = train_step.make_train_step(
        model,
        transform,
        mesh,
        compute_dtype=compute_dtype,
        remat=config.remat,
        loss_config=config.loss,
        shapes=shapes,
        lora_dropout=config.lora.dropout if selection.scales else 0.0,
    )
    start = time.monotonic()
    lowered = step.lower(state, batch)
    with tempfile.TemporaryDirectory() as directory, _no_compilation_cache():
        compiled = lowered.compile({**_OPTIONS, "xla_dump_to": directory})
        program = hlo.parse(_read_dump(directory, "after_spmd-partitioning", "after_call-inliner"))
        largest = _find_largest(_read_dump(directory, "buffer-assignment"), hlo.parse(compiled.as_text() or ""))
        analysis = compiled.memory_analysis()
        assert analysis is not None, "the CPU's compiler reports its memory"
    tile = min(loss.TILE, config.data.max_length)
    trip_counts = {
        blockwise.PAIRS: _estimate_block_pairs(config.data.max_length, attention_pairs),
        loss.TILES: float(-(-targets // tile)),
    }
    if model.experts is not None:
        device_rows = config.rows // sharding.count_row_shards(mesh)
        trip_counts[grouped_products.BLOCKS] = _estimate_expert_blocks(
            model.experts, device_rows, config.data.max_length, tokens, mesh.shape["tensor"]
        )
    counts = hlo.count_runs(program, unknown=functools.partial(_find_trip_count, trip_counts))
    return StepPlan(
        memory=Memory(
            trained=_count_device_bytes(state.trained),
            frozen=_count_device_bytes(state.frozen),
            moments=_count_device_bytes(state.optimizer_state),
            batch=_count_device_bytes(batch),
            gradients=_count_gradient_bytes(config, model, state.trained),
            activations=sum(
                stored.array.bytes
                for stored in hlo.find_stored_arrays(program)
                if "transpose(" not in stored.operation_name  # as the backward pass is named
            ),
            temporaries=analysis.temp_size_in_bytes,
        ),
        largest=largest,
        products=hlo.sum_products(program, counts),
        collectives=hlo.find_collectives(program, counts, mesh.size),
        uneven_layouts=sharding.describe_uneven_layouts(mesh, state.parameters),
        seconds=time.monotonic() - start,
        selection=selection,
    )


def _count_gradient_bytes(config: TrainConfig, model: DecoderConfig, trained: dict) -> int:
    """Returns the bytes of gradients, which have the types and shardings of the trained parameters."""
    gradient = _count_device_bytes(trained)
    if config.gradient_accumulation == 1:
        return gradient
    # Beside the sum: the loop over layers returns the gradients of all layers at once. The gradient of a tied embedding
    # exists from the unembedding at the beginning to the embedding at the end. Untied ones can be added to the sum
    # before and after that loop.
    layers = _count_device_bytes(trained.get("layers", {}))
    return gradient + (gradient if model.tie_embeddings and "embedding" in trained else layers)


def _find_trip_count(trip_counts: dict[str, float], operation_name: str) -> float:
    """Returns the trip count of a loop whose trip count depends on its data."""
    for scope, trip_count in trip_counts.items():
        if scope in operation_name:
            return trip_count
    raise ValueError(
        f"the trip count of loop {operation_name!r} depends on its data; it is known for {' and '.join(trip_counts)} "
        "only. Name the loop with jax.named_scope, and add its trip count in planning.compiling."
    )


def _estimate_block_pairs(length: int, pairs: int) -> float:
    """Returns an estimate of the pairs of blocks that attention visits in a row of one dialogue with `pairs` pairs."""
    block = min(blockwise.BLOCK, length)
    blocks = -(-length // block)
    return min(max(pairs / block**2 + blocks / 2, 1.0 * blocks), blocks * (blocks + 1) / 2)


def _estimate_expert_blocks(experts: Experts, rows: int, length: int, tokens: int, tensor: int) -> float:
    """Returns an estimate of the blocks that an expert computes, of a device's rows with `tokens` tokens each."""
    groups = experts.count // tensor if experts.count % tensor == 0 else experts.count
    block = grouped_products.find_block(rows * length * experts.active, groups)
    return rows * tokens * experts.active / experts.count / block + 0.5


def _make_abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Returns the batch of one step as shapes with shardings."""
    layout = sharding.batch_sharding(mesh)
    lead = (config.gradient_accumulation, config.rows)
    try:
        layout.shard_shape(lead)
    except ValueError as error:
        raise UserError(
            f"rows is {config.rows}, but rows are divided as {layout.spec[1]} over the mesh {dict(mesh.shape)}. Choose "
            "a multiple of the product of these axes, so that every device has rows."
        ) from error

    def shape(size, dtype, *trailing):
        return jax.ShapeDtypeStruct((*lead, size, *trailing), dtype, sharding=layout)

    tokens = shape(config.data.max_length, jnp.int32)
    targets, weight = shape(config.data.max_length, jnp.int32), shape(config.data.max_length, jnp.float32)
    batch = Batch(tokens, tokens, tokens, tokens, targets, targets, weight, targets)
    if config.data.teacher:
        batch = batch._replace(
            teacher_token=shape(config.data.max_length, jnp.int32, TEACHER_TOKENS),
            teacher_log_probability=shape(config.data.max_length, jnp.float32, TEACHER_TOKENS),
        )
    return batch


def _count_device_bytes(arrays) -> int:
    """Returns the bytes of one device's parts of abstract arrays."""
    return sum(
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype).size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays)
    )


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Turns JAX's compilation cache off: only the compiler dumps the program, a cached program is not dumped."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX looks at the setting once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _read_dump(directory: str, *names: str) -> str:
    """Returns the text of the first file whose name contains one of `names`; earlier names are preferred."""
    for name in names:
        for file in sorted(pathlib.Path(directory).glob(f"*{name}*.txt")):
            if "buffer-assignment-values" not in file.name:
                return file.read_text(encoding="utf-8")
    raise UserError(
        f"XLA of JAX {jax.__version__} writes no text of {' or '.join(names)}. Install a version that BUILD.md lists."
    )


def _find_largest(assignment: str, optimized: Program) -> LargestArray:
    """Returns the largest value within the allocations for temporaries."""
    largest, in_temporaries = LargestArray(0, "", ""), False
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            in_temporaries = "preallocated-temp" in line
        value = re.match(r" value: <\d+ ([\w.\-]+)[^>]*> \(size=(\d+),offset=\d+\): (\S+)", line)
        if in_temporaries and value and int(value.group(2)) > largest.bytes:
            largest = LargestArray(int(value.group(2)), value.group(3).partition("{")[0], value.group(1))
    return largest._replace(operation_name=_find_origin(optimized, largest.operation_name))


def _find_origin(program: Program, name: str) -> str:
    """Returns the operation name of an instruction, or of its first operand for one that the compiler inserted."""
    for body in program.computations.values():
        while name in body:
            instruction = body[name]
            fused = hlo.find_called_computation(program, instruction).values()
            origins = [part.operation_name for part in (instruction, *fused) if part.operation_name]
            if origins:
                return origins[0]
            name = instruction.operands[0]
    return name
