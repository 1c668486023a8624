"""Estimates whether a run fits given devices, and how fast it would be, before any of them is rented.

    dialog_jax plan --config=experiments/llama_8b.py --devices=8 --kind=h100

Takes an experiment and overrides as dialog_jax train does. The train step is compiled for that many simulated devices
on the CPU; nothing is allocated, and of the model only config.json is read. Counts are those of the partitioned
program, before the CPU's own passes. Sizes are in GB of 1e9 bytes.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from dialog_jax.commands import config_flag, entry
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.planning import compiling, estimating, hlo, model_shapes, simulated_devices, workload
from dialog_jax.planning.compiling import StepPlan
from dialog_jax.planning.estimating import Chip
from dialog_jax.planning.workload import Workload
from dialog_jax.training import config_renderer, metrics, sharding
from dialog_jax.training.config import TrainConfig

_CONFIG = config_flag.define()
_DEVICES = flags.DEFINE_integer("devices", None, "Number of devices.", lower_bound=1)
_KIND = flags.DEFINE_enum(
    "kind", None, [*estimating.CHIPS, "cpu"], "Kind of the devices; for cpu no times are estimated."
)
_EFFICIENCY = flags.DEFINE_float(
    "efficiency", 0.5, "Share of the published peak that matrix products reach.", lower_bound=0.01, upper_bound=1.0
)
_TOKENS = flags.DEFINE_float(
    "assume_tokens",
    0.9,
    "Share of a row that is not padding; used if the data is not a local file.",
    lower_bound=0,
    upper_bound=1,
)
_TARGETS = flags.DEFINE_float(
    "assume_targets",
    0.5,
    "Share of tokens that is trained on; used if the data is not a local file.",
    lower_bound=0,
    upper_bound=1,
)
_DIALOGUES = flags.DEFINE_integer("sample", 1000, "Largest number of dialogues of the data to prepare.", lower_bound=1)


def main() -> None:
    devices, kind = entry.required(_DEVICES, "8"), entry.required(_KIND, "h100")
    config = config_flag.read(_CONFIG)
    _plan(config, simulated_devices.simulate_devices(devices), kind)


def _plan(config: TrainConfig, devices: Sequence[jax.Device], kind: str) -> None:
    model = model_shapes.load_shape(config.model).for_length(config.data.max_length)
    mesh = sharding.make_mesh(config.mesh, devices)
    chip = estimating.CHIPS.get(kind)
    if chip:  # slices may be smaller than the largest
        chip = chip._replace(group_size=min(chip.group_size, mesh.size // mesh.shape.get("dcn_data", 1)))
    narrow = config.compute_dtype == "bfloat16" or (config.compute_dtype == "auto" and chip is not None)
    virtual_tokens = config_renderer.count_virtual_tokens(config)
    work = workload.measure_workload(config, model, dialogues=_DIALOGUES.value, virtual_tokens=virtual_tokens)
    if work is None:
        work = workload.assume_workload(config, model, tokens=_TOKENS.value, targets=_TARGETS.value)
    rows = config.rows * config.gradient_accumulation
    step = compiling.compile_step(
        config,
        model,
        mesh,
        compute_dtype=jnp.bfloat16 if narrow else jnp.float32,
        tokens=-(-work.tokens // rows),
        targets=-(-work.targets // rows),
        attention_pairs=-(-work.attention_pairs // rows),
    )
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"{config.model} on {mesh.size} x {kind}: {axes}; compiled in {step.seconds:.0f} s")
    parameters, active = metrics.count_parameters(model)
    print(f"{parameters:,} parameters" + (f", of which a token uses {active:,}" if active < parameters else ""))
    for line in step.uneven_layouts:
        print(f"on the mesh: {line}")
    sections = [
        _memory_lines(step, chip),
        _verdict_lines(step, chip, config, mesh, narrow=narrow) if chip else [],
        _collective_lines(step, chip),
        _work_lines(step, config, model, mesh, work),
        _time_lines(step, chip, config, work, narrow=narrow)
        if chip
        else ["No times: no published figures hold for all CPUs."],
    ]
    for lines in sections:
        print("", *lines, sep="\n")


def _gigabytes(size: int | float) -> str:
    return f"{size / 1e9:12.3f}"


def _memory_lines(step: StepPlan, chip: Chip | None) -> Iterator[str]:
    memory, largest = step.memory, step.largest
    yield f"{'Memory of a device':34}          GB"
    yield f"  trained parameters                {_gigabytes(memory.trained)}"
    yield f"  frozen parameters                 {_gigabytes(memory.frozen)}"
    yield f"  optimizer's moments               {_gigabytes(memory.moments)}"
    yield f"  batch                             {_gigabytes(memory.batch)}"
    yield f"  gradients                         {_gigabytes(memory.gradients)}"
    yield f"  activations kept for backward     {_gigabytes(memory.activations)}"
    yield f"  at least                          {_gigabytes(memory.lower_bound)}"
    if chip:
        yield f"  the chip has                      {_gigabytes(chip.memory)}"
    yield f"  as the CPU's compiler lays it out {_gigabytes(memory.compiled)}"
    yield f"    of that temporaries             {_gigabytes(memory.temporaries)}   gradients and activations among them"
    yield f"    largest                         {_gigabytes(largest.bytes)}   {largest.shape} {largest.operation_name}"
    yield "  The chip's compiler uses other layouts. The CPU's compiler keeps float32 copies of bfloat16 arrays."


def _verdict_lines(step: StepPlan, chip: Chip, config: TrainConfig, mesh: Mesh, *, narrow: bool) -> Iterator[str]:
    verdict = estimating.judge_memory(step.memory, chip)
    yield {
        estimating.FITS: "FITS, even in the layout of the CPU's compiler.",
        estimating.DOUBTFUL: "MAY NOT FIT: the lower bound fits, the layout of the CPU's compiler does not.",
        estimating.DOES_NOT_FIT: "DOES NOT FIT with any compiler.",
    }[verdict]
    if verdict != estimating.FITS:
        yield from (f"  {line}" for line in estimating.list_remedies(step, chip, config, mesh, narrow=narrow))


def _collective_lines(step: StepPlan, chip: Chip | None) -> Iterator[str]:
    yield f"{'Collectives of a device in a step':34}       count          GB{'     seconds' if chip else ''}"
    for kind in hlo.COLLECTIVES:
        collectives = [one for one in step.collectives if one.kind == kind]
        count, size = sum(one.runs for one in collectives), sum(one.runs * one.bytes for one in collectives)
        line = f"  {kind:32}{count:12,.0f}{_gigabytes(size)}"
        if chip:
            line += f"{sum(sum(estimating.estimate_exchange(one, chip)) for one in collectives):12.3f}"
        yield line
    if step.collectives:
        largest = max(step.collectives, key=lambda one: one.runs * one.bytes)
        runs = f"{largest.runs:,.0f} times"
        yield f"  most bytes: {largest.kind} among {len(largest.group)}, {runs}, {largest.operation_name}"
    yield "  GB are the sizes of the arrays over all devices of a group."


def _work_lines(step: StepPlan, config: TrainConfig, model: DecoderConfig, mesh: Mesh, work: Workload) -> Iterator[str]:
    capacity = config.rows * config.gradient_accumulation * config.data.max_length
    useful = metrics.count_flops(
        model,
        tokens=work.tokens,
        attention_pairs=work.attention_pairs,
        targets=work.targets,
        selection=step.selection,
    )
    executed = step.products.flops * mesh.size
    yield f"Work of a step, all devices ({work.source})"
    yield f"  tokens            {work.tokens:12,} of {capacity:,}: {work.tokens / capacity:.1%} useful"
    yield f"  targets           {work.targets:12,}"
    yield f"  useful FLOPs      {useful:12.3e}"
    yield f"  executed FLOPs    {executed:12.3e}   {useful / executed:.0%} useful; recomputation, padding, masked pairs"


def _time_lines(step: StepPlan, chip: Chip, config: TrainConfig, work: Workload, *, narrow: bool) -> Iterator[str]:
    peak = f"at {_EFFICIENCY.value:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s{'' if narrow else ', those of bfloat16'}"
    seconds = estimating.estimate_seconds(step, chip, efficiency=_EFFICIENCY.value)
    yield "Seconds of a step, from published peaks"
    yield f"  matrix products   {seconds.compute:12.3f}   {peak}"
    yield f"  memory            {seconds.memory:12.3f}   at {chip.bandwidth / 1e9:,.0f} GB/s; products and update only"
    link = f"at {chip.link / 1e9:,.0f} GB/s within nodes or slices of {chip.group_size:,}"
    yield f"  links             {seconds.link:12.3f}   {link}"
    network = f"at {chip.network / 1e9:,.1f} GB/s per device between them" if chip.network else "not published"
    yield f"  network           {seconds.network:12.3f}   {network}"
    best, worst = seconds.overlapped, seconds.serialized
    yield f"ESTIMATE {best:.3f} s per step if everything overlaps, {worst:.3f} s if no exchange does;"
    yield f"  {work.tokens / best:,.0f} to {work.tokens / worst:,.0f} useful tokens per second;"
    if work.steps:
        hours = work.steps / 3600
        yield f"  {hours * best:,.1f} to {hours * worst:,.1f} hours for {work.steps:,} steps"
    else:
        yield f"  hours unknown: {config.epochs:g} epochs of data that is not a local file. Set --config.steps."
