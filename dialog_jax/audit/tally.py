"""The tally of an audit: dialogues in, one at a time; counts, lengths and findings out.

`inspection` looks at one dialogue, `row_lengths` at rows; `findings` has the sentences.
"""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import transformers
from jaxtyping import Bool

from dialog_jax.audit import inspection, row_lengths, unread
from dialog_jax.audit.findings import FindingTally
from dialog_jax.audit.row_lengths import Measure
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.rendering import special_tokens, written
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import dialogue_trees, weighting
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.weighting import SupervisedSequence


class Tools(NamedTuple):
    """What the audit of every dialogue uses."""

    tokenizer: transformers.PreTrainedTokenizerFast
    renderer: Renderer
    config: TreeConfig
    lengths: list[int]
    """Of rows; as the `max_length` of `config`, without the soft prompt."""
    soft_prompt: int
    """Number of its tokens."""
    special: Bool[np.ndarray, " vocabulary"]
    """Whether a token is special."""
    escaper: special_tokens.SpecialTokenEscaper
    special_texts: re.Pattern[str]
    """Matches the text of a special token."""

    def decode(self, token: int) -> str:
        return self.tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)


@dataclasses.dataclass
class Tally:
    """Figures of the dialogues so far."""

    tools: Tools
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


def add_dialogue(tally: Tally, dialogue: Dialogue, excerpts: Sequence[Excerpt]) -> list[tuple[str, str]]:
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
    tally.counts["branching"] += not (tree.subtree_end == len(tree.tokens)).all()
    tally.roles["responses"] += int((tree.turn >= 0).sum())
    for kind, place in dialogue_trees.list_unwritten(excerpts):
        tally.findings.add(f"{kind}_not_written", f"{dialogue.name}: {place}")
    rendered = inspection.select_rendered(excerpts, sequences, tally.tools.renderer)
    return [(message.role, message.content) for message in rendered]


def _add_messages(tally: Tally, dialogue: Dialogue, sequences: Sequence[SupervisedSequence]) -> None:
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


def _add_divergences(tally: Tally, excerpts: Sequence[Excerpt], sequences: Sequence[SupervisedSequence]) -> None:
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


def _add_responses(tally: Tally, dialogue: Dialogue, sequences: Sequence[SupervisedSequence]) -> None:
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


def _add_beginning(tally: Tally, dialogue: Dialogue, sequences: Sequence[SupervisedSequence], tree: Tree) -> None:
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
