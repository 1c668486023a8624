"""A look at a part of some data before there is a config: how many records, which roles, and an audit.

In: what `data.train` may name. Out: a `Survey`. Knows no model's structure and chooses no values.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dialog_jax.audit.figures import Audit, make_audit
from dialog_jax.audit.findings import Finding
from dialog_jax.dialogues import parsing, schemas, sources
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training.config import TrainConfig

LARGEST_SAMPLE = 200  # records that are audited
_SPEAKERS = 5  # named in a sentence
_REFUSALS = ("unreadable", "refused", "lost")  # kinds of findings
_OF_LENGTH = ("cut", "shortened", "divided")  # kinds of findings that hold for one row length


class Sample(NamedTuple):
    """Records of a file, evenly spaced."""

    total: int
    """Number of all records."""
    records: list[tuple[int, str, Any]]
    """(index in the file, place for errors, record)."""
    roles: dict[str, str]
    """Names of speakers, in any record, that are not known but say their role, with this role."""
    unknown: list[str]
    """Names of speakers that are not known and have no entry in `roles`, the most frequent first."""


class Survey(NamedTuple):
    """What the sample is like."""

    sample: Sample
    audit: Audit
    responses: str
    """As `data.responses`: `verbatim` where the chat template does not render some of them as continuations."""
    findings: list[Finding]
    """Findings that are no notes; without those about row lengths and refusals."""
    refused: list[str]
    """The first errors of records in the sample that are no dialogue, or that the chat template refuses."""


def sample_records(source: str) -> Sample:
    """Returns records of a source: between half of `LARGEST_SAMPLE` and as many, or all if they are fewer.

    Raises:
      UserError: there is no such data, or it has no record.
    """
    speakers: collections.Counter[str] = collections.Counter()
    sample: list[tuple[int, str, Any]] = []
    stride, index = 1, -1
    for index, (where, record) in enumerate(sources.read_records(source, split=TrainConfig().data.train_split)):
        if isinstance(record, Mapping):
            speakers.update(schemas.iterate_speakers(record))
        if index % stride == 0:
            sample.append((index, where, record))
        if len(sample) > LARGEST_SAMPLE:
            sample, stride = sample[::2], 2 * stride
    if index < 0:
        raise parsing.make_empty_error(source)
    unknown = [speaker for speaker, _ in speakers.most_common() if speaker not in schemas.ROLE_NAMES]
    guesses = {speaker: parsing.guess_role(speaker) for speaker in unknown}
    # With a part of the names guessed, a dialogue's other speakers would still be refused.
    roles = {} if None in guesses.values() else {speaker: role for speaker, role in guesses.items() if role}
    return Sample(index + 1, sample, roles, [] if roles else unknown)


def describe_unknown(speakers: Sequence[str]) -> str:
    """Returns a sentence about speakers without a role."""
    names = ", ".join(repr(speaker) for speaker in speakers[:_SPEAKERS])
    others = f" and {len(speakers) - _SPEAKERS:,} others" if len(speakers) > _SPEAKERS else ""
    sentence = f"The roles of these speakers are not known: {names}{others}."
    return sentence + ' Give each its role in data.roles: {"NAME": "user", ...}.'


def survey(sample: Sample, renderer: Renderer, config: TrainConfig, *, embedding_rows: int) -> Survey:
    """Returns the figures of a sample, of dialogues that can be read and rendered.

    Args:
      config: only its `make_tree_config()` is read.
      embedding_rows: of the model.

    Raises:
      UserError: none of the records can be trained on; the error of the first.
    """
    dialogues = list(_parse(sample.records, sample.roles))
    tree_config = config.make_tree_config()
    audit = make_audit(dialogues, renderer.tokenizer, renderer, tree_config, embedding_rows=embedding_rows)
    if any(finding.kind == "needs_verbatim" for finding in audit.findings):
        renderer = renderer.with_responses("verbatim")
        audit = make_audit(dialogues, renderer.tokenizer, renderer, tree_config, embedding_rows=embedding_rows)
    refused = [place for one in audit.findings if one.kind in _REFUSALS for place in one.first]
    if not audit.trees:
        first = refused[0] if refused else "no dialogue has a response to train on. Add assistant messages."
        unknown = ""
        if sample.unknown:
            remedy = "Or rename them in the data; init takes no roles, experiments/finetune.py is a config to copy."
            unknown = f" {describe_unknown(sample.unknown)} {remedy}"
        raise UserError(f"all of {len(dialogues):,} records were refused; the first: {first}{unknown}")
    findings = [one for one in audit.findings if one.level != "note" and one.kind not in (*_OF_LENGTH, *_REFUSALS)]
    return Survey(sample, audit, renderer.responses, findings, refused)


def _parse(records: Iterable[tuple[int, str, Any]], roles: Mapping[str, str]) -> Iterator[Dialogue | UserError]:
    for index, where, record in records:
        if isinstance(record, UserError):
            yield record
            continue
        try:
            dialogue = parsing.parse_dialogue(record, index=index, where=where, roles=roles)
        except UserError as error:
            yield error
        else:
            yield dialogue
