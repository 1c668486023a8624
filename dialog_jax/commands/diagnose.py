"""Says why a run does not learn, or learns less than it could: findings with their figures and what to change.

    dialog_jax diagnose --run=runs/mine

Reads the figures of the run so far, compares its best checkpoint with the model that it began with, scores held-out
dialogues with both, and looks for held-out responses in the training data. `certain` findings were counted, `likely`
and `possible` ones are what the figures suggest; docs/diagnose.md has all kinds with their thresholds. The exit code is
1 if there is a finding, else 0. What cannot be checked, because the model or the data is not here, is listed: of
absolute paths a run keeps only the last part, so name them with --base, --train, --validation, --weights and --adapter.

With --overfit, a copy of the model is trained on 8 dialogues of the training data for 50 steps, in a temporary
directory. If their loss does not fall by half, the model cannot learn with this config, whatever the data.
"""

import dataclasses
import io
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
from absl import flags

from dialog_jax.commands import config_inputs, entry
from dialog_jax.diagnosis import findings as findings_lib
from dialog_jax.diagnosis import measurements, run_figures
from dialog_jax.diagnosis.finding import Finding
from dialog_jax.diagnosis.run_figures import Figures
from dialog_jax.dialogues import parsing, sources
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.evaluation import scoring
from dialog_jax.model import parameter_trees
from dialog_jax.training import (
    compilation_cache,
    config_renderer,
    data_sources,
    run_directory,
    trainable,
    trained_models,
)
from dialog_jax.training import run as run_lib
from dialog_jax.training.config import MeshConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig

_RUN = flags.DEFINE_string("run", None, "Directory of a run: the --output_dir of dialog_jax train.")
_BASE = config_inputs.define_base()
_TRAIN = flags.DEFINE_string("train", "", "The training data, if it is not where the run's config.json says.")
_VALIDATION = flags.DEFINE_string("validation", "", "The held-out data, if it is not where config.json says.")
_WEIGHTS = flags.DEFINE_string(
    "weights", "", "The file of weights (data.weights), if it is not where config.json says."
)
_ADAPTER = flags.DEFINE_string(
    "adapter", "", "The adapter that the run continued, if it is not where config.json says."
)
_OVERFIT = flags.DEFINE_bool("overfit", False, "Train a copy on 8 dialogues for 50 steps: can the model learn at all?")

_SAMPLE, _SAMPLE_CHARACTERS = 64, 1 << 17  # held-out dialogues that are scored, and their text: about 32,000 tokens
_OVERFIT_DIALOGUES, _OVERFIT_STEPS = 8, 50
_OVERFIT_FACTOR = 10  # times the default learning rate: 50 steps are few, and forgetting does not matter here
_LEARNS = 0.5  # of the loss before


def read_config(run: pathlib.Path) -> TrainConfig:
    """Returns the config of the run, with the places of its data that the flags name."""
    config = run_directory.read_config(run)
    if config.data.mix and (_TRAIN.value or _VALIDATION.value):
        raise UserError(
            "--train and --validation are for runs with one training set; this one has data.mix. Start the command "
            "where its relative paths begin."
        )
    data = dataclasses.replace(
        config.data,
        train=_TRAIN.value or config.data.train,
        validation=_VALIDATION.value or config.data.validation,
        weights=_WEIGHTS.value or config.data.weights,
    )
    return dataclasses.replace(config, data=data, adapter=_ADAPTER.value or config.adapter)


def measure(run: pathlib.Path, config: TrainConfig, figures: Figures) -> Figures:
    """Returns the figures with what can be measured on the model and the data."""
    missing: dict[str, str] = {}

    def attempt(fields: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            missing.update(dict.fromkeys(fields.split(), str(error)))
            return None

    held_out = attempt("overlap responses held_out", lambda: list(data_sources.validation_source(config).read([])))
    overlap = None
    if held_out is not None:
        overlap = attempt("overlap", lambda: measurements.measure_overlap(_iterate_training(config), held_out))
    models = attempt("changes responses held_out", _load_models, run, config)
    measured: dict[str, Any] = {"overlap": overlap, "changes": models and models[2]}
    if models is not None and held_out is not None:
        before, model, _ = models
        sample = _choose_sample(held_out)
        entry.print_message(f"scoring {len(sample):,} of {len(held_out):,} held-out dialogues with both models")
        options: dict[str, Any] = {"compute_dtype": jnp.float32, "skipped": []}
        scores = [
            attempt(
                "responses held_out",
                lambda parameters=parameters: list(
                    scoring.score_dialogues(sample, model.renderer, model.config, parameters, **options)
                ),
            )
            for parameters in (before, model.parameters)
        ]
        missing.setdefault("responses", "no held-out response has three tokens")
        missing.setdefault("held_out", "fewer than two held-out dialogues have a response")
        has_end = model.renderer.end_of_turn is not None
        measured["responses"] = scores[0] and measurements.measure_responses(scores[0], has_end=has_end)
        measured["held_out"] = (all(scores) and measurements.measure_held_out_change(*scores)) or None
    return dataclasses.replace(figures, missing=missing, **measured)


def _choose_sample(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Returns dialogues from all of the data, limited in number and in text; at least two, which an error needs."""
    sample = dialogues[:: max(1, len(dialogues) // _SAMPLE)][:_SAMPLE]
    sizes = [sum(len(message.content) for message in dialogue.messages) for dialogue in sample]
    count = sum(total <= _SAMPLE_CHARACTERS for total in itertools.accumulate(sizes))
    return list(sample[: max(2, count)])


def _iterate_training(config: TrainConfig) -> Iterator[Dialogue]:
    for source in data_sources.training_sources(config).values():
        yield from source.read([])


def _load_models(run: pathlib.Path, config: TrainConfig) -> tuple[dict, Any, list[run_figures.ParameterChange]]:
    """Returns (all parameters before training, the model of the best checkpoint, how far its parameters moved)."""
    model = run_directory.read_model(run)
    base = trained_models.find_base(run, model, _BASE.value)
    options = config_renderer.renderer_options(config) | {"report": entry.print_message}
    options["chat_template"] = ""  # the run's tokenizer has it
    needed = "" if trained_models.is_whole(model) else str(base)
    tuned = trained_models.load_model(str(run), base=needed, **options)
    before = trained_models.load_initial(run, model, base, adapter=config.adapter)
    paths = parameter_trees.flatten(trainable.abstract_parameters(model.selection).trained)
    trained, _ = parameter_trees.split(tuned.parameters, lambda path: path in paths)
    return before, tuned, measurements.measure_changes(before, trained)


def overfit(run: pathlib.Path, config: TrainConfig) -> tuple[str, Finding | None]:
    """Returns (the outcome of a training on a few dialogues, a finding if their loss did not fall by half)."""
    records = _find_records(config)
    if not records:
        raise UserError("--overfit found no dialogue with a response in the training data. Name it: --train=...")
    base = trained_models.find_base(run, run_directory.read_model(run), _BASE.value)
    with tempfile.TemporaryDirectory() as directory:
        data = pathlib.Path(directory) / "few.jsonl"
        # What JSON has no type for, such as a date in a Parquet file, is no part of a message.
        data.write_text("".join(json.dumps(record, default=str) + "\n" for record in records), encoding="utf-8")
        default = dataclasses.replace(config, optimizer=OptimizerConfig()).resolve().optimizer.learning_rate
        rate = default if config.soft_prompt.tokens else _OVERFIT_FACTOR * default
        few = dataclasses.replace(
            config,
            model=str(base),
            tokenizer=str(run / "tokenizer"),
            mesh=MeshConfig(),
            rows=jax.device_count(),
            data=dataclasses.replace(
                config.data,
                train=str(data),
                validation=str(data),
                chat_template="",  # the run's tokenizer has it
                mix={},
                weights="",
                teacher="",
                cache_dir="",
                workers=0,
            ),
            loss=dataclasses.replace(config.loss, distillation=0.0),
            optimizer=dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0, learning_rate=rate),
            steps=_OVERFIT_STEPS,
            gradient_accumulation=1,
            evaluate_every=_OVERFIT_STEPS,
            checkpoint_every=_OVERFIT_STEPS,
        )
        console = rich.console.Console(file=io.StringIO())
        result = run_lib.run(few, pathlib.Path(directory) / "run", console=console)
    return judge_overfit(len(records), result.initial["loss"], result.final["loss"], rate)


def _find_records(config: TrainConfig) -> list[Any]:
    """Returns the first records of the training data that are dialogues with a response."""
    records = []
    for source in data_sources.training_sources(config).values():
        for path in source.files.paths:
            for index, (where, record) in enumerate(sources.read_records(path, split=source.files.split)):
                try:
                    dialogue = parsing.parse_dialogue(record, index=index, where=where, roles=config.data.roles)
                except UserError:  # the run has stopped at it or listed it
                    continue
                if any(message.role == "assistant" and message.weight > 0 for message in dialogue.messages):
                    records.append(record)
                if len(records) == _OVERFIT_DIALOGUES:
                    return records
    return records


def judge_overfit(dialogues: int, before: float, after: float, rate: float) -> tuple[str, Finding | None]:
    """Returns (a sentence with the outcome, a finding if the loss did not fall by half)."""
    outcome = (
        f"overfit: the loss of {dialogues} dialogues went from {before:.4f} to {after:.4f} in {_OVERFIT_STEPS} steps "
        f"at a constant learning rate of {rate:.3g}"
    )
    if after <= _LEARNS * before:
        return f"{outcome}: the model can learn", None
    remedy = (
        "Look at what is trained and at the chat template. If parameters move and the loss stays, report it as a bug "
        "with the run's config.json."
    )
    return outcome, Finding("certain", f"{outcome}, by less than half", remedy)


def describe(run: pathlib.Path, figures: Figures) -> str:
    """Returns where the run is, in one line."""
    loss, nll = figures.evaluations["loss"], figures.updates["nll"]
    held_out = f", held-out loss {loss[0]:.4f} to {loss[-1]:.4f}" if len(loss) else ""
    return (
        f"{run}: step {figures.updates['step'][-1]:,.0f} of {figures.steps:,}, training loss {nll[0]:.4f} to "
        f"{nll[-1]:.4f}{held_out}"
    )


def main() -> int:
    compilation_cache.enable(entry.print_message)
    run = pathlib.Path(entry.required(_RUN, "runs/mine")).expanduser()
    figures = run_figures.read_figures(run)
    config = read_config(run)
    findings, unchecked = findings_lib.diagnose(measure(run, config, figures))
    print(describe(run, figures))
    if _OVERFIT.value:
        try:
            outcome, finding = overfit(run, config)
        except UserError as error:
            outcome, finding = f"overfit: not done: {error}", None
        print(outcome)
        if finding:
            findings["cannot_learn"] = finding
    print(f"findings: {len(findings):,}")
    if text := findings_lib.format_findings(findings, unchecked):
        print(text)
    return int(bool(findings))
