"""Prints a dialogue up to a response, what the human wrote there, and what each model writes.

    dialog_jax compare --models=assets/smollm2-135m-instruct,runs/quickstart/model \\
        --config=experiments/quickstart.py --data=validation --index=103 --turn=1
"""

import pathlib
import textwrap
from collections.abc import Sequence

from absl import flags

from dialog_jax.commands import config_flag, config_inputs, entry
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.inference import chat
from dialog_jax.training import compilation_cache, data_sources, trained_models
from dialog_jax.training.config import TrainConfig

_CONFIG = config_flag.define()
_DATA = config_inputs.define_data()
_ADAPTER = config_inputs.define_adapter()
_BASE = config_inputs.define_base()
_MODELS = flags.DEFINE_list(
    "models", [], "Runs, model directories, .gguf files or hub names, separated by commas; by default config.model."
)
_INDEX = flags.DEFINE_integer("index", 0, "Index of the dialogue, from 0.", lower_bound=0)
_TURN = flags.DEFINE_integer(
    "turn", 0, "Index of the response among the dialogue's assistant messages, from 0.", lower_bound=0
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 always takes the likeliest token; higher is more varied.")
_TOP_P = flags.DEFINE_float("top_p", 0.9, "Sample from the fewest likeliest tokens whose probabilities add up to this.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 96, "Largest number of tokens of a reply.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples, the same for every model.")

_LINE = 88  # characters


def compare(models: Sequence[str], config: TrainConfig, dialogue: Dialogue, turn: int) -> None:
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
    # It is the base of every run that needs one; a single model says itself why it needs none.
    bases = {name: _BASE.value if len(models) == 1 or trained_models.needs_base(name) else "" for name in models}
    if _BASE.value and not any(bases.values()):
        raise UserError(f"--base is {_BASE.value}, and none of {', '.join(models)} needs another model. Leave it out.")
    for name, label in zip(models, labels[1:], strict=True):
        model = trained_models.load_model(name, base=bases[name], **config_inputs.model_options(config))
        reply = chat.reply(
            model,
            history,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            seed=_SEED.value,
        )
        chunks = list(reply)
        _print(label, "".join(chunk.text for chunk in chunks), width)
        if chunks[-1].end != "turn":
            print(f"{'':>{width}}  (cut after {_MAX_NEW_TOKENS.value} tokens)")


def _label(model: str, models: Sequence[str]) -> str:
    """Returns the last part of a model's path, preceded by the one before if the last is not unique or is `model`."""
    path = pathlib.PurePath(model)
    parts = 1 if path.name != "model" and sum(pathlib.PurePath(m).name == path.name for m in models) == 1 else 2
    return "/".join(path.parts[-parts:])


def _print(label: str, text: str, width: int) -> None:
    lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, _LINE) or [""]]
    for number, line in enumerate(lines or ["(nothing)"]):
        print(f"{label if number == 0 else '':>{width}}  {line}")


def main() -> None:
    compilation_cache.enable(entry.print_message)
    config = config_inputs.read_config(_CONFIG, _ADAPTER)
    models = _MODELS.value or [config.model]
    if not models[0]:
        raise UserError("there is no model to compare. Name some: --models=FIRST,SECOND.")
    source = data_sources.find_source(config, _DATA.value)
    compare(models, config, source.find_dialogue(_INDEX.value), _TURN.value)
