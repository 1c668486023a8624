"""Which dialogues of a data set are held out from training: a share of them, chosen by a hash of their content.

The choice for one dialogue depends on nothing but that dialogue. So equal dialogues are on the same side, and neither
reordering a data set nor adding to it moves a dialogue to the other side.
"""

import hashlib
import json

from dialog_jax.dialogues.dialogue import Dialogue


def is_held_out(dialogue: Dialogue, share: float) -> bool:
    """Returns whether a dialogue belongs to the `share` (0 to 1) of all dialogues that is held out.

    The hash is of what a chat template reads: messages, their order and the tools; not of id, metadata or weights.
    """
    content = [[message.as_dict() for message in dialogue.messages], dialogue.parents, dialogue.tools]
    text = json.dumps(content, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
