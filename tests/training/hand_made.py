"""Directories of runs, made without training: a checkpoint with random trained parameters at each of some steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from dialog_jax.model import model_files, pretrained, saving
from dialog_jax.training import checkpoints, optimizer, run_directory, trainable
from dialog_jax.training.train_step import make_state
from tests.rendering import chat_templates
from tests.training import tiny


def save_model(directory, **changes):
    """Writes a tiny model with a tokenizer and random parameters; returns its config."""
    tokenizer = chat_templates.train_tokenizer("chatml")
    model = tiny.config(len(tokenizer), **changes)
    saving.save_pretrained(directory, model, tiny.parameters(model), tokenizer=tokenizer)
    return model


def draw_trained(config, model, seed):
    """The parameters of which `config` trains a part; the trained ones are random."""
    selection = trainable.select(config, model, jnp.float32)
    parts = trainable.make_parameters(selection, tiny.parameters(model), jax.random.key(0), soft_prompt_text=[3, 4])
    leaves, tree = jax.tree.flatten(parts.trained)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return selection, parts._replace(trained=jax.tree.unflatten(tree, drawn))


def make_run(directory, config, base, *, losses, **fields):
    """Writes the run of a config whose model is in `base`, with a checkpoint at each step above 0 of `losses`.

    Returns {step: its parameters, trained and frozen}. The average of the weights, where the run keeps one, is twice
    the weights.
    """
    config = config.resolve()
    model = pretrained.load_config(base)
    tokenizer = chat_templates.train_tokenizer("chatml")
    ratios = trainable.find_rate_ratios(config, trainable.select(config, model, jnp.float32))
    rule = optimizer.make_optimizer(config.optimizer, 6, rate_ratios=ratios)
    parameters = {}
    with checkpoints.open_manager(directory / "checkpoints") as manager:
        for step in filter(None, losses):
            selection, parts = draw_trained(config, model, seed=step)
            state = make_state(parts.trained, rule, parts.frozen)._replace(step=jnp.int32(step))
            state = state._replace(optimizer_state=jax.tree.map(_double, state.optimizer_state))
            checkpoints.save(manager, state, keep=9, losses=losses)
            parameters[step] = jax.tree.map(np.asarray, parts)
    lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items()]
    (directory / "evaluation.jsonl").write_text("".join(lines))
    run_directory.claim(
        directory,
        config,
        {"model": model_files.fingerprint(base), "steps": 6, "compute_dtype": "float32"},
        model,
        tokenizer,
        stop_tokens={1, 2},
        base=run_directory.BaseModel(**fields),
        selection=selection,
    )
    return parameters


def _double(leaf):
    return 2 * leaf
