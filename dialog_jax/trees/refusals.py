"""One call for many dialogues, some of which the chat template may refuse.

Rendering many dialogues by one call is faster, but an error does not say what the others would have given.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from dialog_jax.errors import UserError
from dialog_jax.rendering.template_process import TemplateStopped

Item = TypeVar("Item")
Result = TypeVar("Result")


def call_with_each(
    function: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]
) -> list[Result | UserError]:
    """Returns `function(items)`, a result for each item; if that raises, the result or error of each item alone.

    With a function that raises UserError("negative") for negative numbers, and otherwise returns the square roots:

        [4, 9]       [2, 3]
        [4, -1, 9]   [2, UserError("negative"), 3]

    Raises:
      TemplateStopped: a template exceeded its time or memory, which is no error of a single dialogue.
    """
    try:
        return list(function(items))
    except TemplateStopped:
        raise
    except UserError as error:
        if len(items) == 1:
            return [error]
    return [call_with_each(function, [item])[0] for item in items]
