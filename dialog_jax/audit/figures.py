"""Dialogues to figures and findings: what training would see of a whole file, before any of it is paid for.

What a dialogue's sequences and tree are is `inspection`'s; rows are `packing`'s. Knows no terminal and no file format.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers
from jaxtyping import Bool

from dialog_jax.audit import findings, inspection, row_lengths
from dialog_jax.audit.findings import Finding
from dialog_jax.audit.row_lengths import Fill, Fit, Spread
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.schemas import ROLES
from dialog_jax.errors import UserError
from dialog_jax.rendering import special_tokens
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import weighting
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.weighting import SupervisedSequence

_TOGETHER = 256  # dialogues


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """Figures of whole dialogues, without regard to `max_length` unless said. Tokens and counts."""

    records: int
    """Read, dialogues or not."""
    dialogues: int
    """That the template renders."""
    trees: int
    """Dialogues with something to train on."""
    tokens: int
    """Of the trees."""
    targets: int
    responses: int
    """That are trained on."""
    untrained: int
    """Assistant messages that are not."""
    k_pass_tokens: int
    """Of the sequences prompt ++ response, one a trained response."""
    changed: int
    """Dialogues whose template renders history otherwise than it was generated."""
    roles: dict[str, int]
    """Tokens by what they are: contents of each role, trained responses with their end of turn, and the rest."""
    end_of_turn: str | None
    last_targets: dict[str, int]
    """How many trained responses end with which token."""
    bos: str | None
    bos_written: int
    """Dialogues that begin with it."""
    bos_added: bool
    """Whether the tokenizer puts it before text by itself."""
    dialogue_tokens: Spread | None
    response_tokens: Spread | None
    responses_each: Spread | None
    fills: list[Fill]
    findings: list[Finding]


class _Setting(NamedTuple):
    """What all dialogues are looked at with."""

    tokenizer: transformers.PreTrainedTokenizerFast
    backend: tokenizers.Tokenizer
    renderer: Renderer
    objective: ObjectiveConfig
    lengths: list[int]
    special: Bool[np.ndarray, " vocabulary"]
    """Whether a token is special."""
    escaper: special_tokens.SpecialTokenEscaper
    markers: re.Pattern[str]
    """The texts of special tokens."""

    def text(self, token: int) -> str:
        return self.backend.decode([token], skip_special_tokens=False)


@dataclasses.dataclass
class _Tally:
    """Figures as they are gathered."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    roles: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    last_targets: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    found: findings.Found = dataclasses.field(default_factory=findings.Found)
    fits: list[list[Fit]] = dataclasses.field(default_factory=list)
    """Of each tree, at each length."""
    tree_tokens: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """How many, and of what; likewise the next two."""
    response_tokens: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    responses_each: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    seen: dict[bytes, str] = dataclasses.field(default_factory=dict)
    """The first dialogue with each tree, or first prompt."""


def audit(
    records: Iterable[Dialogue | ValueError],
    tokenizer: transformers.PreTrainedTokenizerFast,
    renderer: Renderer,
    *,
    objective: ObjectiveConfig,
    max_length: int,
) -> Audit:
    """Returns what training would see of `records`.

    Args:
      records: dialogues, and errors in the place of those that are none.
      max_length: tokens of a row, which decides what `findings` says of cut turns; `fills` has further lengths.

    Raises:
      UserError: there are no records.
    """
    setting = _setting(tokenizer, renderer, objective, max_length)
    tally = _Tally()
    for batch in _batched(records, _TOGETHER):
        tally.counts["records"] += len(batch)
        for record in batch:
            if isinstance(record, ValueError):
                tally.found.add("unreadable", str(record))
        dialogues = [record for record in batch if isinstance(record, Dialogue)]
        contents: list[tuple[str, str]] = []
        for dialogue, pieces in zip(
            dialogues, inspection.render_dialogues(dialogues, renderer, objective), strict=True
        ):
            if isinstance(pieces, ValueError):
                tally.found.add("refused", str(pieces))
            else:
                contents += _look_at(tally, setting, dialogue, pieces)
        encodings = setting.escaper.encode([setting.escaper.escape(text) for _, text in contents])
        for (role, _), encoding in zip(contents, encodings, strict=True):
            tally.roles[role] += len(encoding)
    if not tally.counts["records"]:
        raise UserError("there is no record; needed at least one dialogue. Check that the file was written in full.")
    return _audit(tally, setting, max_length)


def _setting(
    tokenizer: transformers.PreTrainedTokenizerFast, renderer: Renderer, objective: ObjectiveConfig, max_length: int
) -> _Setting:
    named = inspection.list_special_tokens(tokenizer)
    special = np.zeros(max(tokenizer.get_vocab().values()) + 1, bool)
    special[list(named)] = True
    markers = "|".join(re.escape(text) for text in sorted(filter(None, named.values()), key=len, reverse=True))
    return _Setting(
        tokenizer=tokenizer,
        backend=tokenizer.backend_tokenizer,
        renderer=renderer,
        objective=objective,
        lengths=sorted({*row_lengths.LENGTHS, max_length}),
        special=special,
        escaper=special_tokens.SpecialTokenEscaper(tokenizer, allow_special_tokens=renderer.allow_special_tokens),
        markers=re.compile(markers or "(?!)"),
    )


def _batched(records: Iterable[Dialogue | ValueError], count: int) -> Iterator[list[Dialogue | ValueError]]:
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, count)):
        yield batch


def _look_at(tally: _Tally, setting: _Setting, dialogue: Dialogue, pieces: Sequence[Excerpt]) -> list[tuple[str, str]]:
    """Gathers what one dialogue adds; returns (role, content) of what stands around responses."""
    trained = weighting.select_supervised(dialogue, [pieces], setting.objective)[0]
    tree = weighting.build_trees([trained], setting.objective)[0]
    _look_at_messages(tally, setting, dialogue, trained)
    if tree is None:
        tally.found.add("no_target", dialogue.name)
        return []
    _look_at_divergences(tally, setting, pieces, trained)
    _look_at_responses(tally, setting, dialogue, trained)
    _look_at_beginning(tally, setting, dialogue, trained, tree)
    tally.fits.append(row_lengths.fits(dialogue, pieces, tree, setting.objective, setting.lengths))
    tally.tree_tokens.append((len(tree.tokens), dialogue.name))
    tally.counts["targets"] += int((tree.weight > 0).sum())
    tally.roles["responses"] += int((tree.turn >= 0).sum())
    written, missing = inspection.split_by_rendered(pieces, trained, setting.renderer)
    for index, message in missing:
        if message.role != "assistant":  # its reasoning may be left out of history
            tally.found.add("not_written", f"{dialogue.name}: message {index} ({message.role})")
    return [(message.role, message.content) for message in written]


def _look_at_messages(
    tally: _Tally, setting: _Setting, dialogue: Dialogue, trained: Sequence[SupervisedSequence]
) -> None:
    """Contents that are not what they look like."""
    tally.counts["dialogues"] += 1
    tally.counts["messages"] += len(dialogue.messages)
    responses = weighting.select_responses(trained)
    for index, message in enumerate(dialogue.messages):
        where = f"{dialogue.name}: message {index} ({message.role})"
        spelled = map(setting.markers.search, special_tokens.iterate_strings((message.content, message.fields)))
        if found := next(filter(None, spelled), None):
            kind = "special_parsed" if setting.renderer.allow_special_tokens else "special"
            tally.found.add(kind, f"{where} has {found[0]!r}")
        if index in responses and not message.content.strip() and not message.fields.get("tool_calls"):
            tally.found.add("empty", where)
    tally.counts["untrained"] += sum(
        message.role == "assistant" and index not in responses for index, message in enumerate(dialogue.messages)
    )
    if any(dialogue.messages[path[-1]].role != "assistant" for path in dialogue.paths()):
        tally.found.add("unanswered", dialogue.name)


def _look_at_divergences(
    tally: _Tally, setting: _Setting, pieces: Sequence[Excerpt], trained: Sequence[SupervisedSequence]
) -> None:
    """Where messages do not meet end to end. History that is written otherwise counts once a dialogue."""
    responses = weighting.select_responses(trained)
    divergences = inspection.find_divergences(pieces, setting.backend, setting.special)
    changed = [divergence for divergence in divergences if divergence.kind == "history"]
    tally.counts["changed"] += bool(changed)
    merged = [
        divergence
        for divergence in divergences
        if divergence.kind != "history" and divergence.piece.messages[divergence.response] in responses
    ]
    for divergence in [*merged, *changed[:1]]:
        tally.found.add(
            divergence.kind,
            inspection.describe_divergence(divergence, setting.renderer) if tally.found.wants(divergence.kind) else "",
        )


def _look_at_responses(
    tally: _Tally, setting: _Setting, dialogue: Dialogue, trained: Sequence[SupervisedSequence]
) -> None:
    """How long responses are, and with what they end."""
    responses = weighting.select_responses(trained)
    for message, one in responses.items():
        last = int(one.sequence.tokens[max(span.stop for span in one.spans if span.turn >= 0) - 1])
        tally.last_targets[last] += 1
        if setting.renderer.end_of_turn not in (None, last):
            tally.found.add("end_untrained", f"{dialogue.name}: message {message} ends with {setting.text(last)!r}")
        size = len(one.sequence.tokens) - one.sequence.start
        tally.response_tokens.append((size, f"{dialogue.name}: message {message}"))
        tally.counts["k_pass_tokens"] += len(one.sequence.tokens)
    tally.counts["responses"] += len(responses)
    tally.responses_each.append((len(responses), dialogue.name))


def _look_at_beginning(
    tally: _Tally, setting: _Setting, dialogue: Dialogue, trained: Sequence[SupervisedSequence], tree: Tree
) -> None:
    """BOS, and whether an earlier dialogue is the same, or begins so."""
    first, bos = trained[0].sequence, setting.tokenizer.bos_token_id
    if bos is not None:
        tally.counts["bos"] += int(first.tokens[0]) == bos
        if first.tokens[:2].tolist() == [bos, bos]:
            tally.found.add("doubled_bos", dialogue.name)
    same = _digest(tree.tokens, tree.parent, tree.weight)
    prompt = _digest(first.tokens[: first.start])
    for kind, digest in (("repeated", same), ("same_prompt", prompt)):
        if earlier := tally.seen.get(digest):
            tally.found.add(kind, f"{dialogue.name}, as {earlier}")
            break
    tally.seen.setdefault(same, dialogue.name)
    tally.seen.setdefault(prompt, dialogue.name)


def _digest(*arrays: np.ndarray) -> bytes:
    made = hashlib.blake2b(digest_size=16)
    for array in arrays:
        made.update(b"%d," % len(array) + array.tobytes())
    return made.digest()


def _audit(tally: _Tally, setting: _Setting, max_length: int) -> Audit:
    counts, end_of_turn, bos = tally.counts, setting.renderer.end_of_turn, setting.tokenizer.bos_token_id
    bos_added = bos is not None and setting.backend.encode("Hello", add_special_tokens=True).ids[:1] == [bos]
    fills = row_lengths.fills(tally.fits, setting.lengths, max_length)
    counts["trees"] = len(tally.fits)
    counts["turns"] = sum(own[-1].responses for own in tally.fits)
    for kind, holds in (
        ("nothing", not tally.fits),
        ("no_end_of_turn", bool(tally.fits) and end_of_turn is None),
        ("missing_bos", bool(tally.fits) and bos_added and not counts["bos"]),
    ):
        if holds:
            tally.found.add(kind)
    for fill in fills:
        if fill.max_length == max_length and fill.responses_cut:
            where = f"at max_length = {max_length:,}, and {fill.targets_lost:.2%} of all targets with them"
            tally.found.add("cut", where, count=fill.responses_cut)
    tokens = sum(size for size, _ in tally.tree_tokens)
    return Audit(
        records=counts["records"],
        dialogues=counts["dialogues"],
        trees=len(tally.fits),
        tokens=tokens,
        targets=counts["targets"],
        responses=counts["responses"],
        untrained=counts["untrained"],
        k_pass_tokens=counts["k_pass_tokens"],
        changed=counts["changed"],
        roles={
            **{role: tally.roles[role] for role in ROLES if tally.roles[role]},
            "responses": tally.roles["responses"],
            "rest": tokens - sum(tally.roles.values()),
        },
        end_of_turn=None if end_of_turn is None else setting.text(end_of_turn),
        last_targets={setting.text(token): count for token, count in tally.last_targets.most_common()},
        bos=setting.tokenizer.bos_token,
        bos_written=counts["bos"],
        bos_added=bos_added,
        dialogue_tokens=row_lengths.spread(tally.tree_tokens),
        response_tokens=row_lengths.spread(tally.response_tokens),
        responses_each=row_lengths.spread(tally.responses_each),
        fills=fills,
        findings=tally.found.told(counts),
    )
