"""Chat templates, which are programs that anyone may have written, run so that they can do nothing but write text.

transformers runs them in Jinja's sandbox, which keeps them from Python's objects; here they are kept from running for
ever, and from memory without end. What remains: an operation of the interpreter that is huge by itself.
"""

import functools
from typing import Any

import jinja2
import transformers

from dialog_jax.errors import UserError
from dialog_jax.rendering import bounded

REFUSALS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""What running a template raises, by its own will or not."""
LONGEST = 64 << 20
"""Characters of a text that a template may write."""
_DIGITS = 15  # that round() may keep


def render(tokenizer: transformers.PreTrainedTokenizerFast, messages: list[Any], **kwargs: Any) -> str:
    """What the tokenizer's chat template writes of messages; `kwargs` are those of `apply_chat_template`.

    Raises:
      One of REFUSALS: the template refuses, breaks off, or does not end within limits.
    """
    _check_operations(kwargs.get("chat_template") or tokenizer.get_chat_template(tools=kwargs.get("tools")))
    text = bounded.run(tokenizer.apply_chat_template, messages, tokenize=False, **kwargs)
    assert isinstance(text, str)
    if len(text) > LONGEST:
        raise UserError(f"it wrote {len(text):,} characters, the limit is {LONGEST:,}")
    return text


@functools.lru_cache(maxsize=64)
def _check_operations(template: str) -> None:
    """Refuses powers, by operator or in round(), and products with a huge number.

    A single one can take the interpreter, and all of its threads, for hours, or all memory.
    """
    tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template) if kind != "whitespace"]
    none = ("", "")
    for before, (kind, text), *after in zip(
        [none, *tokens], tokens, [*tokens[1:], none], [*tokens[2:], none, none], strict=False
    ):
        if (kind, text) == ("operator", "**") and before[1] not in ("(", ","):  # f(**fields) is no power
            raise UserError("it raises to a power, with **, which is not run")
        if kind == "integer" and "*" in (before[1], after[0][1]) and int(text.replace("_", ""), 0) > LONGEST:
            raise UserError(f"it multiplies by {text}, the limit is {LONGEST:,}")
        if kind in ("name", "string") and text.strip("\"'") == "round":
            (_, follows), (number, digits) = after
            if kind == "string" or (follows == "(" and not (number == "integer" and int(digits) <= _DIGITS)):
                raise UserError(f"it rounds otherwise than to a plain number of at most {_DIGITS} digits")
