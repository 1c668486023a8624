"""Reports what training would see in the data of a config, without weights or an accelerator.

    dialog_jax audit --config.model=MODEL --config.data.train=my.jsonl --out=audit.json

First come the figures: what is trained on, whether the chat template renders history as it was generated, the tokens
at which responses end, tokens by role, and how full rows of several lengths are. Then the findings, the worst first:

    error    training would stop, or would teach what cannot be intended
    warning  check it
    note     for information

Each finding has its first places and a remedy. A bad record or dialogue is counted and named, and the audit continues.
--out writes the audit as JSON, with up to ten places per finding; the file appears when it is complete.

Exit code: 0 without errors, 2 with errors in the data, 1 if the audit could not be made.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator

import rich.console
import rich.status
import rich.table
from absl import flags

from dialog_jax import atomic_files
from dialog_jax.audit import sentences
from dialog_jax.audit.figures import Audit, make_audit
from dialog_jax.commands import config_flag, config_inputs, entry
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.training import config_renderer, data_sources
from dialog_jax.training.config import TrainConfig
from dialog_jax.training.data_sources import Source

_CONFIG = config_flag.define()
_DATA = config_inputs.define_data()
_OUT = flags.DEFINE_string("out", "", "The .json file to write; an existing one is replaced.")

_RECORDED = (
    "weights",
    "max_length",
    "chat_template",
    "chat_template_kwargs",
    "template_time",
    "allow_special_tokens",
    "responses",
    "on_error",
)
_ERRORS = 2  # exit code
_PLACES = 3  # printed per finding
_COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def tables(audit: Audit) -> list[rich.table.Table]:
    """Returns two tables: tokens by role, and rows of several lengths."""
    roles = rich.table.Table("tokens of", "", "share", title="Whose tokens", title_justify="left", box=None)
    for origin, tokens in sentences.name_roles(audit).items():
        roles.add_row(origin, f"{tokens:,}", f"{tokens / audit.tokens:.1%}")
    lengths = rich.table.Table(title=f"Rows, with truncate = {audit.truncate}", box=None)
    for heading in sentences.FILL_HEADINGS:
        lengths.add_column(heading, justify="right")
    for figures in sentences.list_fills(audit):
        lengths.add_row(*figures)
    for column in roles.columns[1:]:
        column.justify = "right"
    lengths.title_justify = "left"
    return [roles, lengths]


def show(audit: Audit, console: rich.console.Console) -> None:
    """Prints figures, tables and findings."""
    figures = sentences.describe_figures(audit)
    width = max(len(heading) for heading, _ in figures)
    for heading, sentence in figures:
        console.print(f"{heading:<{width}}  {sentence}", markup=False, soft_wrap=True)
    for table in tables(audit) if audit.trees else []:
        console.print()
        console.print(table)
    console.print()
    for finding in audit.findings:
        console.print(finding.level, style=_COLORS[finding.level], end="")
        console.print(f"{'':<{9 - len(finding.level)}}{finding}", markup=False, soft_wrap=True)
        for where in finding.first[:_PLACES]:
            console.print(f"{'':<9}{where}", markup=False, soft_wrap=True)
        if len(finding.first) > _PLACES:
            console.print(f"{'':<9}and {finding.count - _PLACES:,} more", soft_wrap=True)
    if all(finding.level == "note" for finding in audit.findings):
        console.print("Nothing to fix.")


def write(audit: Audit, config: TrainConfig, source: Source, out: pathlib.Path) -> None:
    """Writes the audit as JSON; the file appears when it is complete."""
    data = dataclasses.asdict(config.data)
    record = {
        "model": config.model,
        "tokenizer": config.tokenizer,
        "data": {"audited": source.name, **{name: data[name] for name in _RECORDED}},
        "objective": dataclasses.asdict(config.objective),
        **dataclasses.asdict(audit),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(out, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _count_records(
    records: Iterable[Dialogue | UserError], status: rich.status.Status
) -> Iterator[Dialogue | UserError]:
    for number, record in enumerate(records, start=1):
        status.update(f"{number:,} records read")
        yield record


def main() -> int:
    config = config_flag.read(_CONFIG)
    out = entry.require_file_path(_OUT) if _OUT.value else None
    tokenizer, renderer = config_renderer.open_renderer(config)
    source = data_sources.find_source(config, _DATA.value)
    with rich.console.Console(stderr=True).status("reading") as status:
        records = _count_records(source.iterate_records(), status)
        embedding_rows = None if config.resize_embedding else config_inputs.read_embedding_rows(config.model)
        audit = make_audit(records, tokenizer, renderer, config.make_tree_config(), embedding_rows=embedding_rows)
    if out:
        write(audit, config, source, out)
    show(audit, rich.console.Console(highlight=False))
    return _ERRORS if any(finding.level == "error" for finding in audit.findings) else 0
