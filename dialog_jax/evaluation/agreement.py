"""Whether one pass and K passes agree: dialogues and a model in, the largest differences and their places out.

One pass is what training runs: prepared trees, packed rows, the compiled update with its own gradient of the loss. What
each target sees is read back from the row's mask. K passes are `training.k_passes`. All of it is float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

from dialog_jax.batching import batches
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.evaluation import differences, k_passes
from dialog_jax.evaluation.differences import Agreement
from dialog_jax.evaluation.k_passes import Pass
from dialog_jax.model.decoder import DecoderConfig
from dialog_jax.rendering import template_process
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training import sharding, train_step
from dialog_jax.training.config import MeshConfig
from dialog_jax.trees import dataset
from dialog_jax.trees import fitting as fitting_lib
from dialog_jax.trees.chunks import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig

_OBJECTIVE = ObjectiveConfig()
_ROW_MULTIPLE = 256
_REMAT = "dots"  # as TrainConfig has it


def compare(
    dialogues: Sequence[Dialogue],
    tokenizer: transformers.PreTrainedTokenizerFast,
    model: DecoderConfig,
    parameters: dict,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
    max_length: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Agreement:
    """Returns how far one pass and K passes are apart under the objective `conditional`, in rows of several dialogues.

    Args:
      parameters: used up.
      max_length: of a row, in tokens; responses that it cuts off are left out and named.
      tell: is given a line whenever there is progress.
    """
    outcome = Agreement()
    renderer = Renderer(tokenizer, chat_template_kwargs=chat_template_kwargs, allow_special_tokens=allow_special_tokens)
    naive = functools.partial(
        k_passes.make_passes,
        tokenizer=template_process.limit_template(tokenizer),
        chat_template_kwargs=chat_template_kwargs,
        allow_special_tokens=allow_special_tokens,
    )
    kept = []
    for dialogue in dialogues:
        passes = _passes(dialogue, naive, renderer, max_length, outcome)
        if passes:
            kept.append((dialogue, passes))
    if not kept:
        return outcome
    outcome.dialogues, outcome.responses = len(kept), sum(len(passes) for _, passes in kept)
    every = [one for _, passes in kept for one in passes]
    outcome.response_tokens = sum(len(one.weight) for one in every)
    outcome.k_pass_tokens = sum(len(one.tokens) for one in every)
    numbered = [dataclasses.replace(dialogue, id=number) for number, (dialogue, _) in enumerate(kept)]
    trees = dataset.prepare(numbered, renderer, TreeConfig(objective=_OBJECTIVE, max_length=max_length))
    assert trees.ids == tuple(range(len(kept))), trees.ids
    outcome.one_pass_tokens, outcome.branching = trees.report.tokens, trees.report.branching
    length = min(max_length, -(-trees.report.tokens // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    plan = batches.Plan(trees, max_length=length, rows=1, micro_batches=1, seed=0)
    outcome.row_length = length
    with jax.default_matmul_precision("highest"):
        _compare_rows(kept, plan, tokenizer, model, parameters, outcome, tell)
    return outcome


def _passes(
    dialogue: Dialogue,
    naive: Callable[[Dialogue], list[Pass]],
    renderer: Renderer,
    max_length: int,
    outcome: Agreement,
) -> list[Pass]:
    """The passes of those responses that one pass trains on in rows of `max_length`; says why, where there is none."""
    fitting, own_refusal = _attempt(_fitting, dialogue, renderer, max_length)
    passes, refusal = _attempt(naive, dialogue)
    one_alone = math.inf if bool(refusal) != bool(own_refusal) else 0.0
    outcome.findings["refusals"].add(one_alone, dialogue.name, own_refusal or "accepted", refusal or "accepted")
    if refusal or own_refusal:
        outcome.left_out.append(f"refused: {own_refusal or refusal}")
        return []
    passes = [one for one in passes if one.weight.any()]
    if not passes:
        outcome.left_out.append(f"{dialogue.name}: no assistant message has a weight above 0")
        return []
    if cut := sum(one.message not in fitting for one in passes):
        outcome.left_out.append(
            f"{dialogue.name}: {cut:,} of {len(passes):,} responses, which exceed {max_length:,} tokens with what "
            "stands before them (raise --max_length)"
        )
    return [one for one in passes if one.message in fitting]


def _attempt(make: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """(what it makes, "") or (None, why it cannot)."""
    try:
        return make(*arguments), ""
    except ValueError as error:
        return None, str(error)


def _fitting(dialogue: Dialogue, renderer: Renderer, max_length: int) -> set[int]:
    """The messages that are trained on in a tree of at most `max_length` tokens; renders all of them."""
    paths = fitting_lib.unfold(dialogue, _OBJECTIVE)
    sequences = [list(each) for each in renderer.render([path.dialogue for path in paths])]
    fitting = fitting_lib.select_fitting(sequences, _OBJECTIVE, max_length)
    return {
        path.original_indices[each.message_index] for path, some in zip(paths, fitting, strict=True) for each in some
    }


def _compare_rows(
    kept: Sequence[tuple[Dialogue, list[Pass]]],
    plan: batches.Plan,
    tokenizer: transformers.PreTrainedTokenizerFast,
    model: DecoderConfig,
    parameters: dict,
    outcome: Agreement,
    tell: Callable[[str], None],
) -> None:
    """Compares row by row what training does with it and the passes of its dialogues."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = _keep_gradient()
    state = train_step.initialize_state(mesh, parameters, optimizer)
    update = train_step.make_train_step(model, optimizer, mesh, compute_dtype=jnp.float32, remat=_REMAT)
    score = train_step.make_score_step(model, compute_dtype=jnp.float32)
    for number in range(plan.rows_per_epoch):
        where = f"row {number}"
        members = [kept[tree] for tree in plan.rows(number)[0]]
        every = [one for _, passes in members for one in passes]
        outcome.rows.append([dialogue.name for dialogue, _ in members])
        tell(f"row {number + 1} of {plan.rows_per_epoch}: one pass")
        batch = plan.batch(number)
        row = batch.map(lambda array: array[0])
        one_nll = np.asarray(score(state.parameters, row).nll[0])
        state, metrics = update(state, batch)
        tell(f"row {number + 1} of {plan.rows_per_epoch}: a pass for each of {len(every):,} responses")
        nll, gradient = k_passes.compute_nll_and_gradient(model, state.parameters, every)
        own = iter(nll)
        for segment, (dialogue, passes) in enumerate(members, 1):
            read = differences.read_targets(row, one_nll, segment)
            of_passes = [next(own) for _ in passes]
            differences.compare_responses(dialogue.name, passes, of_passes, read, tokenizer, outcome.findings)
        # The update's loss is a mean; both are held together as sums.
        total = row.weight.sum(dtype=np.float64)
        value = math.fsum(float(np.vdot(one.weight, each)) for one, each in zip(every, nll, strict=True))
        one_value = float(metrics.loss) * total
        size = abs(one_value - value) / max(abs(value), total)
        outcome.findings["loss of a row"].add(size, where, f"{one_value:.6f}", f"{value:.6f}")
        one_gradient = jax.tree.map(lambda leaf, total=total: leaf * np.float32(total), state.optimizer_state)
        differences.compare_gradients(one_gradient, gradient, where, outcome.findings)


def _keep_gradient() -> optax.GradientTransformation:
    """An optimizer that changes nothing and has the last gradient for its state."""

    def zeros(parameters):
        return jax.tree.map(jnp.zeros_like, parameters)

    return optax.GradientTransformation(zeros, lambda gradient, state, parameters=None: (zeros(gradient), gradient))
