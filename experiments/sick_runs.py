"""Does `dialog_jax diagnose` say what is wrong with runs that go wrong in the ways that users meet?

Question:  a learning rate that is too high, the chat template of another family, few dialogues for many epochs, and
           held-out dialogues among the training data: what does each do to the losses, and what does diagnose find?
           Does it find nothing in a healthy run?
Command:   python experiments/sick_runs.py
Hardware:  two cores of an AMD EPYC without AVX-512; 2.8 GB of memory.
Time:      23.6 min for the updates, and as much for evaluations and diagnoses, on a machine with much other work.
Result:    each has its finding, and the healthy run has none. Held-out loss from 4.527: 3.893 healthy; 13.4 with 100
           times the learning rate; 4.067, then 5.034, with 4 dialogues 7 times each; 3.543 with the held-out dialogues
           in the training data, below the healthy run. With another template it goes from 3.032 to 2.741, since the
           marks are text of many tokens that are easy to predict; there `template_mismatch` is only `possible`, because
           no special token ends a response, and the first tokens alone give it away. Until this experiment, diagnose
           took the run with the high learning rate for memorizing. One seed each.
           experiments/results/sick_runs.md, sick_runs.png
"""

import dataclasses
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import report
import short_runs
from matplotlib.figure import Figure
from report import Options

from dialog_jax import atomic_files
from dialog_jax.errors import UserError
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.training.config import DataConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig

MAX_LENGTH = 256
_HIGHEST = 6.0  # nats in the picture, which a run that diverges leaves; labels have all last losses
_FINDING = re.compile(r"^(\w+) \((certain|likely|possible)\): ", re.MULTILINE)

# That of Gemma, of which SmolLM2 has none of the special tokens.
_OTHER_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the runs have in common."""

    train: int = 60
    """Dialogues."""
    few: int = 4
    held_out: int = 16
    updates: int = 20
    """Of one row each."""
    evaluate_every: int = 5
    learning_rate: float = 1e-3
    rank: int = 16
    """Of LoRA."""


class Sickness(NamedTuple):
    """What is wrong with one run."""

    what: str
    kind: str
    """The finding that names it; empty for the healthy run."""
    color: str
    data: str = "train"
    chat_template: str = ""
    rate_factor: float = 1.0


SICKNESSES = {
    "healthy": Sickness("nothing", "", report.GREY),
    "learning rate": Sickness(
        "the learning rate is 100 times that of the healthy run", "learning_rate_high", report.ORANGE, rate_factor=100
    ),
    "template": Sickness(
        "the chat template is Gemma's", "template_mismatch", report.GREEN, chat_template=_OTHER_TEMPLATE
    ),
    "few dialogues": Sickness(
        "four dialogues again and again instead of 60 at most once", "memorizing", report.BLUE, data="few"
    ),
    "contaminated": Sickness(
        "the held-out dialogues are among the training data", "contaminated", "#8a5fa8", data="contaminated"
    ),
}


class Outcome(NamedTuple):
    """What one run gave."""

    updates: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl."""
    evaluations: Sequence[Mapping[str, Any]]
    """Lines of evaluation.jsonl."""
    diagnosis: str
    """Output of `dialog_jax diagnose`."""

    @property
    def findings(self) -> dict[str, str]:
        """The confidence of each finding by its kind."""
        return dict(_FINDING.findall(self.diagnosis))


def write_data(options: Options, sizes: Sizes) -> None:
    """Writes the files of dialogues that the runs train on and evaluate."""
    train = short_runs.read_short(options.train, first=0, count=sizes.train)
    held_out = short_runs.read_short(options.validation, first=0, count=sizes.held_out)
    sets = {
        "train": train,
        "few": train[: sizes.few],
        "contaminated": train[sizes.held_out :] + held_out,
        "held_out": held_out,
    }
    for name, records in sets.items():
        short_runs.write_lines(pathlib.Path(options.runs_dir, f"{name}.jsonl"), records)


def make_config(options: Options, sizes: Sizes, sickness: Sickness) -> TrainConfig:
    """Returns the config of a run."""
    data = pathlib.Path(options.runs_dir)
    return TrainConfig(
        model=options.model,
        data=DataConfig(
            train=str(data / f"{sickness.data}.jsonl"),
            validation=str(data / "held_out.jsonl"),
            chat_template=sickness.chat_template,
            max_length=MAX_LENGTH,
            workers=0,
        ),
        lora=LoraConfig(rank=sizes.rank),
        optimizer=OptimizerConfig(learning_rate=sickness.rate_factor * sizes.learning_rate),
        rows=1,
        gradient_accumulation=1,
        steps=sizes.updates,
        evaluate_every=sizes.evaluate_every,
        evaluate_rows=0,
        checkpoint_every=sizes.evaluate_every,
    )


def run(options: Options, sizes: Sizes, name: str) -> Outcome:
    """Trains one run and diagnoses it, unless that has been done.

    Raises:
      UserError: `dialog_jax diagnose` failed; its output is in the message.
    """
    directory = pathlib.Path(options.runs_dir, name.replace(" ", "_"))
    text = directory.with_name(f"{directory.name}.diagnosis.txt")
    if not text.exists():
        config = make_config(options, sizes, SICKNESSES[name])
        short_runs.train(config, directory)
        command = [sys.executable, "-m", "dialog_jax", "diagnose", f"--run={directory}"]
        data = config.data
        command += [f"--base={config.model}", f"--train={data.train}", f"--validation={data.validation}"]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode not in (0, 1) or "findings: " not in process.stdout:
            raise UserError(f"{name}: diagnose ended with status {process.returncode}: {process.stderr[-2000:]}")
        atomic_files.write_text(text, process.stdout)
    updates, evaluations = (short_runs.read_lines(directory / f"{file}.jsonl") for file in ("metrics", "evaluation"))
    outcome = Outcome(updates, evaluations, text.read_text(encoding="utf-8"))
    losses = ", ".join(f"{line['loss']:.3f}" for line in evaluations)
    print(f"{name}: held-out loss {losses}; findings: {outcome.findings}", flush=True)
    return outcome


def make_table(outcomes: Mapping[str, Outcome]) -> str:
    """Returns the table of all runs: a row for each."""
    rows = []
    for name, outcome in outcomes.items():
        losses = [line["loss"] for line in outcome.evaluations]
        training = [line["nll"] for line in outcome.updates]
        findings = ", ".join(f"`{kind}` ({confidence})" for kind, confidence in outcome.findings.items()) or "none"
        cells = [name, SICKNESSES[name].what, *(f"{loss:.3f}" for loss in (losses[0], min(losses), losses[-1]))]
        rows.append([*cells, f"{training[0]:.3f}", f"{training[-1]:.3f}", findings])
    header = ["run", "what is wrong", "held-out loss before", "lowest", "after", "training loss, first update", "last"]
    return report.table([*header, "findings"], rows)


def draw(outcomes: Mapping[str, Outcome]) -> Figure:
    """Returns the figure: training loss and held-out loss of each run by update."""
    columns = {
        "Training loss": lambda outcome: [(line["step"], line["nll"]) for line in outcome.updates],
        "Held-out loss": lambda outcome: [(line["step"], line["loss"]) for line in outcome.evaluations],
    }
    with report.style():
        figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
        for axes, (title, list_points) in zip(panels, columns.items(), strict=True):
            ends = []
            for name, outcome in outcomes.items():
                steps, losses = zip(*list_points(outcome), strict=True)
                axes.plot(steps, losses, color=SICKNESSES[name].color, marker="o", markersize=3, linewidth=1.5)
                label = f"{name} {losses[-1]:.2f}"
                ends.append((float(steps[-1]), min(losses[-1], _HIGHEST), label, SICKNESSES[name].color))
            axes.set(title=title, xlabel="update", ylabel="nats per token", ylim=(0, _HIGHEST))
            axes.set_xticks(range(0, steps[-1] + 1, max(1, steps[-1] // 4)))
            axes.grid(axis="y", alpha=0.25)
            report.label_ends(axes, ends)
    return figure


def main(options: Options, sizes: Sizes | None = None) -> None:
    sizes = sizes or Sizes()
    short_runs.claim_directory(options, dataclasses.asdict(sizes))
    write_data(options, sizes)
    outcomes = {name: run(options, sizes, name) for name in SICKNESSES}
    minutes = sum(line["seconds"] for outcome in outcomes.values() for line in outcome.updates) / 60
    report.write(
        options,
        draw(outcomes),
        [
            f"Five runs of {sizes.updates} updates of a row of {MAX_LENGTH} tokens; LoRA of rank {sizes.rank} at a "
            f"learning rate of {sizes.learning_rate:g}. Dialogues are cut to {short_runs.MESSAGES} messages: "
            f"{sizes.train} to train on, {sizes.few} in `few dialogues`, and {sizes.held_out} held-out ones, all of "
            "which are evaluated. Losses are in nats per token; that of a training loss is of one row, and those with "
            "another template are of other tokens. "
            f"The updates took {minutes:.1f} min on a machine that other work used as well.",
            make_table(outcomes),
            "The two runs with the lowest held-out loss are sick. The marks of the other template are text of several "
            "tokens here, most of which are easy to predict; so its losses are low, and fewer responses fit into a row "
            "(`few_targets`).",
            "What `dialog_jax diagnose --run=...` prints for each:",
            *(f"**{name}**\n\n```\n{outcome.diagnosis.rstrip()}\n```" for name, outcome in outcomes.items()),
        ],
        seconds=None,
    )


if __name__ == "__main__":
    report.run_script(main, "sick_runs", runs_dir="runs/sick_runs")
