"""What an experiment needs to run in seconds: a tiny model in a directory, dialogues in files; and separate passes.

The separate passes are the oracle: every response with its prompt a sequence of its own, the log-softmax of the whole
vocabulary at every position.
"""

import functools
import json
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import report

from dialog_jax.inference import loading
from dialog_jax.model import decoder, saving
from dialog_jax.training import sharding
from tests.laws import oracles
from tests.rendering import chat_templates
from tests.training import tiny

_LENGTH = 256  # tokens of a line of the oracle


def save_model(directory, **changes):
    """A tiny model with a ChatML tokenizer, saved in `directory` / "model", and loaded from there."""
    tokenizer = chat_templates.train_tokenizer("chatml")
    model = tiny.config(len(tokenizer), **changes)
    saving.save_pretrained(directory / "model", model, tiny.parameters(model), tokenizer=tokenizer)
    return loading.load_model(directory / "model")


def records(count, seed=0):
    """Dialogues of 1, 2, 6 and 12 turns in turn; responses have 1 to 4 words, the second of a dozen has 20."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        messages = []
        for turn in range((1, 2, 6, 12)[number % 4]):
            size = 20 if number % 4 == 3 and turn == 1 else int(rng.integers(1, 5))
            messages.append({"role": "user", "content": " ".join(rng.choice(["Hi", "you", "fine", "yes?"], 2))})
            messages.append({"role": "assistant", "content": " ".join(rng.choice(["a", "is", "the", "12"], size))})
        made.append({"id": f"d{number}", "messages": messages})
    return made


def save_dialogues(directory):
    """Files of 24 dialogues to train on and 12 held out."""
    for name, count, seed in (("train", 24, 0), ("validation", 12, 1)):
        lines = (json.dumps(record) + "\n" for record in records(count, seed))
        pathlib.Path(directory / f"{name}.jsonl").write_text("".join(lines))


def experiment_options(directory, name):
    """Options of an experiment that keeps its runs, with the model and the dialogues saved in `directory`."""
    save_model(directory)
    save_dialogues(directory)
    files = {field: str(directory / f"{field}.jsonl") for field in ("train", "validation")}
    places = {field: str(directory / field) for field in ("runs_dir", "results_dir", "model")}
    return report.Options(name=name, **places, **files)


def one_device():
    """A context in which runs of this process use one of the simulated devices, as a machine without others would."""
    make_mesh = sharding.make_mesh
    return mock.patch.object(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def passes(dialogues, weigh=lambda turn, turns: 1.0):
    """([N, 256] tokens, [N, 255] weights): a line a response, with its prompt before it and zeros after it.

    weights[n, i] is that of token i + 1, and weigh(turn, turns) within the response.
    """
    lines = []
    for dialogue in dialogues:
        responses = oracles.responses(dialogue, "chatml")
        for turn, one in enumerate(responses):
            tokens, weight = np.zeros(_LENGTH, np.int32), np.zeros(_LENGTH - 1, np.float32)
            stop = len(one.prompt) + len(one.tokens)
            tokens[:stop] = one.prompt + one.tokens
            weight[len(one.prompt) - 1 : stop - 1] = weigh(turn, len(responses))
            lines.append((tokens, weight))
    return tuple(np.stack(column) for column in zip(*lines, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def losses(config, parameters, tokens):
    """[N, 255]: -log p of every token but the first of each line, each line alone under the causal mask."""
    count, length = tokens.shape
    hidden = decoder.hidden_states(
        config,
        parameters,
        tokens,
        jnp.broadcast_to(jnp.arange(length), (count, length)),
        jnp.full((count, length), length, jnp.int32),
    )
    logits = jnp.einsum("ntd,vd->ntv", hidden[:, :-1], decoder.unembedding(config, parameters))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def gradient(config, parameters, tokens, weight):
    """Of sum(weight * loss)."""
    return jax.grad(lambda parameters: jnp.sum(weight * losses(config, parameters, tokens)))(parameters)
