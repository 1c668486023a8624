"""Writes a commented config for a model and data, or from an Axolotl config.

    dialog_jax init --model=MODEL --data=my.jsonl --out=my_config.py
    dialog_jax init --from=axolotl.yml --out=my_config.py

The first looks at the model's config, its chat template, up to 200 records of the data and the memory of the devices
that are here, and chooses the length of a row, what is trained, and the length of the run. The comments say why. No
weights are read.

The second carries over the fields of an Axolotl config that have a counterpart, and lists all others, each with the
reason. It looks at neither model nor data.

An existing file is never overwritten.
"""

import pathlib
import textwrap
from collections.abc import Sequence

from absl import flags

from dialog_jax import atomic_files
from dialog_jax.commands import entry
from dialog_jax.drafting import axolotl, axolotl_fields, config_text, memory, survey, values
from dialog_jax.drafting.config_text import Entry
from dialog_jax.errors import UserError
from dialog_jax.planning import model_shapes
from dialog_jax.rendering.tokenizers import NoChatTemplateError, largest_token
from dialog_jax.training import config_renderer, metrics
from dialog_jax.training.config import DataConfig, TrainConfig

_MODEL = flags.DEFINE_string("model", None, "A model: a directory, a .gguf file or a name on the Hub.")
_DATA = flags.DEFINE_string("data", None, "Dialogues to train on, as config.data.train: a file or a Hub data set.")
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", "", "A Jinja file, as config.data.chat_template; empty for the tokenizer's own template."
)
_FROM = flags.DEFINE_string("from", None, "An Axolotl config (YAML), instead of --model and --data.")
_OUT = flags.DEFINE_string("out", None, "The .py file to write.")


def main() -> None:
    out = entry.require_file_path(_OUT, "my_config.py")
    if out.suffix != ".py":
        raise UserError(f"--out={out}: a config is a Python file. Name one that ends in .py.")
    if out.exists():
        raise UserError(f"--out={out} exists, and init overwrites nothing. Name another file, or remove this one.")
    if _FROM.value and (_MODEL.value or _DATA.value or _CHAT_TEMPLATE.value):
        raise UserError(
            "--from is given with --model, --data or --chat_template. Give --from alone, or --model and --data."
        )
    if _FROM.value:
        _convert(pathlib.Path(_FROM.value).expanduser(), out)
    else:
        _draft(entry.required(_MODEL, "HuggingFaceTB/SmolLM2-135M-Instruct"), entry.required(_DATA, "my.jsonl"), out)


def _convert(file: pathlib.Path, out: pathlib.Path) -> None:
    conversion = axolotl.convert(file)
    left = sorted(conversion.left.items(), key=lambda item: item[1].startswith("does not apply"))
    matters = [name for name, reason in left if not reason.startswith("does not apply")]
    title = f"Converted from {file.name}, an Axolotl config."
    note = f" Not carried over: {', '.join(matters)}." if matters else ""
    _write(out, title + note, conversion.entries)
    print(f"Carried over from {file.name}: {', '.join(conversion.carried)}.")
    if conversion.defaults:
        defaults = (f"{name} {value}" for name, value in conversion.defaults.items())
        print(f"Axolotl's defaults: {', '.join(defaults)}.")
    if any(entry.field == "rows" for entry in conversion.entries):
        print(axolotl_fields.PER_DEVICE)
    if left:
        print("Not carried over:")
        width = max(len(name) for name, _ in left)
        for name, reason in left:
            print(f"  {name:{width}}  {reason}")
    _print_next(out, conversion.entries)


def _draft(model: str, data: str, out: pathlib.Path) -> None:
    shape = model_shapes.load_shape(model)
    context = shape.max_length
    parameters, _ = metrics.count_parameters(shape)
    facts = f"{shape.family}, {parameters / 1e6:,.0f} million parameters, context of {context:,} tokens"
    print(f"model     {facts}")
    entries = [Entry("model", model, f"{facts[0].upper()}{facts[1:]}.")]
    max_length = min(DataConfig.max_length, context)
    base = TrainConfig(model=model, data=DataConfig(max_length=max_length, chat_template=_CHAT_TEMPLATE.value))
    sample = survey.sample_records(data)
    try:
        tokenizer, renderer = config_renderer.open_renderer(base)
    except NoChatTemplateError:
        result, rows_per_epoch = None, None
        entries += values.make_unrendered_entries(sample, data, base.data.max_length)
    else:
        if largest_token(tokenizer) >= shape.vocab_size:
            entries.append(Entry("resize_embedding", True, "The tokenizer has more tokens than the model's embedding."))
        result = survey.survey(sample, renderer, base, embedding_rows=shape.vocab_size)
        fill, _ = values.choose_length(result.audit.fills, result.audit.responses, context)
        rows_per_epoch = fill.rows * sample.total / result.audit.records * (1 - base.data.validation_share)
        entries += values.make_data_entries(result, data, context)
        has_thinking = "enable_thinking" in str(tokenizer.chat_template)
        entries += values.make_template_entries(result, base.data.chat_template, has_thinking=has_thinking)
    max_length = config_text.build_config(entries).data.max_length
    devices = memory.find_devices()
    trials = memory.try_ways(entries, shape, devices)
    rows = memory.choose_rows(trials[-1], devices, rows_per_update=values.count_update_rows(max_length))
    entries += values.make_way_entries(trials, devices)
    entries += values.make_step_entries(rows, max_length, rows_per_epoch)
    _write(out, f"Fine-tunes {pathlib.Path(model).name} on {pathlib.Path(data).name}.", entries)
    _print_summary(entries, result)
    _print_next(out, entries)


def _print_summary(entries: Sequence[Entry], result: survey.Survey | None) -> None:
    fields = {one.field: one for one in entries}
    for heading, field in (
        ("data", "data.train"),
        ("template", "data.chat_template"),
        ("rows", "data.max_length"),
        ("memory", "lora.rank"),
        ("updates", "epochs"),
        ("roles", "data.roles"),
        ("refused", "data.on_error"),
        ("embedding", "resize_embedding"),
    ):
        if field in fields:
            print(f"{heading:9} {field}={fields[field].value!r}. {fields[field].comment}")
    for finding in result.findings if result else []:
        print(f"{finding.level:9} {finding}")


def _write(out: pathlib.Path, title: str, entries: Sequence[Entry]) -> None:
    config_text.build_config(entries)
    lines = textwrap.fill(title, 100, break_on_hyphens=False, break_long_words=False)
    docstring = f"""{lines}

Written by dialog_jax init. A field that is left out has its default; `dialog_jax train --help` lists all of them. A
flag overrides the file: --config.epochs=2.
"""
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(out, config_text.write_config(docstring, entries))


def _print_next(out: pathlib.Path, entries: Sequence[Entry]) -> None:
    mix = config_text.build_config(entries).data.mix
    data = f" --data={next(iter(mix))}" if mix else ""
    print(f"\nWrote {out}. Next:")
    print(f"  dialog_jax audit --config={out}{data}")
    print(f"  dialog_jax train --config={out} --output_dir=runs/{out.stem}")
