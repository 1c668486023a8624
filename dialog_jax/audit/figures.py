"""Dialogues to an audit: figures and findings about what training would see of a file.

Terminals and file formats are not known here.
"""

import dataclasses
import itertools
from collections.abc import Iterable

import transformers

from dialog_jax.audit import inspection, row_lengths, unread
from dialog_jax.audit.findings import Finding, FindingTally
from dialog_jax.audit.row_lengths import Fill, Spread
from dialog_jax.audit.tally import Tally, Tools, add_dialogue
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.schemas import ROLES
from dialog_jax.errors import UserError
from dialog_jax.rendering import special_tokens, virtual_tokens
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.written import ResponseLost
from dialog_jax.trees.dialogue_trees import TreeConfig

_PLACES = 10  # of responses that are rendered differently
_BATCH = 256  # dialogues that are rendered together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """Figures of complete dialogues; only `fills` and findings about lengths depend on `max_length` and `truncate`.

    A soft prompt is a part of rows (`fills`) and of nothing else.
    """

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
    branching: int
    """Number of dialogues whose tree branches, for that reason or because a message has several answers."""
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
    token_percentiles: list[int]
    """Tokens of a dialogue at the percentiles 0, 1, ..., 100; empty if no dialogue is trained on."""
    soft_prompt: int
    """Number of tokens of a soft prompt, which each row has once."""
    truncate: str
    """What training does with a response that is longer than a row with its history."""
    fills: list[Fill]
    unread: dict[str, int]
    """Number of times that each key occurs which neither the program nor the chat template reads."""
    findings: list[Finding]


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
    # Rows that a soft prompt shortens hold what rows of the remaining length hold without it.
    soft_prompt = renderer.virtual_tokens.count
    renderer = renderer.with_virtual_tokens(virtual_tokens.NONE)
    lengths = {length for length in row_lengths.LENGTHS if length > soft_prompt + 1} | {config.max_length}
    config = dataclasses.replace(config, max_length=config.max_length - soft_prompt)
    tools = Tools(
        tokenizer=tokenizer,
        renderer=renderer,
        config=config,
        lengths=sorted(length - soft_prompt for length in lengths),
        soft_prompt=soft_prompt,
        special=inspection.mask_special_tokens(tokenizer),
        escaper=special_tokens.SpecialTokenEscaper(tokenizer, allow_special_tokens=renderer.allow_special_tokens),
        special_texts=inspection.compile_special_texts(tokenizer),
    )
    tally = Tally(tools, unread.KeyTally(renderer))
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
                contents += add_dialogue(tally, dialogue, excerpts)
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


def _summarize(tally: Tally) -> Audit:
    counts, end_of_turn, bos = tally.counts, tally.tools.renderer.end_of_turn, tally.tools.tokenizer.bos_token_id
    encoding = tally.tools.tokenizer.backend_tokenizer.encode("Hello", add_special_tokens=True)
    bos_added = bos is not None and encoding.ids[:1] == [bos]
    max_length = tally.tools.config.max_length
    soft_prompt = tally.tools.soft_prompt
    fills = row_lengths.measure_fills(
        tally.measures, counts["targets"], tally.tools.lengths, max_length, soft_prompt=soft_prompt
    )
    counts["trees"] = len(tally.measures)
    for kind, holds in (
        ("nothing", not tally.measures),
        ("no_end_of_turn", bool(tally.measures) and end_of_turn is None),
        ("missing_bos", bool(tally.measures) and bos_added and not counts["bos"]),
    ):
        if holds:
            tally.findings.add(kind)
    for fill in fills:
        if fill.max_length == max_length + soft_prompt:
            _add_lengths(tally.findings, fill)
    for kind, keys in tally.keys.describe_unread().items():
        tally.findings.add(kind, ", ".join(keys))
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
        branching=counts["branching"],
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
        token_percentiles=row_lengths.measure_percentiles(tally.tree_tokens),
        soft_prompt=soft_prompt,
        truncate=tally.tools.config.truncate,
        fills=fills,
        unread=tally.keys.count_unread(),
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
