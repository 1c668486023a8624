"""Which dialogues of a data set are held out from training: a share of them, chosen by a hash of their content.

The choice for a dialogue depends on nothing but that dialogue, as long as some dialogues have a hash below the share
and some do not. Then equal dialogues are on the same side, and neither reordering a data set nor adding to it moves a
dialogue to the other side. A small set may have no dialogue on one of the sides; that side then gets the dialogue (and
its equals) whose hash is nearest to the share.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError

_HASHES = 2**64  # hashes are below it


def hash_dialogue(dialogue: Dialogue) -> int:
    """Returns a number from 0 to 2 ** 64 - 1 that depends on the content only.

    The content is what a chat template reads: messages, their order, the tools and its variables. Not id, metadata or
    weights.
    """
    content: list[Any] = [[message.as_dict() for message in dialogue.messages], dialogue.parents, dialogue.tools]
    content += [dialogue.chat_template_kwargs] if dialogue.chat_template_kwargs else []
    text = json.dumps(content, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def format_hash(dialogue: Dialogue) -> str:
    """Returns the hash as text, by which files about a data set recognize its dialogues: `0093f1c2d47a60b5`."""
    return f"{hash_dialogue(dialogue):016x}"


def find_limit(dialogues: Iterable[Dialogue], share: float) -> int:
    """Returns the number such that the dialogues whose hash is below it are held out.

    This is `share` of all hashes, unless one side would be empty. With hashes as shares of 2 ** 64:

        0.01 0.30 0.70    share 0.05    limit 0.05    held out: 0.01
        0.20 0.30 0.70    share 0.05    just above 0.20         0.20
        0.20 0.30 0.70    share 0.90    limit 0.70              0.20 0.30

    Args:
      dialogues: read only until both sides have one, which in a large set is after a few dialogues.
      share: of the dialogues to hold out; above 0 and below 1.

    Raises:
      UserError: all dialogues are equal, so that one side would be empty.
    """
    limit = int(share * _HASHES)
    smallest, largest = _HASHES, -1
    count = 0
    for dialogue in dialogues:
        count += 1
        number = hash_dialogue(dialogue)
        smallest, largest = min(smallest, number), max(largest, number)
        if smallest < limit <= largest:
            return limit
    if not count:
        return limit
    if smallest == largest:
        has = "it has a single dialogue" if count == 1 else f"its {count:,} dialogues are all equal"
        raise UserError(
            f"{has}; needed two different ones, one to train on and one to hold out. Add dialogues, or name held-out "
            "ones: --config.data.validation=..."
        )
    return min(max(limit, smallest + 1), largest)
