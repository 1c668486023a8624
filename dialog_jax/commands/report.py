"""Writes one HTML file to look at: a run, its data, and dialogues with the loss of every token before and after.

    dialog_jax report --run=runs/quickstart --out=report.html
    dialog_jax report --run=runs/mine --against=runs/other --out=report.html
    dialog_jax report --config.model=MODEL --config.data.train=my.jsonl --out=report.html

The file is complete: it opens from disk and loads nothing. The first form loads the model that the run began with and
the best checkpoint by held-out loss, and scores every token of each dialogue with both. --against adds the checkpoint
of another run with the same tokenizer. Without a run no weights are read: the page shows the data as training would
see it.

Shown are the first --dialogues, one half from the held-out data of a run and one half from its training data, in equal
parts from the sets of a mixture. With a run, the only fields of --config are data.train, data.mix, data.validation,
data.weights and adapter, for files that have moved: of an absolute path a run keeps only the last part.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import rich.console
import rich.status
from absl import flags

from dialog_jax import atomic_files
from dialog_jax.audit.figures import make_audit
from dialog_jax.commands import config_flag, config_inputs, entry
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.evaluation import token_scores
from dialog_jax.inference import loading
from dialog_jax.inference.loading import Model
from dialog_jax.rendering import virtual_tokens
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import fingerprint
from dialog_jax.report import dialogue_views, page, run_facts
from dialog_jax.report.dialogue_views import DialogueView
from dialog_jax.report.page import ScoredModel
from dialog_jax.report.run_facts import Run
from dialog_jax.training import compilation_cache, config_renderer, data_sources, run_directory, trained_models
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.data_sources import Source

_CONFIG = config_flag.define()
_BASE = config_inputs.define_base()
_RUN = flags.DEFINE_string("run", "", "Directory of a run: the --output_dir of dialog_jax train.")
_AGAINST = flags.DEFINE_string("against", "", "Directory of another run, to compare the first one with.")
_DIALOGUES = flags.DEFINE_integer("dialogues", 200, "Number of dialogues to show.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "The .html file to write; an existing one is replaced.")

_REMARKS = 50  # on the page
_WITH_RUN = ("data.train", "data.mix", "data.validation", "data.weights", "adapter")  # fields that name files


def main() -> None:
    compilation_cache.enable(entry.print_message)
    out = entry.require_file_path(_OUT, "report.html")
    page.bundle_vega()  # an error now, and not after the scores
    given = config_flag.read(_CONFIG)
    console = rich.console.Console(stderr=True, highlight=False)
    with console.status("reading") as status:
        html = _report_data(given, status) if not _RUN.value else _report_run(given, status)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(out, html)
    print(f"{out}: {len(html.encode()) / 1e6:.1f} MB; open it in a browser")


def _report_data(config: TrainConfig, status: rich.status.Status) -> str:
    """Returns the page of data and a tokenizer."""
    for flag in (_AGAINST, _BASE):
        if flag.value:
            raise UserError(f"--{flag.name}={flag.value} needs a run. Name one: --run=DIRECTORY")
    tokenizer, renderer = config_renderer.open_renderer(config)
    sources = {"training": [data_sources.find_source(config, name) for name in config.data.mix or ("train",)]}
    if config.data.validation:
        sources["held-out"] = [data_sources.validation_source(config)]
    plain = renderer.with_virtual_tokens(virtual_tokens.NONE)
    views, remarks = _make_views(sources, plain, config)
    status.update("auditing the data")
    audit = make_audit(
        _iterate(sources["training"]),
        tokenizer,
        renderer,
        config.make_tree_config(),
        embedding_rows=None if config.resize_embedding else config_inputs.read_embedding_rows(config.model),
    )
    name = _name_sources(sources["training"])
    return page.render(
        title=name,
        runs=[],
        audit=audit,
        data_name=name,
        max_length=config.data.max_length,
        views=views,
        models=[],
        renderer=plain,
        notes=[],
        remarks=remarks,
    )


def _report_run(given: TrainConfig, status: rich.status.Status) -> str:
    """Returns the page of one or two runs."""
    paths = [atomic_files.expand_home(name) for name in (_RUN.value, _AGAINST.value) if name]
    runs = [_read_run(path) for path in paths]
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=str(path)) for run, path in zip(runs, paths, strict=True)]
    run = runs[0]
    # The page shows the run's own config; files are read where they are now.
    config = _apply(run.config, given)
    sources = {
        "held-out": [data_sources.validation_source(config)],
        "training": list(data_sources.training_sources(config).values()),
    }
    _check_files(run, [source for group in sources.values() for source in group])
    base = trained_models.find_base(run.path, run.model, _BASE.value)

    status.update("loading the model")
    after = _load_run(run, config, _BASE.value)
    renderer = after.renderer.with_virtual_tokens(virtual_tokens.NONE)
    status.update("reading the dialogues")
    views, remarks = _make_views(sources, renderer, config)
    status.update("auditing the data")
    audit = make_audit(_iterate(sources["training"]), after.tokenizer, after.renderer, config.make_tree_config())

    # One model at a time is in memory.
    scored = [_score(f"{run.name}" if len(runs) > 1 else "after", after, views, status)]
    tokenizer = fingerprint(after.tokenizer)
    del after
    for other in runs[1:]:
        has_same_base = run_directory.read_hashes(other.path)["model"] == run_directory.read_hashes(run.path)["model"]
        model = _load_run(other, other.config, _BASE.value if has_same_base else "")
        if fingerprint(model.tokenizer) != tokenizer:
            raise UserError(
                f"{other.path} has another tokenizer than {run.path}, so that losses of its tokens cannot be compared. "
                "Make a report of each."
            )
        scored.append(_score(other.name, model, views, status))
        del model
    before = loading.load_model(
        base,
        **_model_options(config)
        | {"tokenizer": str(run.path / "tokenizer"), "adapter": config.adapter, "row_length": config.data.max_length},
        resize_embedding=config.resize_embedding,
    )
    scored.insert(0, _score("before", before, views, status))
    note = _describe_context(views, before.config.context)
    return page.render(
        title=" against ".join(one.name for one in runs),
        runs=runs,
        audit=audit,
        data_name=_name_sources(sources["training"]),
        max_length=config.data.max_length,
        views=views,
        models=scored,
        renderer=renderer,
        notes=note,
        remarks=remarks,
    )


def _read_run(path: pathlib.Path) -> Run:
    model = run_directory.read_model(path)
    checkpoint = trained_models.choose_checkpoint(path, "latest")
    if checkpoint.best is not None:
        checkpoint = trained_models.choose_checkpoint(path, "best")
    return run_facts.read_run(path, run_directory.read_config(path), model, checkpoint)


def _apply(config: TrainConfig, given: TrainConfig) -> TrainConfig:
    """Returns the config of a run with the places of files that flags name.

    Raises:
      UserError: flags change another field.
    """
    defaults, values = (run_directory.flatten_config(one) for one in (TrainConfig(), given))
    for field in values:
        name = "data.mix" if field.startswith("data.mix.") else field
        if values[field] != defaults.get(field) and name not in _WITH_RUN:
            raise UserError(
                f"--config.{field} has no effect with --run, whose own config counts. Leave it out; "
                f"{', '.join(_WITH_RUN)} say where files are now."
            )
    data = config.data
    if given.data.train or given.data.mix:
        data = dataclasses.replace(data, train=given.data.train, mix=given.data.mix)
    if given.data.validation:
        data = dataclasses.replace(data, validation=given.data.validation)
    if given.data.weights:
        data = dataclasses.replace(data, weights=given.data.weights)
    return dataclasses.replace(config, data=data, adapter=given.adapter or config.adapter)


def _check_files(run: Run, sources: Iterable[Source]) -> None:
    """Raises UserError if a file of a run is not where its config says."""
    for source in sources:
        for path in source.files.paths:
            file = pathlib.Path(path).expanduser()
            is_file_name = file.suffix in (".jsonl", ".ndjson", ".json", ".parquet", ".gz", ".bz2", ".xz", ".zst")
            if is_file_name and not file.exists():
                raise UserError(
                    f"{run.path} names the data {path!r}, which is not here; of an absolute path, a run keeps only the "
                    "last part. Name it: --config.data.train=PATH, --config.data.validation=PATH, or for a mixture "
                    "--config.data.mix=..."
                )


def _model_options(config: TrainConfig) -> dict[str, Any]:
    # The tokenizer in the directory of a run has its chat template.
    return {**config_renderer.renderer_options(config), "chat_template": "", "report": entry.print_message}


def _load_run(run: Run, config: TrainConfig, base: str) -> Model:
    """Returns the model of a run; `base` is what it began with if its config does not say where that is."""
    base = "" if trained_models.is_whole(run.model) else base
    return trained_models.load_model(str(run.path), base=base, **_model_options(config))


def _iterate(sources: Iterable[Source]) -> Iterator[Dialogue | UserError]:
    return itertools.chain.from_iterable(source.iterate_records() for source in sources)


def _name_sources(sources: Iterable[Source]) -> str:
    return ", ".join(source.name for source in sources)


def _make_views(
    sources: dict[str, list[Source]], renderer: Renderer, config: TrainConfig
) -> tuple[list[DialogueView], list[str]]:
    """Returns the views of each group's first dialogues, and remarks; the groups share the number equally."""
    views: list[DialogueView] = []
    remarks: list[str] = []
    for number, (group, group_sources) in enumerate(sources.items()):
        limit = (_DIALOGUES.value - len(views)) // (len(sources) - number)
        for index, source in enumerate(group_sources):
            share = limit // (len(group_sources) - index)
            source_views, source_remarks = dialogue_views.make_views(
                _iterate([source]), group, renderer, config.objective, share
            )
            views += source_views
            remarks += source_remarks
            limit -= len(source_views)
    if len(remarks) > _REMARKS:
        remarks = [*remarks[:_REMARKS], f"and {len(remarks) - _REMARKS:,} more"]
    return views, remarks


def _score(name: str, model: Model, views: list[DialogueView], status: rich.status.Status) -> ScoredModel:
    def show(done: int, total: int) -> None:
        status.update(f"scoring, {name}: {done:,} of {total:,} tokens")

    scores = token_scores.score_tokens(
        [view.tree for view in views], model, compute_dtype=jnp.float32, top_k=page.ALTERNATIVES, progress=show
    )
    return ScoredModel(name, scores)


def _describe_context(views: list[DialogueView], context: int) -> list[str]:
    longer = sum(int(view.tree.position.max()) >= context for view in views)
    if not longer:
        return []
    return [
        f"In {longer:,} of the dialogues shown, tokens at a position of {context:,} or more are beyond the context of "
        "the model; they have no loss and count in no mean."
    ]
