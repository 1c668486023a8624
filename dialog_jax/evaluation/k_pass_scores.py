"""The records of `scoring` from K passes: one forward pass per response and context (`dialog_jax score --passes=k`)."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import transformers

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.evaluation import k_pass_losses, k_passes, scoring
from dialog_jax.evaluation.contexts import EMPTY_MESSAGE
from dialog_jax.evaluation.scoring import Score
from dialog_jax.model import decoder
from dialog_jax.model.decoder_config import DecoderConfig


def score_dialogues(
    dialogues: Iterable[Dialogue],
    tokenizer: transformers.PreTrainedTokenizerFast,
    model: DecoderConfig,
    parameters: dict,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
    responses: str = "rendered",
    stop_tokens: Collection[int] = (),
    contexts: Sequence[str] = (),
    compute_dtype: jax.typing.DTypeLike,
) -> Iterator[Score]:
    """Yields what `scoring.score_dialogues` yields, from one forward pass per response and context.

    Raises:
      UserError: what `k_passes` raises, or a loss is not finite; names the dialogue.
    """
    options: dict[str, Any] = {
        "chat_template_kwargs": chat_template_kwargs,
        "allow_special_tokens": allow_special_tokens,
        "virtual_tokens": [model.vocab_size + index for index in range(len(parameters.get(decoder.SOFT_PROMPT, ())))],
    }
    for dialogue in dialogues:
        passes = k_passes.make_passes(dialogue, tokenizer, responses=responses, stop_tokens=stop_tokens, **options)
        turns, tokens_read = [], 0
        for one in passes:
            if len(one.tokens) > model.context:
                continue
            others = {
                context: k_passes.replace_prompt(one, context, dialogue, tokenizer, **options) for context in contexts
            }
            variants = {"nll": one, **{f"nll_{context}": other for context, (other, _) in others.items()}}
            if max(len(variant.tokens) for variant in variants.values()) > model.context:
                continue
            turn: dict[str, Any] = {"turn": one.turn, "message": one.message, "tokens": len(one.tokens) - one.start}
            for name, variant in variants.items():
                nll = math.fsum(
                    k_pass_losses.compute_response_nll(model, parameters, variant, compute_dtype=compute_dtype)
                )
                if not math.isfinite(nll):
                    raise UserError(
                        f"{dialogue.name}: the loss of message {one.message} is {nll}. The model's weights are damaged "
                        "or overflow the type they are computed in; try float32."
                    )
                turn[name] = nll
                tokens_read += len(variant.tokens)
            if any(has_empty_message for _, has_empty_message in others.values()):
                turn["none_follows"] = EMPTY_MESSAGE
            turns.append(turn)
        record = scoring.make_record(dialogue, turns, len(passes) - len(turns))
        yield Score(record, dialogue.name, tokens_read)
