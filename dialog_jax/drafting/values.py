"""Values of a config for a model and data that have been looked at, each with the figures that are the reason.

In: figures. Out: entries of a config file. Reads no files and no devices.
"""

from collections.abc import Sequence

from dialog_jax.audit.row_lengths import Fill, Spread
from dialog_jax.drafting.config_text import Entry
from dialog_jax.drafting.memory import SHARE, Devices, Trial
from dialog_jax.drafting.survey import Sample, Survey, describe_unknown
from dialog_jax.training.config import TrainConfig

_TOKENS_PER_UPDATE = 16_384
_SHORTENED = 0.01  # share of responses that may lose a part of their history
_MANY_UPDATES, _EPOCHS_OF_FEW = 100, 3.0
_FEWEST_UPDATES = 20  # of an epoch; of less data, an update takes fewer rows
_EVALUATIONS = 10  # of a run
_DEFAULT = TrainConfig()


def choose_length(fills: Sequence[Fill], responses: int, context: int) -> tuple[Fill, Fill | None]:
    """Returns the rows of the shortest length that keeps the history of almost all responses, and the next shorter.

    Args:
      fills: by length, from `Audit`.
      responses: number of all trained responses.
      context: the largest length.
    """
    usable = [fill for fill in fills if fill.max_length <= context]
    index = next(
        (index for index, fill in enumerate(usable) if _count_losses(fill) <= _SHORTENED * responses), len(usable) - 1
    )
    return usable[index], usable[index - 1] if index else None


def describe_count(number: int, noun: str) -> str:
    """Returns a number and what it counts: "1 record", "2,000 records"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe_length(fill: Fill, shorter: Fill | None, survey: Survey, context: int) -> str:
    """Returns the comment on data.max_length."""
    audit = survey.audit
    assert audit.dialogue_tokens is not None, "a survey has dialogues"
    sentences = [f"Dialogues looked at: {_describe_spread(audit.dialogue_tokens)} tokens."]
    lost = _count_losses(fill)
    if not lost:
        sentences.append("Every response keeps all of its history.")
    elif lost <= _SHORTENED * audit.responses:
        sentences.append(
            f"All but {lost:,} of {describe_count(audit.responses, 'response')} keep all of their history."
        )
    else:
        sentences.append(
            f"{lost:,} of {describe_count(audit.responses, 'response')} lose a part of their history or are left out: "
            f"the model's context of {context:,} tokens allows no longer rows."
        )
    if shorter:
        sentences.append(
            f"With {shorter.max_length:,}, {describe_count(_count_losses(shorter), 'response')} would lose a part."
        )
    sentences.append(f"Rows are {fill.used:.0%} full.")
    return " ".join(sentences)


def make_data_entries(survey: Survey, data: str, context: int) -> list[Entry]:
    """Returns the entries of `data` for dialogues that can be rendered."""
    sample, audit = survey.sample, survey.audit
    records = describe_count(sample.total, "record")
    sampled = f"Sampled {audit.records:,} of {records}" if audit.records < sample.total else f"Sampled all of {records}"
    entries = [
        Entry(
            "data.train",
            data,
            f"{sampled}: {describe_count(audit.trees, 'dialogue')}, "
            f"{describe_count(audit.responses, 'trained response')}, {audit.targets / audit.tokens:.0%} of the tokens.",
        ),
        *_make_role_entries(sample),
    ]
    if survey.refused:
        count = audit.records - audit.trees
        entries.append(
            Entry(
                "data.on_error",
                "skip",
                f"Refused: {count:,} of {describe_count(audit.records, 'record')}, at the first of which training "
                f"would stop: {survey.refused[0]}",
            )
        )
    fill, shorter = choose_length(audit.fills, audit.responses, context)
    entries += [
        Entry(
            "data.validation_share",
            _DEFAULT.data.validation_share,
            _describe_held_out(sample.total),
        ),
        Entry("data.max_length", fill.max_length, describe_length(fill, shorter, survey, context)),
    ]
    if survey.responses == "verbatim":
        entries.append(
            Entry(
                "data.responses",
                "verbatim",
                "Trains responses as they are recorded: the chat template does not render some of them as a "
                "continuation of their prompts.",
            )
        )
    elif audit.not_verbatim:
        entries.append(
            Entry(
                "data.responses",
                "rendered",
                f'"verbatim" trains what is recorded: the chat template renders {audit.not_verbatim:,} of '
                f"{describe_count(audit.responses, 'response')} differently.",
            )
        )
    return entries


def make_unrendered_entries(sample: Sample, data: str, max_length: int) -> list[Entry]:
    """Returns the entries of `data` for a tokenizer without a chat template."""
    return [
        Entry("data.train", data, f"{describe_count(sample.total, 'record')}."),
        *_make_role_entries(sample),
        Entry("data.max_length", max_length, "Not chosen by the data: without a chat template nothing has a length."),
        Entry(
            "data.chat_template",
            "",
            "SET THIS: the tokenizer has no chat template. Name a Jinja file, for example that of the model's "
            "instruction-tuned sibling (chat_template.jinja on the Hub), and run dialog_jax audit; or run init again "
            "with --chat_template=FILE.",
        ),
    ]


def make_template_entries(survey: Survey, chat_template: str, *, has_thinking: bool) -> list[Entry]:
    """Returns the entries of a chat template that there is.

    Args:
      chat_template: as data.chat_template.
      has_thinking: whether the template reads the variable enable_thinking.
    """
    own = "" if chat_template else "The tokenizer's own template. "
    entries = [Entry("data.chat_template", chat_template, own + describe_template(survey))]
    if has_thinking:
        comment = 'Variables of the chat template: with {"enable_thinking": False} it asks for no reasoning.'
        entries.append(Entry("data.chat_template_kwargs", {}, comment))
    return entries


def describe_template(survey: Survey) -> str:
    """Returns a sentence about how the chat template renders history."""
    audit = survey.audit
    if audit.changed:
        return (
            f"It renders history differently from how it was generated in {audit.changed:,} of {audit.trees:,} "
            "dialogues (earlier reasoning is left out, for example): these branch, and each response is trained behind "
            "the history that inference shows it."
        )
    if audit.branching:
        return (
            f"It renders history as it was generated. {audit.branching:,} of {audit.trees:,} dialogues branch, because "
            "messages have several answers."
        )
    return "It renders history as it was generated: every dialogue is one path."


def make_way_entries(trials: Sequence[Trial], devices: Devices) -> list[Entry]:
    """Returns the entries of what is trained: those of the last trial."""
    last = trials[-1]
    first, *others = last.way.entries
    row = "one row" if devices.number == 1 else "one row per device"
    too_large = ", ".join(f"{trial.way.name} ({trial.size})" for trial in trials if not trial.fits)
    if last.fits:
        verb = "are" if first.value == 0 else "is"
        comment = (
            f"{last.way.name[0].upper()}{last.way.name[1:]} {verb} trained: a step with {row} takes {last.size} of "
            f"{devices.description} (dialog_jax plan's estimate)."
        )
        comment += f" Too large: {too_large}." if too_large else ""
    else:
        comment = (
            f"None of these fits in {100 * SHARE:.0f} % of a device's memory, {devices.description}, with {row}: "
            f"{too_large}. Use a smaller model, shorter rows or another machine."
        )
    rate = "3e-4, the default with LoRA" if first.value else "2e-5, the default for all weights"
    return [
        first._replace(comment=comment),
        *others,
        Entry("optimizer.learning_rate", _DEFAULT.optimizer.learning_rate, f"-1 for {rate}."),
    ]


def count_update_rows(max_length: int) -> int:
    """Returns the rows of an update, on one device."""
    return max(1, _TOKENS_PER_UPDATE // max_length)


def make_step_entries(rows: int, max_length: int, rows_per_epoch: float | None) -> list[Entry]:
    """Returns the entries of the length of the run and of its evaluations.

    Args:
      rows: of a micro-batch.
      rows_per_epoch: of the data to train on; None if it is not known.
    """
    accumulation = max(1, count_update_rows(max_length) // rows)
    while rows_per_epoch is not None and accumulation > 1 and rows_per_epoch < _FEWEST_UPDATES * rows * accumulation:
        accumulation //= 2
    update = rows * accumulation
    entries = [
        Entry("rows", rows, "Rows per micro-batch, over all devices; a multiple of the number of devices."),
        Entry("gradient_accumulation", accumulation, f"An update takes {update * max_length:,} tokens."),
    ]
    if rows_per_epoch is None:
        return entries
    updates = max(1, round(rows_per_epoch / update))
    epochs = _EPOCHS_OF_FEW if updates < _MANY_UPDATES else 1.0
    total = round(updates * epochs)
    every = max(1, min(_DEFAULT.evaluate_every, total // _EVALUATIONS))
    return [
        *entries,
        Entry(
            "epochs",
            epochs,
            f"About {describe_count(updates, 'update')} per epoch, {total:,} in all. The checkpoint with the lowest "
            "held-out loss is kept.",
        ),
        Entry("evaluate_every", every, f"In updates: about {describe_count(total // every, 'evaluation')}."),
        Entry("checkpoint_every", every),
    ]


def _make_role_entries(sample: Sample) -> list[Entry]:
    if sample.unknown:
        return [Entry("data.roles", {}, f"SET THIS: {describe_unknown(sample.unknown)}")]
    comment = "CHECK: names of speakers that are not known, each with the role that it probably has."
    return [Entry("data.roles", sample.roles, comment)] if sample.roles else []


def _describe_held_out(records: int) -> str:
    if records == 1:
        return "One record cannot be divided: NAME A FILE in data.validation."
    held_out = max(1, round(_DEFAULT.data.validation_share * records))
    return f"Held out: about {held_out:,} of {records:,} records; or name a file in data.validation."


def _count_losses(fill: Fill) -> int:
    return fill.shortened + fill.cut


def _describe_spread(spread: Spread) -> str:
    return f"median {spread.median:,}, 95 % at most {spread.most:,}, longest {spread.longest:,}"
