"""Run as a program: stores trees 20 times larger than the memory it may have, and reads batches of them."""

import re
import resource
import sys

import numpy as np
import tokenizers
import transformers

from dialog_jax.batching import batches
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import disk_cache
from dialog_jax.trees.dialogue_trees import TreeConfig

_TEMPLATE = """\
{%- for message in messages %}{{ message.content }}{{ '<end>' if message.role == 'assistant' }}{% endfor -%}"""
_WORDS = 4000  # of a prompt
_BYTES = 24 * (_WORDS + 8)  # of its tree, at least


def _private() -> int:
    """Bytes of memory that this process has for itself, files that it maps not counted."""
    with open("/proc/self/status", encoding="utf-8") as status:
        (size,) = re.findall(r"VmData:\s+(\d+) kB", status.read())
    return int(size) << 10


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "b": 1, "<end>": 2}, "b"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<end>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=_TEMPLATE)


def _dialogues(count: int):
    messages = Message(role="user", content="hello " * _WORDS), Message(role="assistant", content="b b b b b b b")
    for number in range(count):
        yield Dialogue(id=number, messages=messages, where=f"made[{number}]")


def main(directory: str, megabytes: int) -> None:
    """Prints the limit, the bytes stored, and what became of reading them whole and of reading them in batches."""
    renderer, config = Renderer(_tokenizer()), TreeConfig(max_length=_WORDS + 100)
    # What every process needs once: threads, the parts of libraries that are loaded when they are first used.
    small = disk_cache.load_or_build(directory, {"size": "small"}, _dialogues(100), renderer, config, workers=0)
    batches.Plan(small, max_length=8192, rows=2, micro_batches=1, seed=0).batch(0)
    limit = megabytes << 20
    resource.setrlimit(resource.RLIMIT_DATA, (_private() + limit, _private() + limit))
    count = -(-20 * limit // _BYTES)
    trees = disk_cache.load_or_build(directory, {"size": "large"}, _dialogues(count), renderer, config, workers=0)
    columns = [trees.tokens, trees.parent, trees.position, trees.subtree_end, trees.weight, trees.turn]
    try:
        read = [np.array(column) for column in columns]
    except MemoryError:
        read = None
    plan = batches.Plan(trees, max_length=8192, rows=1, micro_batches=1, seed=0)
    tokens = sum(int((plan.batch(step).segment > 0).sum()) for step in range(plan.rows_per_epoch))
    print(limit, sum(column.nbytes for column in columns), len(trees), tokens, "refused" if read is None else "read")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
