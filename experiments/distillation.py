"""Does a weak teacher help a student, with and without the tokens of the data?

Question:  the teacher is SmolLM2-135M-Instruct as published, which predicts ChitChat poorly; the student consists of
           every fifth of its layers and its embedding. From the same start and on the same rows, what does the student
           learn from the tokens of the data, from the teacher's top 32 tokens, and from half of each?
Command:   python experiments/distillation.py
Hardware:  two cores of an AMD EPYC with AVX-512, shared with other work.
Time:      29.0 min, 12.1 min of CPU time over all cores.
Result:    held-out loss after 40 steps: 6.51 nats per token from the tokens alone, 6.27 from the teacher alone
           (-0.23 +- 0.14) and 6.09 from half of each (-0.41 +- 0.07); 17.56 before; the teacher itself has 3.99. In the
           first 8 steps, the tokens alone are ahead. One seed.
"""

import dataclasses
import itertools
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence

import harness
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import report
from harness import Losses, Mean
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import Options

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.evaluation import scoring
from dialog_jax.inference import loading
from dialog_jax.inference.loading import Model
from dialog_jax.rendering.tokenizers import fingerprint
from dialog_jax.training import optimizer, score_steps, sharding
from dialog_jax.training import train_step as train_step_lib
from dialog_jax.training.config import LossConfig, MeshConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.trees import dataset, teacher_file
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.teacher_file import TeacherFile

CHOICES = {
    "tokens alone": LossConfig(),
    "half and half": LossConfig(distillation=0.5),
    "teacher alone": LossConfig(distillation=1.0),
}
_BASE = "tokens alone"
_COLORS = {"tokens alone": report.BLUE, "half and half": report.GREEN, "teacher alone": report.ORANGE}
_TOP_K = 32
_READ = 1000  # dialogues read from the training file; the first that fit in a row are used
_DIALOGUES = 128
_EVERY = 5  # the student has every fifth layer of the teacher
_LEARNING_RATE = 1e-3
_WARMUP_STEPS = 5
_EVALUATIONS = 5  # per training, without the one before it


def make_student(model: Model) -> Model:
    """Returns a model with every fifth layer, starting with the first, and the same embedding and final norm."""
    layers = jax.tree.map(lambda leaf: leaf[::_EVERY], model.parameters["layers"])
    config = dataclasses.replace(model.config, layers=len(jax.tree.leaves(layers)[0]))
    return model._replace(config=config, parameters={**model.parameters, "layers": layers})


def select_fitting_dialogues(model: Model, path: str) -> list[Dialogue]:
    """Returns the first dialogues of a file that fit in a row without truncation."""
    read = list(itertools.islice(read_dialogues(path), _READ))
    trees = dataset.prepare(read, model.renderer, TreeConfig(max_length=harness.MAX_LENGTH, truncate="drop"))
    fitting = set(trees.ids[:_DIALOGUES])
    return [dialogue for dialogue in read if dialogue.id in fitting]


def write_teacher(model: Model, dialogues: Sequence[Dialogue], path: pathlib.Path) -> TeacherFile:
    """Writes the model's top-k tokens for all responses to `path`, as `dialog_jax score --top_k` does, and opens it."""
    scores = scoring.score_dialogues(
        dialogues, model.renderer, model.config, model.parameters, compute_dtype=jnp.float32, top_k=_TOP_K
    )
    tokenizer = fingerprint(model.tokenizer)
    with teacher_file.write_file(path, top_k=_TOP_K, tokenizer=tokenizer, vocabulary=model.config.vocab_size) as add:
        for score in scores:
            add(score.record["id"], score.signals)
    return teacher_file.read_file(path, tokenizer=tokenizer)


def train(
    student: Model, name: str, trees: Trees, held_out: Trees, before: Losses, options: Options
) -> dict[int, Losses]:
    """Returns {step: held-out losses} of one training, with `before` at step 0."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    adam = OptimizerConfig(learning_rate=_LEARNING_RATE, warmup_steps=min(_WARMUP_STEPS, options.steps - 1))
    transform = optimizer.make_optimizer(adam, options.steps)
    state = train_step_lib.initialize_state(mesh, jax.tree.map(jnp.copy, student.parameters), transform)
    train_step = train_step_lib.make_train_step(
        student.config,
        transform,
        mesh,
        compute_dtype=jnp.float32,
        remat="dots",
        loss_config=CHOICES[name],
    )
    score_step = score_steps.make_score_step(student.config, compute_dtype=jnp.float32)
    plan = harness.make_plan(trees, options.seed)
    evaluated = np.linspace(0, options.steps, _EVALUATIONS + 1).astype(int)
    losses = {0: before}
    for number, batch in enumerate(plan.batches(0, options.steps), 1):
        state, measured = train_step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        if number in evaluated:
            losses[number] = harness.held_out_losses(score_step, state.parameters, held_out)
            mean = _mean(losses[number]).value
            print(f"{name}, step {number}: training loss {measured.loss:.3f}, held-out loss {mean:.3f}", flush=True)
    return losses


def _mean(losses: Losses, other: Losses | None = None) -> Mean:
    """Returns the mean of the losses, or of their differences from another model's on the same targets."""
    values = losses.nll if other is None else losses.nll - other.nll
    return harness.mean_over(values, np.ones(len(values)), losses.tree)


def _draw(losses: Mapping[str, Mapping[int, Losses]], teacher_losses: Losses) -> Figure:
    with report.style():
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
        _draw_losses(axes[0], losses, _mean(teacher_losses).value)
        _draw_differences(axes[1], losses)
        for one in axes:
            one.set_xlabel("step")
            one.grid(axis="y", alpha=0.25)
    return figure


def _draw_losses(axes: Axes, losses: Mapping[str, Mapping[int, Losses]], teacher_loss: float) -> None:
    ends = []
    for name, by_step in losses.items():
        steps = [number for number in by_step if number]
        means = [_mean(by_step[number]).value for number in steps]
        axes.plot(steps, means, color=_COLORS[name], marker="o", markersize=3.5, linewidth=1.6)
        ends.append((steps[-1], means[-1], name, _COLORS[name]))
    axes.plot(steps, [teacher_loss] * len(steps), color=report.GREY, linewidth=1.2, linestyle="--")
    ends.append((ends[0][0], teacher_loss, "the teacher itself", report.GREY))
    before = _mean(losses[_BASE][0]).value
    axes.set(
        title=f"The student's held-out loss, by what it learns from ({before:.1f} before)",
        ylabel="held-out loss (nats per token)",
    )
    report.label_ends(axes, ends)


def _draw_differences(axes: Axes, losses: Mapping[str, Mapping[int, Losses]]) -> None:
    ends = []
    for name in losses:
        steps = [number for number in losses[name] if number]
        means = [_mean(losses[name][number], losses[_BASE][number]) for number in steps]
        axes.errorbar(
            steps,
            [mean.value for mean in means],
            [1.96 * mean.error for mean in means],
            color=_COLORS[name],
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            capsize=0 if name == _BASE else 2,  # the baseline has no error
        )
        ends.append((steps[-1], means[-1].value, name, _COLORS[name]))
    axes.set(
        title=f"Against {_BASE}",
        ylabel="difference of held-out loss (nats per token)\nabove 0 is worse; bars: 95 % intervals",
    )
    report.label_ends(axes, ends)


def _table(losses: Mapping[str, Mapping[int, Losses]]) -> str:
    others = [name for name in losses if name != _BASE]
    rows = []
    for number in losses[_BASE]:
        cells = [str(number), *(f"{_mean(by_step[number]).value:.3f}" for by_step in losses.values())]
        rows.append(cells + [_mean(losses[name][number], losses[_BASE][number]).signed for name in others])
    return report.table(["step", *losses, *(f"{name} - {_BASE}" for name in others)], rows)


def main(options: Options) -> None:
    started = time.perf_counter()
    model = loading.load_model(options.model)
    dialogues = select_fitting_dialogues(model, options.train)
    tree_config = TreeConfig(max_length=harness.MAX_LENGTH, truncate="turns")
    held_out = dataset.prepare(read_dialogues(options.validation), model.renderer, tree_config)
    with tempfile.TemporaryDirectory() as directory:
        file = write_teacher(model, dialogues, pathlib.Path(directory) / "teacher.safetensors")
        print(f"the teacher has scored {len(dialogues)} dialogues: {time.perf_counter() - started:.0f} s", flush=True)
        trees = dataset.prepare(dialogues, model.renderer, tree_config, teacher=file)
        score_step = score_steps.make_score_step(model.config, compute_dtype=jnp.float32)
        teacher_losses = harness.held_out_losses(score_step, model.parameters, held_out)
        student = make_student(model)
        del model
        score_step = score_steps.make_score_step(student.config, compute_dtype=jnp.float32)
        before = harness.held_out_losses(score_step, student.parameters, held_out)
        losses = {name: train(student, name, trees, held_out, before, options) for name in CHOICES}
        rest = 1 - np.exp(file.top_log_probability.astype(np.float64)).sum(axis=-1).mean()
    epochs = options.steps * harness.ROWS / harness.make_plan(trees, options.seed).rows_per_epoch
    report.write(
        options,
        _draw(losses, teacher_losses),
        [
            f"The student has {student.config.layers} layers. Three trainings from the same start on the same rows: "
            f"{options.steps} steps of {harness.ROWS} rows of {harness.MAX_LENGTH} tokens, {epochs:.1f} epochs of "
            f"{len(dialogues)} dialogues. They differ in the loss only: cross-entropy with the tokens of the data, KL "
            f"divergence from the teacher on its top {_TOP_K} tokens, which leave {rest:.1%} of its probability to "
            "the rest, or half of each. With the teacher alone, the tokens of the data are not used as targets.",
            f"Held-out loss in nats per token; that of the teacher itself is {_mean(teacher_losses).value:.3f}. "
            f"{harness.SPREAD}",
            _table(losses),
        ],
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    report.run_script(main, "distillation", steps=40)
