"""One dialogue as training would see it: its sequences, and where the tokens of one diverge from those of another.

In: dialogues. Out: for each, its sequences, its divergences and the messages that the template renders. Knows no rows,
and no figures of several dialogues.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers
from jaxtyping import Bool

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.formats import tokenizer_files
from dialog_jax.rendering.rendered_sequence import RenderedSequence
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import largest_token
from dialog_jax.trees import fitting, prefix_tree, weighting
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.weighting import SupervisedSequence


class Divergence(NamedTuple):
    """A place where the tokens of a sequence do not continue those of an earlier one, or of its prompt."""

    kind: str
    """`prompt`: tokenized together, prompt and response have a token that crosses from one to the other. `next`: a
    token crosses from the response to the next message. `history`: the template renders the response differently in
    history."""
    excerpt: Excerpt
    response: int
    """Message index of the response in the excerpt."""
    later: int = -1
    """Message index of the next response, whose prompt contains the first one; -1 for `prompt`."""


def list_special_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[int, str]:
    """Returns the text of every special token by its id, with or without a role such as EOS."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {index: token.content for index, token in added.items() if token.special}


def inspect_tokenizer(renderer: Renderer, embedding_rows: int | None) -> dict[str, str]:
    """Returns what is remarkable about a tokenizer and its chat template themselves: a sentence by kind of finding.

    Args:
      embedding_rows: of the model; None if they are not known.
    """
    tokenizer = renderer.tokenizer
    sentences = dict(tokenizer_files.list_departures(tokenizer))
    if renderer.template_time:
        sentences["clock"] = f"here it is {renderer.template_time}"
    if embedding_rows is not None and (largest := largest_token(tokenizer)) >= embedding_rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        sentences["beyond_embedding"] = f"token {largest:,} ({token!r}), and {embedding_rows:,} rows"
    return sentences


def mask_special_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> Bool[np.ndarray, " vocabulary"]:
    """Returns for each token id whether the token is special."""
    mask = np.zeros(max(tokenizer.get_vocab().values()) + 1, bool)
    mask[list(list_special_tokens(tokenizer))] = True
    return mask


def compile_special_texts(tokenizer: transformers.PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Returns a pattern that finds the text of a special token, the longest that matches."""
    texts = sorted(filter(None, list_special_tokens(tokenizer).values()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def render_dialogues(
    dialogues: Sequence[Dialogue], renderer: Renderer, objective: ObjectiveConfig
) -> Iterator[list[Excerpt] | UserError]:
    """Yields for each dialogue its paths with all their sequences, however long, or the template's error."""
    unfolded = [fitting.unfold(dialogue, objective) for dialogue in dialogues]
    parts = [excerpt.dialogue for excerpts in unfolded for excerpt in excerpts]
    try:
        rendered = iter(renderer.render(parts, full=objective.needs_full_rendering, locate=objective.needs_span))
    except UserError as error:
        if len(dialogues) == 1:
            yield error
            return
        for dialogue in dialogues:
            yield from render_dialogues([dialogue], renderer, objective)
        return
    for excerpts in unfolded:
        sequences = [next(rendered) for _ in excerpts]
        try:
            complete = [
                excerpt._replace(sequences=list(path_sequences))
                for excerpt, path_sequences in zip(excerpts, sequences, strict=True)
            ]
        except UserError as error:
            yield error
        else:
            yield complete


def needs_verbatim(dialogue: Dialogue, renderer: Renderer, objective: ObjectiveConfig) -> bool:
    """Returns whether a dialogue that cannot be rendered can be with `responses=verbatim`."""
    if renderer.responses == "verbatim":
        return False
    (outcome,) = render_dialogues([dialogue], _make_verbatim_renderer(renderer), objective)
    return not isinstance(outcome, UserError)


@functools.lru_cache(maxsize=1)
def _make_verbatim_renderer(renderer: Renderer) -> Renderer:
    return renderer.with_responses("verbatim")


def find_divergences(
    excerpts: Sequence[Excerpt], tokenizer: tokenizers.Tokenizer, special: Bool[np.ndarray, " vocabulary"]
) -> list[Divergence]:
    """Returns the divergences of a dialogue; none where its sequences are prefixes of one string of tokens.

    Sequence 0 is `h x a b` and sequence 1 `h x b u c`, in which history has `b` for the response `a b`: they diverge in
    `history`. The text is not rendered again; tokens and what they decode to are enough.

    Args:
      special: whether a token is special; a special token never merges with its neighbors.
    """
    first_sequences: dict[int, tuple[Excerpt, RenderedSequence]] = {}  # of each response
    prefix_responses: set[int] = set()  # responses whose sequence is a prefix of a later one
    later_divergences = []
    for excerpt in excerpts:
        for sequence in excerpt.sequences:
            if sequence.turn < 0 or excerpt.original_indices[sequence.message_index] in first_sequences:
                continue
            history = excerpt.original_indices[: sequence.message_index]
            previous = next((place for place in reversed(range(len(history))) if history[place] in first_sequences), -1)
            if previous >= 0:
                before = first_sequences[history[previous]][1].tokens
                length = prefix_tree.common_prefix_length(before, sequence.tokens)
                if length == len(before):
                    prefix_responses.add(history[previous])
                else:
                    same = _decode(tokenizer, sequence.tokens[length:]).startswith(_decode(tokenizer, before[length:]))
                    kind = "next" if same else "history"
                    later_divergences.append(Divergence(kind, excerpt, previous, sequence.message_index))
            first_sequences[excerpt.original_indices[sequence.message_index]] = excerpt, sequence
    # In a sequence that continues a response, the response was tokenized together with its prompt.
    crossing = {
        message: Divergence("prompt", excerpt, sequence.message_index)
        for message, (excerpt, sequence) in first_sequences.items()
        if message not in prefix_responses and _crosses(sequence, tokenizer, special)
    }
    others = [
        divergence
        for divergence in later_divergences
        if divergence.kind != "next" or divergence.excerpt.original_indices[divergence.response] not in crossing
    ]
    return [*crossing.values(), *others]


def select_rendered(
    excerpts: Sequence[Excerpt], sequences: Sequence[SupervisedSequence], renderer: Renderer
) -> list[Message]:
    """Returns the messages of the tree that are not trained responses and whose content the template renders.

    A content is rendered if the text contains it, except for white space at its ends.
    """
    excluded = set(weighting.select_responses(sequences))
    messages = []
    for excerpt in excerpts:
        ends = [one.sequence.message_index for one in sequences if one.excerpt is excerpt]
        full = min(ends, default=0) < 0
        count = len(excerpt.original_indices) if full else max(ends, default=0)
        text = renderer.render_text(excerpt.dialogue, count, add_generation_prompt=not full) if count else ""
        for index, message in zip(excerpt.original_indices[:count], excerpt.dialogue.messages, strict=False):
            if index not in excluded and message.content.strip() in text:
                messages.append(message)
            excluded.add(index)  # another path may have the same message
    return messages


def describe_divergence(divergence: Divergence, renderer: Renderer) -> str:
    """Returns the text around a divergence, with the name of its dialogue."""
    excerpt, dialogue = divergence.excerpt, divergence.excerpt.dialogue
    if renderer.responses == "verbatim":
        tokens = [one.tokens for one in excerpt.sequences if one.message_index == divergence.response]
        text = _decode(renderer.tokenizer.backend_tokenizer, tokens[0])
    else:
        text = renderer.render_text(dialogue, divergence.response + 1)
    name = f"{dialogue.name}: message {excerpt.original_indices[divergence.response]}"
    if divergence.kind == "prompt":
        place = len(renderer.render_text(dialogue, divergence.response, add_generation_prompt=True))
        return f"{name}: {text[max(0, place - 20) : place]!r} + {text[place : place + 20]!r}"
    later = renderer.render_text(dialogue, divergence.later, add_generation_prompt=True)
    pairs = enumerate(zip(text, later, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(text), len(later)))
    if divergence.kind == "next":
        return f"{name}: {later[max(0, place - 20) : place]!r} + {later[place : place + 20]!r}"
    return (
        f"{name}: after {text[max(0, place - 30) : place]!r} was generated {text[place : place + 50]!r}, but the "
        f"prompt of message {excerpt.original_indices[divergence.later]} has {later[place : place + 50]!r}"
    )


def _crosses(
    sequence: RenderedSequence, tokenizer: tokenizers.Tokenizer, special: Bool[np.ndarray, " vocabulary"]
) -> bool:
    """Returns whether prompt and response have other tokens when they are tokenized together.

    False where ordinary text spells special tokens, which would be parsed here.
    """
    before = np.flatnonzero(special[sequence.tokens[: sequence.start]])
    tokens = sequence.tokens[int(before[-1]) if len(before) else 0 :]
    joint_tokens = tokenizer.encode(_decode(tokenizer, tokens), add_special_tokens=False).ids
    return not np.array_equal(joint_tokens, tokens) and bool(special[joint_tokens].sum() == special[tokens].sum())


def _decode(tokenizer: tokenizers.Tokenizer, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
