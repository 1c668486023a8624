"""A run's train step, compiled for devices that are not there: what each would hold, compute and exchange.

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

from dialog_jax.attention import blockwise
from dialog_jax.batching.batches import Batch
from dialog_jax.errors import UserError
from dialog_jax.inference import loading
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.planning import hlo
from dialog_jax.planning.hlo import Collective, Products, Program
from dialog_jax.training import loss, optimizer, sharding
from dialog_jax.training import train_step as step_lib
from dialog_jax.training.config import TrainConfig

TEACHER_TOKENS = 16  # of each target, where a teacher is named: how many its file has is not looked at

# The program is kept as text after the partitioner, or, for one device, which needs none, after calls are inlined: both
# before the CPU's own passes, which compute bfloat16 in float32 and fuse products into kernels of their own. Machine
# code, which never runs, is made with the least effort.
_OPTIONS: dict[str, Any] = {
    "xla_dump_hlo_as_text": True,
    "xla_dump_hlo_pass_re": "spmd-partitioning|call-inliner",
    "xla_backend_optimization_level": 0,
}


class Memory(NamedTuple):
    """Bytes of one device."""

    parameters: int
    moments: int
    batch: int
    gradients: int
    """With several micro-batches their sum, and beside it what of a micro-batch's own is there at once."""
    activations: int
    """Activations that the forward pass leaves for the backward pass, in the types that the program asks for."""
    temporaries: int
    """All that is neither state nor batch (so gradients and `activations` too), as the CPU's compiler lays it out."""

    @property
    def lower_bound(self) -> int:
        """What any compiler needs."""
        return self.parameters + self.moments + self.batch + self.gradients + self.activations

    @property
    def compiled(self) -> int:
        """What the CPU's compiler needs."""
        return self.parameters + self.moments + self.batch + self.temporaries


class Largest(NamedTuple):
    """The largest temporary array of the CPU's program."""

    bytes: int
    shape: str
    operation_name: str


class StepPlan(NamedTuple):
    """A step of one device."""

    memory: Memory
    largest: Largest
    products: Products
    collectives: list[Collective]
    uneven_layouts: list[str]
    """What `sharding.describe_uneven_layouts` says."""
    seconds: float
    """That compilation took here."""


def compile_step(
    config: TrainConfig,
    model: DecoderConfig,
    mesh: Mesh,
    *,
    compute_dtype: jax.typing.DTypeLike,
    targets: int,
    attention_pairs: int,
) -> StepPlan:
    """Returns what one update of the run is to a device of `mesh`.

    Args:
      targets: of a row; the loop over tiles of targets is as long as these need.
      attention_pairs: of a row, of a token and one that it sees; the same for the loop over pairs of blocks.

    Raises:
      UserError: rows do not go evenly over the mesh, the model's context is shorter than a row, the optimizer does not
        suit the steps, or the program has a loop of unknown length.
    """
    loading.check_context(model, config.data.max_length)
    # The schedule's numbers change no shape: any number of steps after the warm-up does.
    transform = optimizer.make_optimizer(config.optimizer, config.steps or config.optimizer.warmup_steps + 1)
    state = step_lib.abstract_state(model, mesh, transform)
    batch = _abstract_batch(config, mesh)
    step = step_lib.make_train_step(
        model,
        transform,
        mesh,
        compute_dtype=compute_dtype,
        remat=config.remat,
        loss_config=config.loss,
    )
    began = time.monotonic()
    lowered = step.lower(state, batch)
    with tempfile.TemporaryDirectory() as directory, _no_compilation_cache():
        compiled = lowered.compile({**_OPTIONS, "xla_dump_to": directory})
        program = hlo.parse(_dumped(directory, "after_spmd-partitioning", "after_call-inliner"))
        largest = _largest(_dumped(directory, "buffer-assignment"), hlo.parse(compiled.as_text() or ""))
        analysis = compiled.memory_analysis()
        assert analysis is not None, "the CPU's compiler says what it needs"
    tile = min(loss.TILE, config.data.max_targets or config.data.max_length)
    turns = {
        blockwise.PAIRS: _block_pairs(config.data.max_length, attention_pairs),
        loss.TILES: float(-(-targets // tile)),
    }
    counts = hlo.count_runs(program, unknown=functools.partial(_turns, turns))
    return StepPlan(
        memory=Memory(
            parameters=_device_bytes(state.parameters),
            moments=_device_bytes(state.optimizer_state),
            batch=_device_bytes(batch),
            gradients=_gradient_bytes(config, model, state.parameters),
            activations=sum(
                one.array.bytes for one in hlo.find_stored_arrays(program) if "transpose(" not in one.operation_name
            ),
            temporaries=analysis.temp_size_in_bytes,
        ),
        largest=largest,
        products=hlo.sum_products(program, counts),
        collectives=hlo.find_collectives(program, counts, mesh.size),
        uneven_layouts=sharding.describe_uneven_layouts(mesh, state.parameters),
        seconds=time.monotonic() - began,
    )


def _gradient_bytes(config: TrainConfig, model: DecoderConfig, parameters: dict) -> int:
    """Gradients have the types and shardings of parameters."""
    whole = _device_bytes(parameters)
    if config.gradient_accumulation == 1:
        return whole
    # The loop over layers leaves all of theirs at once. Where the two are tied, it begins with the output matrix's and
    # the embedding's is added to that; an output matrix of its own may be added to the sum before, the embedding after.
    return whole + (whole if model.tie_embeddings else _device_bytes(parameters["layers"]))


def _turns(known: dict[str, float], name: str) -> float:
    """How often the loop that compiled programs call `name` runs."""
    for part, times in known.items():
        if part in name:
            return times
    raise UserError(
        f"the program's loop {name!r} runs as often as its data say; a plan knows how often for {' and '.join(known)} "
        "only. Give the loop a name with jax.named_scope, and its number of turns where planning.compiling lists them."
    )


def _block_pairs(length: int, pairs: int) -> float:
    """About how many pairs of blocks attention visits in a row: as in one dialogue with as many pairs of tokens."""
    block = min(blockwise.BLOCK, length)
    blocks = -(-length // block)
    return min(max(pairs / block**2 + blocks / 2, 1.0 * blocks), blocks * (blocks + 1) / 2)


def _abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    place = sharding.batch_sharding(mesh)
    lead = (config.gradient_accumulation, config.rows)
    try:
        place.shard_shape(lead)
    except ValueError as error:
        raise UserError(
            f"rows is {config.rows}, but rows are divided as {place.spec[1]} over the mesh {dict(mesh.shape)}. Choose "
            "a multiple of the product of these axes, so that every device has rows."
        ) from error

    def shape(size, dtype, *more):
        return jax.ShapeDtypeStruct((*lead, size, *more), dtype, sharding=place)

    tokens = shape(config.data.max_length, jnp.int32)
    size = config.data.max_targets or config.data.max_length
    targets, weight = shape(size, jnp.int32), shape(size, jnp.float32)
    batch = Batch(tokens, tokens, tokens, tokens, targets, targets, weight, targets)
    if config.data.teacher:
        batch = batch._replace(
            teacher_token=shape(size, jnp.int32, TEACHER_TOKENS),
            teacher_log_probability=shape(size, jnp.float32, TEACHER_TOKENS),
        )
    return batch


def _device_bytes(arrays) -> int:
    """Bytes of one device's parts of abstract arrays."""
    return sum(
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype).size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays)
    )


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Compiles although JAX may keep this program from another process, since only the compiler writes its texts."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX looks at the setting once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _dumped(directory: str, *names: str) -> str:
    """The text of the first file that has one of `names` in its own; earlier names are preferred."""
    for name in names:
        for file in sorted(pathlib.Path(directory).glob(f"*{name}*.txt")):
            if "buffer-assignment-values" not in file.name:
                return file.read_text(encoding="utf-8")
    raise UserError(
        f"XLA left no text of {' or '.join(names)}, as that of JAX 0.10 does; this is JAX {jax.__version__}."
    )


def _largest(assignment: str, optimised: Program) -> Largest:
    """The largest value within the allocations for temporaries."""
    best, inside = Largest(0, "", ""), False
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            inside = "preallocated-temp" in line
        value = re.match(r" value: <\d+ ([\w.\-]+)[^>]*> \(size=(\d+),offset=\d+\): (\S+)", line)
        if inside and value and int(value.group(2)) > best.bytes:
            best = Largest(int(value.group(2)), value.group(3).partition("{")[0], value.group(1))
    return best._replace(operation_name=_origin(optimised, best.operation_name))


def _origin(program: Program, name: str) -> str:
    """Where an instruction comes from; what the compiler made has the origin of what it was made of."""
    for body in program.computations.values():
        while name in body:
            instruction = body[name]
            fused = hlo.find_called_computation(program, instruction).values()
            origins = [one.operation_name for one in (instruction, *fused) if one.operation_name]
            if origins:
                return origins[0]
            name = instruction.operands[0]
    return name
