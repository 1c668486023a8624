"""Dialogues to an audit: figures and findings about what training would see of a file.

`inspection` looks at one dialogue, `row_lengths` at rows; `findings` has the sentences. Terminals and file formats are
not known here.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import transformers
from jaxtyping import Bool

from dialog_jax.audit import inspection, row_lengths, unread
from dialog_jax.audit.findings import Finding, FindingTally
from dialog_jax.audit.row_lengths import Fill, Measure, Spread
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.schemas import ROLES
from dialog_jax.errors import UserError
from dialog_jax.rendering import special_tokens, written
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.written import ResponseLost
from dialog_jax.trees import dialogue_trees, weighting
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.weighting import SupervisedSequence

_PLACES = 10  # of responses that are rendered differently
_BATCH = 256  # dialogues that are rendered together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """Figures of complete dialogues; only `fills` and findings about lengths depend on `max_length` and `truncate`."""

    records: int
    """Number of records read, valid or not."""
    dialogues: int
    """Number of dialogues that the template renders."""
    trees: int
    """Number of dialogues with something to train on."""
    tokens: int
    """Number of tokens of the trees."""
    targets: int
    responses: int
    """Number of responses that are trained on."""
    untrained: int
    """Number of assistant messages that are not trained on."""
    not_verbatim: int
    """Number of trained responses that the template renders differently from what is recorded."""
    first_not_verbatim: list[str]
    """The first of them."""
    k_pass_tokens: int
    """Number of tokens of the sequences prompt ++ response, one per trained response."""
    changed: int
    """Number of dialogues whose history the template renders differently from how it was generated."""
    roles: dict[str, int]
    """Number of tokens by origin: contents of each role, trained responses with their end of turn, and the rest."""
    end_of_turn: str | None
    last_targets: dict[str, int]
    """Number of trained responses by their last token."""
    bos: str | None
    bos_written: int
    """Number of dialogues that begin with BOS."""
    bos_added: bool
    """Whether the tokenizer adds BOS to plain text."""
    dialogue_tokens: Spread | None
    response_tokens: Spread | None
    responses_each: Spread | None
    truncate: str
    """What training does with a response that is longer than a row with its history."""
    fills: list[Fill]
    unread: dict[str, int]
    """Number of times that each key occurs which neither the program nor the chat template reads."""
    findings: list[Finding]


class _Tools(NamedTuple):
    """What the audit of every dialogue uses."""

    tokenizer: transformers.PreTrainedTokenizerFast
    renderer: Renderer
    config: TreeConfig
    lengths: list[int]
    special: Bool[np.ndarray, " vocabulary"]
    """Whether a token is special."""
    escaper: special_tokens.SpecialTokenEscaper
    special_texts: re.Pattern[str]
    """Matches the text of a special token."""

    def decode(self, token: int) -> str:
        return self.tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)


@dataclasses.dataclass
class _Tally:
    """Figures of the dialogues so far."""

    tools: _Tools
    keys: unread.KeyTally
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    roles: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    last_targets: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    findings: FindingTally = dataclasses.field(default_factory=FindingTally)
    measures: list[list[Measure]] = dataclasses.field(default_factory=list)
    """Of each dialogue at each length."""
    # (number of tokens or responses, name of the dialogue or response)
    tree_tokens: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    response_tokens: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    responses_each: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    not_verbatim: list[str] = dataclasses.field(default_factory=list)
    """Names of the responses that are rendered differently from what is recorded."""
    first_names: dict[bytes, str] = dataclasses.field(default_factory=dict)
    """The first dialogue with each tree, and with each first prompt, by their hash."""


def make_audit(
    records: Iterable[Dialogue | UserError],
    tokenizer: transformers.PreTrainedTokenizerFast,
    renderer: Renderer,
    config: TreeConfig,
    *,
    embedding_rows: int | None = None,
) -> Audit:
    """Returns the audit of `records`.

    Args:
      records: dialogues, and errors in the place of invalid ones.
      config: that of training; `fills` has further lengths than its `max_length`.
      embedding_rows: of the model, if it is known.

    Raises:
      UserError: there are no records.
    """
    tools = _Tools(
        tokenizer=tokenizer,
        renderer=renderer,
        config=config,
        lengths=sorted({*row_lengths.LENGTHS, config.max_length}),
        special=inspection.mask_special_tokens(tokenizer),
        escaper=special_tokens.SpecialTokenEscaper(tokenizer, allow_special_tokens=renderer.allow_special_tokens),
        special_texts=inspection.compile_special_texts(tokenizer),
    )
    tally = _Tally(tools, unread.KeyTally(renderer))
    for kind, sentence in inspection.inspect_tokenizer(renderer, embedding_rows).items():
        tally.findings.add(kind, sentence)
    suffix = "_skipped" if config.on_error == "skip" else ""
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, _BATCH)):
        tally.counts["records"] += len(batch)
        for record in batch:
            if isinstance(record, UserError):
                tally.findings.add(f"unreadable{suffix}", str(record))
        dialogues = [record for record in batch if isinstance(record, Dialogue)]
        contents: list[tuple[str, str]] = []
        rendered = inspection.render_dialogues(dialogues, renderer, config.objective)
        for dialogue, excerpts in zip(dialogues, rendered, strict=True):
            if isinstance(excerpts, UserError):
                kind = _classify_refusal(excerpts, dialogue, renderer, config)
                tally.findings.add(f"{kind}{suffix}", str(excerpts))
            else:
                contents += _add_dialogue(tally, dialogue, excerpts)
        encodings = tools.escaper.encode([tools.escaper.escape(text) for _, text in contents])
        for (role, _), encoding in zip(contents, encodings, strict=True):
            tally.roles[role] += len(encoding.ids)
    if not tally.counts["records"]:
        raise UserError("there is no record; needed at least one dialogue. Check that the file is complete.")
    return _summarize(tally)


def _classify_refusal(error: UserError, dialogue: Dialogue, renderer: Renderer, config: TreeConfig) -> str:
    """Returns the kind of finding of a dialogue that cannot be rendered."""
    if isinstance(error, ResponseLost):
        return "lost"
    return "needs_verbatim" if inspection.needs_verbatim(dialogue, renderer, config.objective) else "refused"


def _add_dialogue(tally: _Tally, dialogue: Dialogue, excerpts: Sequence[Excerpt]) -> list[tuple[str, str]]:
    """Adds a dialogue to the tally; returns (role, content) of its rendered messages that are not trained responses."""
    sequences = weighting.select_supervised(dialogue, [excerpts], tally.tools.config.objective)[0]
    tree = weighting.build_trees([sequences], tally.tools.config.objective)[0]
    _add_messages(tally, dialogue, sequences)
    tally.keys.add(dialogue, [excerpt.dialogue for excerpt in excerpts])
    if tree is None:
        tally.findings.add("no_target", dialogue.name)
        return []
    _add_divergences(tally, excerpts, sequences)
    _add_responses(tally, dialogue, sequences)
    _add_beginning(tally, dialogue, sequences, tree)
    tools = tally.tools
    measures = row_lengths.measure_lengths(dialogue, excerpts, tools.renderer, tools.config, tools.lengths)
    tally.measures.append(measures)
    if refusal := measures[tools.lengths.index(tools.config.max_length)].refusal:
        tally.findings.add("refused_skipped" if tools.config.on_error == "skip" else "refused", refusal)
    tally.tree_tokens.append((len(tree.tokens), dialogue.name))
    tally.counts["targets"] += int((tree.weight > 0).sum())
    tally.roles["responses"] += int((tree.turn >= 0).sum())
    for kind, place in dialogue_trees.list_unwritten(excerpts):
        tally.findings.add(f"{kind}_not_written", f"{dialogue.name}: {place}")
    rendered = inspection.select_rendered(excerpts, sequences, tally.tools.renderer)
    return [(message.role, message.content) for message in rendered]


def _add_messages(tally: _Tally, dialogue: Dialogue, sequences: Sequence[SupervisedSequence]) -> None:
    """Adds the messages: texts of special tokens, empty responses, messages without a response."""
    tally.counts["dialogues"] += 1
    tally.counts["messages"] += len(dialogue.messages)
    responses = weighting.select_responses(sequences)
    for index, message in enumerate(dialogue.messages):
        where = f"{dialogue.name}: message {index} ({message.role})"
        matches = map(
            tally.tools.special_texts.search, special_tokens.iterate_strings((message.content, message.fields))
        )
        if match := next(filter(None, matches), None):
            kind = "special_parsed" if tally.tools.renderer.allow_special_tokens else "special"
            tally.findings.add(kind, f"{where} has {match[0]!r}")
        objective = tally.tools.config.objective
        is_trained = objective.name == "joint" or (objective.name == "roles" and message.role in objective.roles)
        if message.role != "assistant" and message.has_own_weight and message.weight > 0 and not is_trained:
            tally.findings.add("weight_unused", where)
        calls = message.fields.get("tool_calls", ())
        if any(isinstance(call["function"].get("arguments"), str) for call in calls):
            tally.findings.add("text_arguments", where)
        if index in responses and not written.says_something(message):
            tally.findings.add("empty", where)
    tally.counts["untrained"] += sum(
        message.role == "assistant" and index not in responses for index, message in enumerate(dialogue.messages)
    )
    if dialogue.nulls:
        tally.findings.add("nulls", f"{dialogue.name}: {dialogue.nulls:,}")
    if any(dialogue.messages[path[-1]].role != "assistant" for path in dialogue.paths()):
        tally.findings.add("unanswered", dialogue.name)


def _add_divergences(tally: _Tally, excerpts: Sequence[Excerpt], sequences: Sequence[SupervisedSequence]) -> None:
    """Adds the divergences of trained responses; those in history count once per dialogue."""
    responses = weighting.select_responses(sequences)
    divergences = inspection.find_divergences(excerpts, tally.tools.tokenizer.backend_tokenizer, tally.tools.special)
    history = [one for one in divergences if one.kind == "history"]
    tally.counts["changed"] += bool(history)
    merged = [
        one for one in divergences if one.kind != "history" and one.excerpt.original_indices[one.response] in responses
    ]
    for one in [*merged, *history[:1]]:
        has_room = tally.findings.has_room(one.kind)
        tally.findings.add(one.kind, inspection.describe_divergence(one, tally.tools.renderer) if has_room else "")


def _add_responses(tally: _Tally, dialogue: Dialogue, sequences: Sequence[SupervisedSequence]) -> None:
    """Adds the responses: their lengths and last targets."""
    responses = weighting.select_responses(sequences)
    for index, one in responses.items():
        where = f"{dialogue.name}: message {index}"
        last = int(one.sequence.tokens[max(span.stop for span in one.spans if span.turn >= 0) - 1])
        tally.last_targets[last] += 1
        if tally.tools.renderer.end_of_turn not in (None, last):
            tally.findings.add(
                "end_untrained", f"{dialogue.name}: message {index} ends with {tally.tools.decode(last)!r}"
            )
        if not one.sequence.is_verbatim:
            tally.not_verbatim.append(where)
        tally.response_tokens.append((len(one.sequence.tokens) - one.sequence.start, where))
        tally.counts["k_pass_tokens"] += len(one.sequence.tokens)
    changed = [index for index, one in responses.items() if one.sequence.changes_history]
    if changed:
        tally.findings.add("prompt_changed", f"{dialogue.name}: message {changed[0]}")
    tally.counts["responses"] += len(responses)
    tally.responses_each.append((len(responses), dialogue.name))


def _add_beginning(tally: _Tally, dialogue: Dialogue, sequences: Sequence[SupervisedSequence], tree: Tree) -> None:
    """Adds BOS, and whether an earlier dialogue is the same or has the same first prompt."""
    first, bos = sequences[0].sequence, tally.tools.tokenizer.bos_token_id
    if bos is not None:
        tally.counts["bos"] += int(first.tokens[0]) == bos
        if first.tokens[:2].tolist() == [bos, bos]:
            tally.findings.add("doubled_bos", dialogue.name)
    tree_hash = _hash_arrays(tree.tokens, tree.parent, tree.weight)
    prompt_hash = _hash_arrays(first.tokens[: first.start])
    for kind, key in (("repeated", tree_hash), ("same_prompt", prompt_hash)):
        if earlier := tally.first_names.get(key):
            tally.findings.add(kind, f"{dialogue.name}, as {earlier}")
            break
    tally.first_names.setdefault(tree_hash, dialogue.name)
    tally.first_names.setdefault(prompt_hash, dialogue.name)


def _hash_arrays(*arrays: np.ndarray) -> bytes:
    parts = (b"%d," % len(array) + array.tobytes() for array in arrays)
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def _summarize(tally: _Tally) -> Audit:
    counts, end_of_turn, bos = tally.counts, tally.tools.renderer.end_of_turn, tally.tools.tokenizer.bos_token_id
    encoding = tally.tools.tokenizer.backend_tokenizer.encode("Hello", add_special_tokens=True)
    bos_added = bos is not None and encoding.ids[:1] == [bos]
    max_length = tally.tools.config.max_length
    fills = row_lengths.measure_fills(tally.measures, counts["targets"], tally.tools.lengths, max_length)
    counts["trees"] = len(tally.measures)
    for kind, holds in (
        ("nothing", not tally.measures),
        ("no_end_of_turn", bool(tally.measures) and end_of_turn is None),
        ("missing_bos", bool(tally.measures) and bos_added and not counts["bos"]),
    ):
        if holds:
            tally.findings.add(kind)
    for fill in fills:
        if fill.max_length == max_length:
            _add_lengths(tally.findings, fill)
    unread_keys = tally.keys.count_unread()
    if unread_keys:
        tally.findings.add("unread", ", ".join(f"{key} ({count:,})" for key, count in unread_keys.items()))
    tokens = sum(size for size, _ in tally.tree_tokens)
    return Audit(
        records=counts["records"],
        dialogues=counts["dialogues"],
        trees=counts["trees"],
        tokens=tokens,
        targets=counts["targets"],
        responses=counts["responses"],
        untrained=counts["untrained"],
        not_verbatim=len(tally.not_verbatim),
        first_not_verbatim=tally.not_verbatim[:_PLACES],
        k_pass_tokens=counts["k_pass_tokens"],
        changed=counts["changed"],
        roles={
            **{role: tally.roles[role] for role in ROLES if tally.roles[role]},
            "responses": tally.roles["responses"],
            "rest": tokens - sum(tally.roles.values()),
        },
        end_of_turn=None if end_of_turn is None else tally.tools.decode(end_of_turn),
        last_targets={tally.tools.decode(token): count for token, count in tally.last_targets.most_common()},
        bos=tally.tools.tokenizer.bos_token,
        bos_written=counts["bos"],
        bos_added=bos_added,
        dialogue_tokens=row_lengths.measure_spread(tally.tree_tokens),
        response_tokens=row_lengths.measure_spread(tally.response_tokens),
        responses_each=row_lengths.measure_spread(tally.responses_each),
        truncate=tally.tools.config.truncate,
        fills=fills,
        unread=unread_keys,
        findings=tally.findings.make_findings(counts),
    )


def _add_lengths(findings: FindingTally, fill: Fill) -> None:
    """Adds what becomes of dialogues that are longer than a row."""
    place = f"at max_length = {fill.max_length:,}"
    if fill.cut:
        findings.add("cut", f"{place}, and {fill.targets_lost:.2%} of all targets with them", count=fill.cut)
    if fill.shortened:
        findings.add("shortened", place, count=fill.shortened)
    if fill.divided:
        findings.add("divided", f"{place}; {fill.repeated:,} tokens are repeated", count=fill.divided)
