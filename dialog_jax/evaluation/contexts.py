"""The histories behind which a response is scored: all of it, only the last user message, or none.

In: a dialogue of one path and its rendered sequences. Out: for each response the sequences that end with the same
tokens, each behind another prompt. Knows no trees and no model.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.rendered_sequence import RenderedSequence
from dialog_jax.rendering.sequences import Renderer

CONTEXTS = {"full": (), "none": ("none",), "last": ("last",), "all": ("last", "none")}
"""What a response is scored behind in addition to its full history, by the name of the choice.

`last` is the system message and the dialogue from the last user message on, with tools, so that results of tools stay.
`none` is the generation prompt that the template writes after a history, behind the BOS token if the template writes
one: no system message, no tools, no user message.
"""
EMPTY_MESSAGE = "empty user message"


class ContextSequence(NamedTuple):
    """A response behind a prompt."""

    sequence: RenderedSequence
    context: str = "full"
    """`full`, or one of those in `CONTEXTS`."""
    follows_empty_message: bool = False
    """Whether `none` is the prompt behind an empty user message, because the template has no generation prompt."""


def select_last(dialogue: Dialogue, index: int) -> Dialogue:
    """Returns the messages before message `index` without the turns before the last user message.

    s u0 a0 u1 call result [a1]   ->   s u1 call result

    All messages before it if none of them is a user's.

    Args:
      dialogue: of one path.
    """
    messages = dialogue.messages[:index]
    first = next((i for i, message in enumerate(messages) if message.role != "system"), index)
    last = max((i for i in range(first, index) if messages[i].role == "user"), default=first)
    return dataclasses.replace(dialogue, messages=messages[:first] + messages[last:])


def add_contexts(
    dialogue: Dialogue, sequences: Sequence[RenderedSequence], renderer: Renderer, contexts: Sequence[str]
) -> list[list[ContextSequence]]:
    """Returns for each sequence itself, and its response behind each of `contexts`.

    The response has the tokens that it has behind its full history, so that the losses compare the same tokens.

    Raises:
      UserError: the template refuses a history, or writes no prompt for it.
    """
    variants = []
    bare_prompt = renderer.encode_bare_prompt(dialogue) if "none" in contexts and sequences else None
    for sequence in sequences:
        variants.append([ContextSequence(sequence)])
        for context in contexts:
            follows_empty_message = False
            if context == "none":
                assert bare_prompt is not None
                prompt, follows_empty_message = bare_prompt
            else:
                history = select_last(dialogue, sequence.message_index)
                if len(history.messages) == sequence.message_index:  # it is the full history
                    variants[-1].append(ContextSequence(sequence, context))
                    continue
                prompt = renderer.encode_prompt(history)
            if not len(prompt):
                raise UserError(
                    f"{dialogue.name}: the chat template writes no prompt for message {sequence.message_index} in the "
                    f"context {context!r}. Leave out --context, or pass another chat template."
                )
            response = sequence.tokens[max(sequence.start, 1) :]  # nothing predicts a first token
            variant = sequence._replace(
                tokens=np.concatenate([prompt, response]), start=len(prompt), message_spans=(), part_spans=()
            )
            variants[-1].append(ContextSequence(variant, context, follows_empty_message))
    return variants
