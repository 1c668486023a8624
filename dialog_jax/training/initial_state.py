"""The state from which a run continues: its newest checkpoint that can be read, or the published weights.

Frozen parameters are always the published ones.
"""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import optax
import rich.console
from jax.sharding import Mesh

from dialog_jax.errors import UserError
from dialog_jax.model import pretrained, quantization
from dialog_jax.model.quantization import RoundingError
from dialog_jax.training import checkpoints, distributed, run_directory, sharding, train_step, trainable
from dialog_jax.training.checkpoints import DamagedError
from dialog_jax.training.run_inputs import Inputs
from dialog_jax.training.train_step import TrainState
from dialog_jax.training.trainable import Parameters, Selection


def restore_or_load(
    inputs: Inputs,
    selection: Selection,
    seed: int,
    mesh: Mesh,
    update_rule: optax.GradientTransformation,
    directory: pathlib.Path,
    console: rich.console.Console,
) -> TrainState:
    """Returns the newest state that can be read, or the first state of a fresh run.

    Args:
      seed: of the initial factors of LoRA and the initial soft prompt.
    """
    steps = checkpoints.list_steps(directory / "checkpoints")
    distributed.check_same("state", {"checkpoints": steps})
    shapes = trainable.abstract_parameters(selection)
    if steps and not shapes.frozen:  # the published weights are not needed
        like = train_step.abstract_state(shapes, mesh, update_rule)
        return _restore_newest(directory, steps, like, console)

    def place(path: str, array: np.ndarray) -> jax.Array:
        layout = sharding.parameter_sharding(mesh, path.split("/"), array.shape)
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    errors: dict[str, RoundingError] = {}

    def load() -> Parameters:
        base = pretrained.load_parameters(
            inputs.model_path,
            inputs.model,
            sharding=lambda path, shape: sharding.parameter_sharding(mesh, path, shape),
            dtype=selection.dtype,
            added_rows=inputs.added_rows,
            find_kind=selection.find_kind,
            report_error=errors.__setitem__,
        )
        return trainable.make_parameters(
            selection,
            base,
            jax.random.key(seed),
            lambda path, x: place(path, np.asarray(x)),
            soft_prompt_text=inputs.tokenizer(selection.soft_prompt.text)["input_ids"],
            adapter=inputs.adapter,
        )

    parameters = distributed.run_on_all_hosts(load)
    if errors:
        console.print(quantization.describe_errors(selection.frozen_kind, errors))
    state = train_step.initialize_state(mesh, parameters.trained, update_rule, parameters.frozen)
    return _restore_newest(directory, steps, state, console) if steps else state


def _restore_newest(
    directory: pathlib.Path, steps: Sequence[int], like: TrainState, console: rich.console.Console
) -> TrainState:
    """Returns the newest state that can be read; moves the damaged checkpoints after it to damaged/."""
    damaged: list[int] = []
    for step in sorted(steps, reverse=True):
        try:
            state = checkpoints.restore(directory / "checkpoints", step, like)
        except DamagedError as error:
            console.print(f"{error}")
            damaged.append(step)
            continue
        distributed.run_primary_first(lambda: _move_damaged(directory, damaged, console))
        return state
    raise UserError(
        f"{directory.name}: none of the checkpoints {', '.join(map(str, damaged))} can be read. Restore one from a "
        "copy, undo changes of model or optimizer made with --allow_changes, or start again in another --output_dir."
    )


def _move_damaged(directory: pathlib.Path, steps: Sequence[int], console: rich.console.Console) -> None:
    for step in steps if distributed.is_primary() else ():
        place = run_directory.move_damaged_checkpoint(directory, step)
        console.print(f"checkpoint {step} was moved to {place}")
