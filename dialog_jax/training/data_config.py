"""`DataConfig`: where dialogues come from, how they are rendered, and how long a row is. Imports no JAX."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

from dialog_jax.batching import mixture
from dialog_jax.dialogues import parsing
from dialog_jax.errors import UserError

RESPONSES = ("rendered", "verbatim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run, prepared alike by all commands that read it."""

    train: str = ""
    """Dialogues to train on: a .jsonl, .ndjson, .json or .parquet file, all but the last also compressed (.gz, .bz2,
    .xz, .zst), or the name of a hub data set."""
    mix: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Several sets instead of `train`: {name: {"train": source, "weight": share}}, or "epochs" in place of "weight"."""
    validation: str = ""
    """Held-out dialogues, as `train`; empty to hold out a share of the training data."""
    validation_share: float = 0.05
    """Share of the training data that is held out if `validation` is empty, chosen by a hash of each dialogue."""
    teacher: str = ""
    """A teacher's predictions on the training data, for loss.distillation: a file from dialog_jax score --top_k=N."""
    weights: str = ""
    """Other weights for the responses of `train`: a file from dialog_jax select. They multiply those of the data."""
    train_split: str = "train"
    """The split of a hub data set that `train` names; files have none."""
    validation_split: str = "validation"
    """The split of a hub data set that `validation` names."""
    max_length: int = 1024
    """Tokens per row. A response is trained with all of its history if both have at most this many tokens."""
    truncate: str = "split"
    """What happens to longer ones: `split` trains the response behind the system prompt and the most recent turns,
    `turns` leaves it out, `drop` leaves its dialogue out, `error` stops."""
    share_prefixes: bool = False
    """Compute a system prompt once for all dialogues of a row that begin with it: the same loss from fewer tokens."""
    chat_template: str = ""
    """A Jinja file, or the text of the template; empty for the tokenizer's own."""
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further variables of the chat template, such as {"enable_thinking": False}."""
    template_time: str = ""
    """The date or time, such as 2026-07-01 or 2026-07-01T12:00, that a chat template takes for the current one; empty
    for the time at which the run or command starts. A run keeps it in its config.json."""
    allow_special_tokens: bool = False
    """Parse special tokens that the text of a message spells; otherwise they are ordinary text there."""
    responses: str = "rendered"
    """`rendered` trains responses as the chat template renders them; `verbatim` trains the recorded content and the
    template's end of turn, so that nothing recorded is lost, whatever the template cuts out."""
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further names of roles in the data: {"Bot": "assistant"}, or {"developer": "user"} instead of system."""
    on_error: str = "stop"
    """What happens to a record that is no valid dialogue, or that the chat template refuses: `stop` ends the command
    with its error, `skip` leaves it out, counts it and lists it in skipped.txt."""
    cache_dir: str = ""
    """Directory for prepared data, which several runs can share; empty for the run's own directory."""
    workers: int = -1
    """Processes that prepare data; 0 for the main process alone, -1 for one per processor, at most 16."""

    def __post_init__(self):
        if self.mix and (self.train or self.teacher or self.weights):
            raise UserError(
                f"data.mix names {', '.join(self.mix)} beside data.train {self.train!r}, data.teacher "
                f"{self.teacher!r} and data.weights {self.weights!r}; leave data.train empty, and a teacher "
                "and weights to a single set."
            )
        mixture.check_mix(self.mix)
        parsing.check_roles(self.roles)
        if not 0 < self.validation_share < 1:
            raise UserError(f"data.validation_share is {self.validation_share}; it must be above 0 and below 1.")
        try:
            datetime.datetime.fromisoformat(self.template_time or "2026-07-01")
        except ValueError:
            raise UserError(
                f"data.template_time is {self.template_time!r}; it must be a date or time such as 2026-07-01 or "
                "2026-07-01T12:00."
            ) from None
        if self.responses not in RESPONSES:
            raise UserError(f"data.responses is {self.responses!r}; it must be one of {', '.join(RESPONSES)}.")
        if self.workers < -1:
            raise UserError(f"data.workers is {self.workers}; it must be at least 0, or -1 for one a processor.")
