"""The field because of which a chat template refuses a dialogue: found by changing one field after another.

Knows messages and tools, and nothing of templates.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from dialog_jax.dialogues.dialogue import Dialogue

_MAX_TRIALS = 16
_OTHER_CONTENT = "Qx7 zebra"


def find_change(dialogue: Dialogue, count: int, is_refused: Callable[[Dialogue], bool]) -> str:
    """Returns a change after which the dialogue is accepted, such as "without tool_calls in message 3"; "" if none is.

    Fields are tried from the last message back, since a template usually accepts the messages before it.

    Args:
      count: number of messages that the template refuses, from the first.
      is_refused: whether the template refuses a dialogue's first `count` messages.
    """
    changes = itertools.islice(_list_changes(dialogue, count), _MAX_TRIALS)
    return next((change for change, changed in changes if not is_refused(changed)), "")


def _list_changes(dialogue: Dialogue, count: int) -> Iterator[tuple[str, Dialogue]]:
    """Yields (a change of one field, the changed dialogue)."""
    for key in dialogue.chat_template_kwargs:
        kwargs = {name: value for name, value in dialogue.chat_template_kwargs.items() if name != key}
        yield f"without {key} in chat_template_kwargs", dataclasses.replace(dialogue, chat_template_kwargs=kwargs)
    if dialogue.tools:
        yield "without tools", dataclasses.replace(dialogue, tools=None)
    for index in reversed(range(count)):
        message = dialogue.messages[index]
        changed = [
            (
                f"without {key}",
                dataclasses.replace(message, fields={k: v for k, v in message.fields.items() if k != key}),
            )
            for key in message.fields
        ]
        changed.append(("with another content", dataclasses.replace(message, content=_OTHER_CONTENT, parts=())))
        for change, other in changed:
            messages = (*dialogue.messages[:index], other, *dialogue.messages[index + 1 :])
            yield f"{change} in message {index}", dataclasses.replace(dialogue, messages=messages)
