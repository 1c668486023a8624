"""One dialogue, looked at as training would see it: its sequences, its tree, and what happens where messages meet.

Records in, what is known of each out. What is wrong with a record is a value here and does not end the reading. Knows
nothing of rows, and no figures of more than one dialogue.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers
from jaxtyping import Bool

from dialog_jax.dialogues import sources
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.parsing import parse_dialogue
from dialog_jax.rendering.sequences import RenderedSequence, Renderer
from dialog_jax.trees import fitting, prefix_tree, weighting
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.weighting import SupervisedSequence


class Divergence(NamedTuple):
    """A place where the tokens of one sequence are not simply those of another, or of its prompt, with more behind."""

    kind: str
    """`prompt`: a token crosses from the prompt to the response, so that the two together tokenise otherwise.
    `next`: likewise from the response to the next message. `history`: the template writes it otherwise in history."""
    piece: Excerpt
    response: int
    """Number of the response in the piece's dialogue."""
    later: int = -1
    """Likewise, the next response, whose prompt holds the first one. -1 for `prompt`."""


def list_special_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[int, str]:
    """Id and text of every special token, those without a name such as EOS among them."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {index: token.content for index, token in added.items() if token.special}


def iterate_dialogues(source: str | pathlib.Path, *, split: str = "train") -> Iterator[Dialogue | ValueError]:
    """Each record of what `read_dialogues` reads: as a dialogue, or as what is wrong with it.

    Raises:
      UserError: the source is not there, or is not what its name says.
    """
    for index, (where, record) in enumerate(sources.read_records(source, split=split, keep_errors=True)):
        found: Dialogue | ValueError
        try:
            found = record if isinstance(record, ValueError) else parse_dialogue(record, index=index, where=where)
        except ValueError as error:
            found = error
        yield found


def render_dialogues(
    dialogues: Sequence[Dialogue], renderer: Renderer, objective: ObjectiveConfig
) -> Iterator[list[Excerpt] | ValueError]:
    """For each dialogue its paths with all their sequences, however long, or why there are none."""
    unfolded = [fitting.unfold(dialogue, objective) for dialogue in dialogues]
    parts = [piece.dialogue for pieces in unfolded for piece in pieces]
    try:
        rendered = iter(renderer.render(parts, full=objective.whole, locate=objective.locates))
    except ValueError as error:
        if len(dialogues) == 1:
            yield error
            return
        for dialogue in dialogues:
            yield from render_dialogues([dialogue], renderer, objective)
        return
    for pieces in unfolded:
        found: list[Excerpt] | ValueError
        own = [next(rendered) for _ in pieces]
        try:
            found = [piece._replace(sequences=list(some)) for piece, some in zip(pieces, own, strict=True)]
        except ValueError as error:
            found = error
        yield found


def find_divergences(
    pieces: Sequence[Excerpt], tokenizer: tokenizers.Tokenizer, special: Bool[np.ndarray, " vocabulary"]
) -> list[Divergence]:
    """Where messages meet otherwise than end to end; none where the dialogue is one string of tokens, cut in K places.

    Judged by tokens and what they decode to, so that no text is rendered again.

    Args:
      special: whether a token is special; such a token ends what can merge.
    """
    shown: dict[int, tuple[Excerpt, RenderedSequence]] = {}
    continued: set[int] = set()
    found = []
    for piece in pieces:
        for sequence in piece.sequences:
            if sequence.turn < 0 or piece.messages[sequence.message_index] in shown:
                continue
            history = piece.messages[: sequence.message_index]
            previous = next((place for place in reversed(range(len(history))) if history[place] in shown), -1)
            if previous >= 0:
                before = shown[history[previous]][1].tokens
                at = prefix_tree.common_prefix_length(before, sequence.tokens)
                if at == len(before):
                    continued.add(history[previous])
                else:
                    same = _text(tokenizer, sequence.tokens[at:]).startswith(_text(tokenizer, before[at:]))
                    found.append(Divergence("next" if same else "history", piece, previous, sequence.message_index))
            shown[piece.messages[sequence.message_index]] = piece, sequence
    # Where another sequence begins with a response, response and prompt were tokenised together there.
    crossing = {
        message: Divergence("prompt", piece, sequence.message_index)
        for message, (piece, sequence) in shown.items()
        if message not in continued and _crosses(sequence, tokenizer, special)
    }
    others = [
        divergence
        for divergence in found
        if divergence.kind != "next" or divergence.piece.messages[divergence.response] not in crossing
    ]
    return [*crossing.values(), *others]


def split_by_rendered(
    pieces: Sequence[Excerpt], sequences: Sequence[SupervisedSequence], renderer: Renderer
) -> tuple[list[Message], list[tuple[int, Message]]]:
    """(messages of the tree, responses apart, with the content that the template writes; number and message of others).

    A content counts as written where the rendering has it somewhere, white space at its ends aside.
    """
    shown = set(weighting.select_responses(sequences))
    written, missing = [], []
    for piece in pieces:
        ends = [one.sequence.message_index for one in sequences if one.piece is piece]
        whole = min(ends, default=0) < 0
        count = len(piece.messages) if whole else max(ends, default=0)
        text = renderer.render_text(piece.dialogue, count, add_generation_prompt=not whole) if count else ""
        for index, message in zip(piece.messages[:count], piece.dialogue.messages, strict=False):
            if index in shown:
                continue
            shown.add(index)
            if message.content.strip() in text:
                written.append(message)
            else:
                missing.append((index, message))
    return written, missing


def describe_divergence(divergence: Divergence, renderer: Renderer) -> str:
    """What stands at a divergence, as text."""
    dialogue = divergence.piece.dialogue
    whole = renderer.render_text(dialogue, divergence.response + 1)
    name = f"{dialogue.name}: message {divergence.piece.messages[divergence.response]}"
    if divergence.kind == "prompt":
        cut = len(renderer.render_text(dialogue, divergence.response, add_generation_prompt=True))
        return f"{name}: {whole[max(0, cut - 20) : cut]!r} + {whole[cut : cut + 20]!r}"
    later = renderer.render_text(dialogue, divergence.later, add_generation_prompt=True)
    pairs = enumerate(zip(whole, later, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(later)))
    if divergence.kind == "next":
        return f"{name}: {later[max(0, at - 20) : at]!r} + {later[at : at + 20]!r}"
    return (
        f"{name}: after {whole[max(0, at - 30) : at]!r} was generated {whole[at : at + 50]!r}, but the prompt of "
        f"message {divergence.piece.messages[divergence.later]} has {later[at : at + 50]!r}"
    )


def _crosses(
    sequence: RenderedSequence, tokenizer: tokenizers.Tokenizer, special: Bool[np.ndarray, " vocabulary"]
) -> bool:
    """Whether prompt and response together tokenise otherwise than one after the other.

    Not told where ordinary text spells special tokens, which would be parsed here.
    """
    before = np.flatnonzero(special[sequence.tokens[: sequence.start]])
    near = sequence.tokens[int(before[-1]) if len(before) else 0 :]
    again = tokenizer.encode(_text(tokenizer, near), add_special_tokens=False).ids
    return not np.array_equal(again, near) and bool(special[again].sum() == special[near].sum())


def _text(tokenizer: tokenizers.Tokenizer, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
