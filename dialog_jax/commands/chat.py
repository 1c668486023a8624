"""Chats with a model in the terminal.

    dialog_jax chat --config.model=runs/mine
    dialog_jax chat --config.model=MODEL --adapter=runs/mine/adapter
    dialog_jax chat --config.model=runs/mine/model --message="How was your weekend?"

Type a message and press return; the reply appears as it is generated, and Ctrl-C stops it. `/reset` starts a new
dialogue, `/quit` or Ctrl-D leaves. With --message there is one reply, and nothing else on standard output. The model
sees the dialogue so far as its chat template renders it; only the new part is computed.
"""

import contextlib
import sys
from collections.abc import Sequence

from absl import flags

from dialog_jax.commands import config_flag, config_inputs, entry
from dialog_jax.dialogues.dialogue import Message
from dialog_jax.errors import UserError
from dialog_jax.inference import chat, generation, loading
from dialog_jax.training import compilation_cache, trained_models
from dialog_jax.training.config import require_fields

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (gives input() its line editing)

_CONFIG = config_flag.define()
_ADAPTER = config_inputs.define_adapter()
_BASE = config_inputs.define_base()
_MESSAGE = flags.DEFINE_string("message", None, "Reply to this one message, then exit.")
_SYSTEM = flags.DEFINE_string("system", None, "System message; without one the template may add its default.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 always takes the likeliest token; higher is more varied.")
_TOP_P = flags.DEFINE_float("top_p", 0.9, "Sample from the fewest likeliest tokens whose probabilities add up to this.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Largest number of tokens of a reply.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed and messages give the same replies.")


def speak(model: loading.Model, session: generation.Session, messages: Sequence[Message]) -> str:
    """Prints the reply to `messages` as it is generated, and returns it. Ctrl-C ends it early."""
    texts = []
    end = "interrupted"
    chunks = chat.reply(
        model,
        messages,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        seed=_SEED.value + len(messages),
        session=session,
    )
    with contextlib.suppress(KeyboardInterrupt):
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            texts.append(chunk.text)
            end = chunk.end
    print()
    if end == "max_new_tokens":
        _print_notice(f"(cut after {_MAX_NEW_TOKENS.value:,} tokens; --max_new_tokens=N allows more)")
    elif end == "context":
        _print_notice(
            f"(cut: the model's context of {model.config.context:,} tokens is full; /reset starts a new dialogue)"
        )
    elif end == "interrupted":
        _print_notice("(stopped)")
    return "".join(texts)


def converse(model: loading.Model, opening: Sequence[Message]) -> None:
    """Reads messages and replies until the user leaves."""
    session = generation.Session(model.config, model.parameters)
    messages = list(opening)
    _print_notice("/reset starts a new dialogue, /quit leaves.")
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            messages = list(opening)
            _print_notice("(new dialogue)")
            continue
        if text.startswith("/"):
            _print_notice(f"{text.split()[0]} is not a command; the commands are /reset and /quit.")
            continue
        if not text:
            continue
        messages.append(Message(role="user", content=text))
        print("model> ", end="", flush=True)
        try:
            messages.append(Message(role="assistant", content=speak(model, session, messages)))
        except UserError as error:
            messages.pop()
            print()
            _print_notice(f"No reply: {error} (/reset starts a new dialogue)")


def _print_notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    compilation_cache.enable(entry.print_message)
    config = config_inputs.read_config(_CONFIG, _ADAPTER)
    require_fields(config, "chat", "model")
    model = trained_models.load_model(config.model, base=_BASE.value, **config_inputs.model_options(config))
    opening = [Message(role="system", content=_SYSTEM.value)] if _SYSTEM.value else []
    if _MESSAGE.value is not None:
        session = generation.Session(model.config, model.parameters)
        speak(model, session, [*opening, Message(role="user", content=_MESSAGE.value)])
    else:
        converse(model, opening)
