"""A decoder small enough for tests, random parameters for it, and dialogues through the whole data room."""

import contextlib
import functools
import json
from unittest import mock

import jax
import numpy as np

from dialog_jax.attention import dispatch
from dialog_jax.batching import batches
from dialog_jax.model import decoder, quantization, saving
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.rotary import Rotary
from dialog_jax.rendering import virtual_tokens as virtual_tokens_lib
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training import loss, optimizer, score_steps, train_step
from dialog_jax.training.config import DataConfig, MeshConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.rendering import chat_templates


def config(vocab_size, **changes):
    """Two layers, grouped heads, tied embeddings."""
    fields = {
        "family": "llama",
        "vocab_size": vocab_size,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "feed_forward": 48,
        "max_length": 2048,
        "rotary": (Rotary(theta=10000.0),),
        "tie_embeddings": True,
    }
    return DecoderConfig(**(fields | changes))


def parameters(model, seed=0):
    """Parameters far enough from zero that every path matters."""
    drawn = decoder.init_parameters(model, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, drawn)


def quantize(kind, stack):
    """The arrays of quantized matrices [L, in, out], stacked."""
    parts = [quantization.quantize(kind, matrix)[0] for matrix in np.asarray(stack)]
    return {name: jax.numpy.asarray(np.stack([part[name] for part in parts])) for name in parts[0]}


def trees(dialogues, tokenizer, *, max_length=512, virtual_tokens=virtual_tokens_lib.NONE, **objective):
    """The trees of dialogues under an objective."""
    return dataset.prepare(
        dialogues,
        Renderer(tokenizer, virtual_tokens=virtual_tokens),
        TreeConfig(objective=ObjectiveConfig(**objective), max_length=max_length),
    )


def run_config(directory, **changes):
    """The config of a run of 6 steps on 8 devices; its model, 24 dialogues and 4 held out are written there."""
    tokenizer = chat_templates.train_tokenizer("chatml")
    model = config(len(tokenizer))
    saving.save_pretrained(directory / "model", model, parameters(model), tokenizer=tokenizer)
    rng = np.random.default_rng(0)
    for name, count in (("train", 24), ("validation", 4)):
        dialogues = [chat_templates.random_dialogue(rng, turns=1 + i % 3) for i in range(count)]
        lines = [
            json.dumps({"id": f"{name}-{i}", "messages": [message.as_dict() for message in dialogue.messages]})
            for i, dialogue in enumerate(dialogues)
        ]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    fields = {
        "model": str(directory / "model"),
        "data": DataConfig(
            train=str(directory / "train.jsonl"), validation=str(directory / "validation.jsonl"), max_length=256
        ),
        "optimizer": OptimizerConfig(learning_rate=3e-3),
        "mesh": MeshConfig(data=2, fsdp=2, tensor=2),
        "rows": 4,
        "gradient_accumulation": 2,
        "steps": 6,
        "evaluate_every": 2,
        "checkpoint_every": 2,
    }
    return TrainConfig(**(fields | changes))


@functools.cache
def _once(make):
    """`make`, called once for equal arguments; trees of arguments are equal if their leaves are."""
    results = {}

    def make_once(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        key = (*leaves, structure)
        if key not in results:
            results[key] = make(*args, **kwargs)
        return results[key]

    return make_once


@contextlib.contextmanager
def shared_programs():
    """Runs of equal configs in this process share what they have compiled; otherwise each run traces it anew."""
    with contextlib.ExitStack() as stack:
        for module, names in (
            (dispatch, ("shard_attention",)),
            (optimizer, ("make_optimizer",)),
            (train_step, ("make_train_step",)),
            (score_steps, ("make_evaluation_step",)),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(module, name, _once(getattr(module, name))))
        yield


def rows(prepared, assignment, *, max_length):
    """A [B, ...] batch of rows on the device, given as lists of tree numbers."""
    filled = batches.fill_rows(prepared, assignment, max_length=max_length)
    return jax.tree.map(jax.numpy.asarray, filled)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def loss_and_gradient(model, parameters, batch):
    """(sum of weighted loss, its gradient) of [B, ...] rows, in one pass."""
    hidden = decoder.hidden_states(model, parameters, batch.tokens, batch.position, batch.subtree_end)
    targets = loss.Targets(batch.source, batch.target, batch.weight)
    return loss.weighted_loss(hidden, decoder.unembedding(model, parameters), targets)[0]


def largest_difference(a, b):
    """The largest difference between two trees of arrays, relative to the largest entry of `b`."""
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(b))
    gaps = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)
    return max(jax.tree.leaves(gaps)) / scale
