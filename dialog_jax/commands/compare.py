"""Shows one held-out dialogue up to a response, what the human wrote there, and what each model writes.

    dialog_jax compare --models=assets/smollm2-135m-instruct,runs/quickstart/model \\
        --data=assets/chitchat/validation.jsonl --index=103 --turn=1
"""

import itertools
import pathlib
import textwrap

from absl import flags

from dialog_jax.commands import entry
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.errors import UserError
from dialog_jax.inference import chat, loading
from dialog_jax.rendering import chat_template
from dialog_jax.training import compilation_cache

_MODELS = flags.DEFINE_list(
    "models", None, "Model directories, .gguf files or hub names, divided by commas.", required=True
)
_DATA = flags.DEFINE_string(
    "data", None, "A .jsonl, .json or .parquet file of dialogues, or a hub data set.", required=True
)
_SPLIT = flags.DEFINE_string("split", "train", "Which split of a hub data set; files have none.")
_INDEX = flags.DEFINE_integer("index", 0, "Which dialogue, from 0.", lower_bound=0)
_TURN = flags.DEFINE_integer("turn", 0, "Which of its assistant messages, from 0.", lower_bound=0)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 always takes the likeliest token; higher is more varied.")
_TOP_P = flags.DEFINE_float("top_p", 0.9, "Draw from the likeliest tokens that have this probability together.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 96, "Tokens of a reply, at most.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "The same for every model.")
_CHAT_TEMPLATE_KWARGS = flags.DEFINE_string(
    "chat_template_kwargs", "{}", 'Further variables of the template, as JSON: {"enable_thinking": false}.'
)
_ALLOW_SPECIAL_TOKENS = flags.DEFINE_boolean(
    "allow_special_tokens", False, "Parse special tokens that the texts of a dialogue spell; else they are text."
)

_LINE = 88  # characters


def compare(models: list[str], dialogue: Dialogue, turn: int) -> None:
    """Prints the history, the human's response and a reply of each model."""
    responses = [index for index, message in enumerate(dialogue.messages) if message.role == "assistant"]
    if turn >= len(responses):
        raise UserError(f"{dialogue.name} has {len(responses)} assistant messages; --turn={turn} counts them from 0.")
    history = [dialogue.messages[index] for index in dialogue.ancestors(responses[turn])]
    human = dialogue.messages[responses[turn]]
    print(f"{dialogue.name}, response {turn}\n")
    labels = ["human wrote", *(f"{_label(model, models)} writes" for model in models)]
    width = max(map(len, labels))
    for message in history:
        _print(message.role, message.content, width)
    print()
    _print(labels[0], human.content, width)
    for name, label in zip(models, labels[1:], strict=True):
        model = loading.load_model(
            name,
            chat_template_kwargs=chat_template.parse_template_kwargs(_CHAT_TEMPLATE_KWARGS.value),
            allow_special_tokens=_ALLOW_SPECIAL_TOKENS.value,
        )
        pieces = chat.reply(
            model,
            history,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            seed=_SEED.value,
        )
        written = list(pieces)
        _print(label, "".join(piece.text for piece in written), width)
        if written[-1].end != "turn":
            print(f"{'':>{width}}  (cut after {_MAX_NEW_TOKENS.value} tokens)")


def _label(model: str, models: list[str]) -> str:
    """The last part of a model's path, and the one before where that is shared or says nothing."""
    path = pathlib.PurePath(model)
    parts = 1 if path.name != "model" and sum(pathlib.PurePath(m).name == path.name for m in models) == 1 else 2
    return "/".join(path.parts[-parts:])


def _print(label: str, text: str, width: int) -> None:
    lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, _LINE) or [""]]
    for number, line in enumerate(lines or ["(nothing)"]):
        print(f"{label if number == 0 else '':>{width}}  {line}")


def main() -> None:
    compilation_cache.enable(entry.print_message)
    dialogues = read_dialogues(_DATA.value, split=_SPLIT.value)
    dialogue = next(itertools.islice(dialogues, _INDEX.value, None), None)
    if dialogue is None:
        raise UserError(f"{_DATA.value} has no dialogue {_INDEX.value}; --index counts them from 0.")
    compare(_MODELS.value, dialogue, _TURN.value)
