"""Compares one pass with K passes: dialogues and a model in, the largest differences and their places out.

One pass is what training runs: prepared trees, packed rows and the jitted train step. The context of each target is
read back from the row's mask. The K passes are those of `evaluation.k_passes`. Everything is float32.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dialog_jax.batching import batches, row_stream
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.evaluation import differences, k_pass_losses, k_passes
from dialog_jax.evaluation.differences import Agreement, Target
from dialog_jax.evaluation.k_passes import Pass
from dialog_jax.formats import tokenizer_files
from dialog_jax.model import decoder, parameter_trees
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.rendering import template_process
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from dialog_jax.rendering.written import ResponseLost
from dialog_jax.training import score_steps, sharding, train_step
from dialog_jax.training.config import MeshConfig
from dialog_jax.training.trainable import Parameters
from dialog_jax.trees import dataset, fitting
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig

_OBJECTIVE = ObjectiveConfig()
_ROW_MULTIPLE = 256
_REMAT = "dots"  # the default of TrainConfig


def compare(
    dialogues: Sequence[Dialogue],
    renderer: Renderer,
    model: DecoderConfig,
    parameters: Parameters,
    *,
    max_length: int,
    report_progress: Callable[[str], None] = lambda line: None,
) -> Agreement:
    """Returns how far one pass and K passes differ under the objective `conditional`, in rows of several dialogues.

    Args:
      renderer: of one pass. K passes share its settings, not its code.
      parameters: donated. A soft prompt among them precedes each dialogue.
      max_length: tokens of a row; responses that do not fit are left out and named.
      report_progress: called with a line of text.
    """
    agreement = Agreement()
    soft_prompt = parameter_trees.merge(*parameters).get(decoder.SOFT_PROMPT, ())
    virtual_tokens = VirtualTokens(model.vocab_size, len(soft_prompt))
    renderer = renderer.with_virtual_tokens(virtual_tokens)
    tokenizer = tokenizer_files.reopen_tokenizer(renderer.tokenizer)
    make_passes = functools.partial(
        k_passes.make_passes,
        tokenizer=template_process.limit_template(tokenizer, renderer.template_time),
        chat_template_kwargs=renderer.chat_template_kwargs,
        allow_special_tokens=renderer.allow_special_tokens,
        responses=renderer.responses,
        stop_tokens=renderer.stop_tokens,
        virtual_tokens=virtual_tokens.ids().tolist(),
    )
    pairs = []
    for dialogue in dialogues:
        passes = _make_comparable_passes(dialogue, make_passes, renderer, max_length, agreement)
        if passes:
            pairs.append((dialogue, passes))
    if not pairs:
        return agreement
    all_passes = [one for _, passes in pairs for one in passes]
    agreement.dialogues, agreement.responses = len(pairs), len(all_passes)
    agreement.response_tokens = sum(len(one.weight) for one in all_passes)
    agreement.k_pass_tokens = sum(len(one.tokens) for one in all_passes)
    numbered = [dataclasses.replace(dialogue, id=number) for number, (dialogue, _) in enumerate(pairs)]
    trees = dataset.prepare(
        numbered, renderer, TreeConfig(objective=_OBJECTIVE, max_length=max_length, truncate="turns")
    )
    assert set(trees.ids) == set(range(len(pairs))), trees.ids
    agreement.branching = trees.report.branching
    length = min(max_length, -(-trees.report.tokens // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    agreement.row_length = length
    with jax.default_matmul_precision("highest"):
        _compare_rows(pairs, trees, renderer, model, parameters, agreement, report_progress)
    return agreement


def _make_comparable_passes(
    dialogue: Dialogue,
    make_passes: Callable[[Dialogue], list[Pass]],
    renderer: Renderer,
    max_length: int,
    agreement: Agreement,
) -> list[Pass]:
    """Returns the passes of the responses that one pass trains on in rows of `max_length`; notes what is left out."""
    try:
        fitting_messages, one_pass_refusal = _try(_find_fitting_messages, dialogue, renderer, max_length)
    except ResponseLost as error:  # K passes have tokens, but these are not worth training
        agreement.left_out.append(f"refused: {error}")
        return []
    passes, k_pass_refusal = _try(make_passes, dialogue)
    size = math.inf if bool(one_pass_refusal) != bool(k_pass_refusal) else 0.0
    agreement.findings["refusals"].add(
        size, dialogue.name, one_pass_refusal or "accepted", k_pass_refusal or "accepted"
    )
    if one_pass_refusal or k_pass_refusal:
        agreement.left_out.append(f"refused: {one_pass_refusal or k_pass_refusal}")
        return []
    passes = [one for one in passes if one.weight.any()]
    if not passes:
        agreement.left_out.append(f"{dialogue.name}: no assistant message has a weight above 0")
        return []
    if cut := sum(one.message not in fitting_messages for one in passes):
        agreement.left_out.append(
            f"{dialogue.name}: {cut:,} of {len(passes):,} responses, which exceed {max_length:,} tokens together with "
            "their prompts (raise data.max_length)"
        )
    return [one for one in passes if one.message in fitting_messages]


def _try(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Returns (result, "") or (None, message of the UserError); raises `ResponseLost`."""
    try:
        return function(*arguments), ""
    except ResponseLost:
        raise
    except UserError as error:
        return None, str(error)


def _find_fitting_messages(dialogue: Dialogue, renderer: Renderer, max_length: int) -> set[int]:
    """Returns the indices of the responses that have at most `max_length` tokens with all of their history."""
    paths = fitting.unfold(dialogue, _OBJECTIVE)
    sequences = renderer.render([path.dialogue for path in paths])
    return {
        path.original_indices[sequence.message_index]
        for path, path_sequences in zip(paths, sequences, strict=True)
        for sequence in path_sequences
        if len(sequence.tokens) <= max_length
    }


def _compare_rows(
    pairs: Sequence[tuple[Dialogue, list[Pass]]],
    trees: Trees,
    renderer: Renderer,
    model: DecoderConfig,
    parameters: Parameters,
    agreement: Agreement,
    report_progress: Callable[[str], None],
) -> None:
    """Compares the train step with the passes of its rows' dialogues; rows with parts of one dialogue together."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = _keep_gradient()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), parameters)
    state = train_step.initialize_state(mesh, parameters.trained, optimizer, parameters.frozen)
    step = train_step.make_train_step(model, optimizer, mesh, compute_dtype=jnp.float32, remat=_REMAT, shapes=shapes)
    score = score_steps.make_score_step(model, compute_dtype=jnp.float32)
    plan = batches.Plan(trees, max_length=agreement.row_length, rows=1, micro_batches=1, seed=0)
    agreement.one_pass_tokens = plan.tokens_per_epoch
    # The trees of each row, in the order in which the row has them, and their dialogues.
    rows = [
        [tree for group in row_stream.group_by_shared_prefix(trees, plan.rows(number)[0]) for tree in group]
        for number in range(plan.rows_per_epoch)
    ]
    members = [[int(trees.ids[tree]) for tree in row] for row in rows]
    agreement.rows += [[pairs[index][0].name for index in dict.fromkeys(indices)] for indices in members]
    for numbers in _group_rows(members):
        place = f"row {', '.join(map(str, numbers))}"
        targets: dict[int, list[Target]] = collections.defaultdict(list)  # of each dialogue
        # The step's loss and gradient are means over a row; they are compared as sums.
        one_pass_gradient = jax.tree.map(jnp.zeros_like, state.trained)
        one_pass_loss, total_weight = 0.0, 0.0
        for number in numbers:
            report_progress(f"row {number + 1} of {plan.rows_per_epoch}: one pass")
            batch = plan.batch(number)
            row = batch.map(lambda array: array[0])
            one_pass_nll = np.asarray(score(state.parameters, row).nll[0])
            state, metrics = step(state, batch)
            row_targets = iter(differences.read_targets(row, one_pass_nll))
            for tree in rows[number]:  # no target is in a prefix that trees share
                targets[int(trees.ids[tree])] += itertools.islice(row_targets, int(trees.targets[tree]))
            row_weight = float(row.weight.sum(dtype=np.float64))
            one_pass_loss += float(metrics.loss) * row_weight
            total_weight += row_weight
            one_pass_gradient = jax.tree.map(
                lambda total, leaf, scale=row_weight: total + leaf * np.float32(scale),
                one_pass_gradient,
                state.optimizer_state,
            )

        all_passes = [one for index in targets for one in pairs[index][1]]
        report_progress(f"{place}: a pass for each of {len(all_passes):,} responses")
        k_pass_nll, gradient = k_pass_losses.compute_nll_and_gradient(
            model, state.trained, all_passes, frozen=state.frozen
        )
        remaining = iter(k_pass_nll)
        for index, dialogue_targets in targets.items():
            dialogue, passes = pairs[index]
            nll = [next(remaining) for _ in passes]
            differences.compare_responses(dialogue.name, passes, nll, dialogue_targets, renderer, agreement.findings)
        k_pass_loss = math.fsum(
            float(np.vdot(one.weight, nll)) for one, nll in zip(all_passes, k_pass_nll, strict=True)
        )
        size = abs(one_pass_loss - k_pass_loss) / max(abs(k_pass_loss), total_weight)
        agreement.findings["loss of a row"].add(size, place, f"{one_pass_loss:.6f}", f"{k_pass_loss:.6f}")
        differences.compare_gradients(one_pass_gradient, gradient, place, agreement.findings)


def _group_rows(members: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns the rows in groups such that each dialogue is in one group: [[0], [1, 2], [2]] gives [[0], [1, 2]].

    Args:
      members: the dialogues of each row.
    """
    groups: list[tuple[list[int], set[int]]] = []
    for row, dialogues in enumerate(members):
        joined = [group for group in groups if group[1].intersection(dialogues)]
        groups = [group for group in groups if group not in joined]
        rows = [number for numbers, _ in joined for number in numbers]
        groups.append(([*rows, row], {*dialogues}.union(*(names for _, names in joined))))
    return sorted(sorted(rows) for rows, _ in groups)


def _keep_gradient() -> optax.GradientTransformation:
    """Returns an optimizer that changes no parameter and whose state is the most recent gradient."""

    def zeros(parameters):
        return jax.tree.map(jnp.zeros_like, parameters)

    return optax.GradientTransformation(zeros, lambda gradient, state, parameters=None: (zeros(gradient), gradient))
