"""What a run reads before it starts: model, tokenizer and prepared trees, and a hash of each.

Knows no devices and no steps. Errors in the user's files are found here, before anything but prepared trees is written.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import rich.console
import transformers

from dialog_jax import atomic_files
from dialog_jax.batching.mixture import Mixture
from dialog_jax.dialogues import weight_file
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.inference import loading
from dialog_jax.model import model_files, peft_reading
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.peft_reading import Adapter
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import fingerprint
from dialog_jax.training import config_renderer, data_sources
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.data_sources import Files, Source
from dialog_jax.trees import disk_cache, teacher_file
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.teacher_file import TeacherFile

SKIPPED = "skipped.txt"
"""The file in a run's directory that lists every skipped record."""

# Fields of DataConfig that do not change trees, or whose content is in their key.
_NOT_IN_TREES = {
    "train",
    "mix",
    "validation",
    "validation_share",
    "train_split",
    "validation_split",
    "chat_template",
    "template_time",
    "cache_dir",
    "teacher",
    "weights",
    "workers",
}


class Inputs(NamedTuple):
    """A run's model, tokenizer and data."""

    model_path: pathlib.Path
    model: DecoderConfig
    tokenizer: transformers.PreTrainedTokenizerFast
    stop_tokens: frozenset[int]
    """Ids of the tokens at which a reply ends."""
    dtype: str
    """Type of the published weights."""
    added_rows: int
    """Rows at the end of the embedding that the published one does not have."""
    adapter: Adapter | None
    """That training continues; None if it starts a new one, or none."""
    template_time: str
    """The time that the chat template takes for the current one; empty if it reads no clock."""
    train: Trees | Mixture
    held_out: Trees
    hashes: Mapping[str, str]
    """Hashes of the content of model and data, by config field."""

    def without_shared_prefixes(self) -> "Inputs":
        """Returns the inputs with trees that share no prefix, for attention kernels that support only paths."""
        return self._replace(
            train=self.train.without_shared_prefixes(), held_out=self.held_out.without_shared_prefixes()
        )


def read_inputs(config: TrainConfig, directory: pathlib.Path, console: rich.console.Console, now: str = "") -> Inputs:
    """Returns the inputs that `config` names. Trees are prepared unless `directory` or data.cache_dir has them.

    Args:
      now: the time for templates that read the clock if data.template_time is empty, the same on all processes; empty
        for the time of the call.

    Raises:
      UserError: a file is missing or broken, or model, tokenizer and data do not fit together.
    """
    options = config_renderer.renderer_options(config) | {"template_time": config.data.template_time or now}
    model = loading.open_model(
        config.model,
        adapter=config.adapter,
        tokenizer=config.tokenizer,
        **options,
        resize_embedding=config.resize_embedding,
        soft_prompt_tokens=config.soft_prompt.tokens,
        row_length=config.data.max_length,
        report=console.print,
    )
    if model.renderer.template_time:
        console.print(
            f"the chat template reads the clock: it is {model.renderer.template_time} for this run (data.template_time)"
        )
    loading.check_context(model.config, config.data.max_length)
    if (virtual := model.renderer.virtual_tokens.count) > config.data.max_length - 2:
        raise UserError(
            f"the soft prompt of {config.adapter} has {virtual:,} tokens and data.max_length is "
            f"{config.data.max_length:,}, which leaves no room for a prompt and a response. Raise data.max_length."
        )
    teacher = _read_teacher(config, model)
    prepare = functools.partial(_prepare_trees, config, model.renderer, directory, console)
    sets: dict[str, Trees] = {}
    hashes = {"model": model_files.fingerprint(model.path)}
    if config.adapter:
        hashes["adapter"] = peft_reading.fingerprint(atomic_files.expand_home(config.adapter))
    validation = data_sources.validation_source(config)
    for field, source in data_sources.training_sources(config).items():
        sets[field], hashes[field] = prepare(source, teacher)
    held_out, hashes["data.validation"] = prepare(validation, None)
    _list_skipped(directory / SKIPPED, [*sets.values(), held_out])
    if validation.division is not None:
        console.print(
            f"data.validation is empty: {validation.name} is held out (dialogues: {held_out.report.dialogues:,}), "
            "chosen by a hash of each dialogue"
        )
    return Inputs(
        model_path=model.path,
        model=model.config,
        tokenizer=model.tokenizer,
        stop_tokens=model.stop_tokens,
        dtype=model.dtype,
        added_rows=model.added_rows,
        adapter=model.adapter,
        template_time=model.renderer.template_time,
        train=Mixture(dict(zip(config.data.mix, sets.values(), strict=True)), config.data.mix)
        if config.data.mix
        else sets["data.train"],
        held_out=held_out,
        hashes=hashes,
    )


def _prepare_trees(
    config: TrainConfig,
    renderer: Renderer,
    directory: pathlib.Path,
    console: rich.console.Console,
    source: Source,
    teacher: TeacherFile | None,
) -> tuple[Trees, str]:
    """Returns (the trees of a source, from the cache if they are there; a hash of everything that determines them)."""
    weights = [source.files.weights] if source.files.weights else []
    files = [pathlib.Path(path).expanduser() for path in [*source.files.paths, *weights]]
    versions = [_file_version(file) for file in files]
    with console.status(f"reading {source.name}"):
        dialogues = [_hash_dialogues(source.files, path) for path in source.files.paths]
    key = {
        "dialogues": dialogues,
        "held_out": [source.held_out, source.division.limit if source.division else 0],
        "tokenizer": fingerprint(renderer.tokenizer),
        "chat_template": renderer.tokenizer.chat_template,
        "template_time": renderer.template_time,
        "stop_tokens": sorted(renderer.stop_tokens),
        "objective": dataclasses.asdict(config.objective),
        # All other fields, so that a new one is not forgotten.
        **{name: value for name, value in dataclasses.asdict(config.data).items() if name not in _NOT_IN_TREES},
    }
    if renderer.virtual_tokens.count:
        key["virtual_tokens"] = dataclasses.asdict(renderer.virtual_tokens)
    if teacher is not None:
        key["teacher"] = teacher.digest
    if weights:
        key["weights"] = weight_file.read_file(source.files.weights).digest
    with console.status(f"preparing {source.name}"):
        trees = disk_cache.load_or_build(
            config.data.cache_dir or directory / "trees",
            key,
            _check_unchanged(source.iterate(), files, versions),
            renderer,
            config.make_tree_config(),
            teacher=teacher,
            workers=config.data.workers,
        )
    names_file = f"{config.data.cache_dir or 'trees'}/*/report.json"
    console.print(f"{source.name}: {trees.report.format(names_file, SKIPPED)}")
    return trees, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _list_skipped(file: pathlib.Path, sets: Sequence[Trees]) -> None:
    """Writes the error of each skipped record of all sets, one per line; removes the file if there is none."""
    text = "".join(f"{error}\n" for trees in sets for error in trees.skipped)
    if not text:
        file.unlink(missing_ok=True)
    elif not file.exists() or file.read_text(encoding="utf-8") != text:  # the first process of a run has written it
        atomic_files.write_text(file, text)


def _hash_dialogues(source: Files, path: str) -> str:
    """Returns a hash of a file's bytes, or of the dialogues of a hub data set."""
    digest = hashlib.sha256()
    file = pathlib.Path(path).expanduser()
    if file.is_file():
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    else:
        for record in dataclasses.replace(source, paths=(path,), weights="").iterate():
            content = str(record) if isinstance(record, UserError) else dataclasses.asdict(record)
            digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _file_version(file: pathlib.Path) -> tuple[int, ...] | None:
    """Returns what changes when a file is written to or replaced; None if there is no file."""
    if not file.is_file():
        return None
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_unchanged(
    dialogues: Iterable[Dialogue | UserError],
    files: Sequence[pathlib.Path],
    versions: Sequence[tuple[int, ...] | None],
) -> Iterator[Dialogue | UserError]:
    """Yields the dialogues; raises UserError at the end if a file has changed, whose old hash is in the trees' key."""
    yield from dialogues
    for file, version in zip(files, versions, strict=True):
        if _file_version(file) != version:
            raise UserError(f"{file.name} changed while it was read. Start again once it is written in full.")


def _read_teacher(config: TrainConfig, model: loading.Model) -> TeacherFile | None:
    """Returns the file of data.teacher, if there is one."""
    if not config.data.teacher:
        return None
    teacher = teacher_file.read_file(config.data.teacher, tokenizer=fingerprint(model.tokenizer))
    if teacher.template_time != model.renderer.template_time:
        raise UserError(
            f"{teacher.name}: the time in the teacher's prompts is {teacher.template_time or 'none'}, in those of this "
            f"run {model.renderer.template_time or 'none'}. Set data.template_time={teacher.template_time}, or score "
            "with the chat template of this run."
        )
    if teacher.largest >= model.config.vocab_size:
        raise UserError(
            f"{teacher.name} names token {teacher.largest:,}, but the model's vocabulary has "
            f"{model.config.vocab_size:,}. Choose a teacher with the model's tokenizer."
        )
    return teacher
