"""The laws of loss and gradient hold whatever is trained: everything, LoRA, a soft prompt, or a part of the model."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from absl.testing import absltest, parameterized

from dialog_jax.batching import batches
from dialog_jax.evaluation import agreement
from dialog_jax.inference import generation
from dialog_jax.model import decoder, parameter_trees
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from dialog_jax.training import loop, run, sharding, train_step, trainable
from dialog_jax.training.config import MeshConfig, TrainConfig
from dialog_jax.training.signals import StoppedError
from tests.evaluation import agreement_test
from tests.rendering import chat_templates
from tests.training import tiny
from tests.trees import message_trees_test

_KINDS = {
    "full": TrainConfig(),
    "lora": TrainConfig(lora=LoraConfig(rank=4)),
    "lora everywhere": TrainConfig(
        lora=LoraConfig(rank=3, targets=("all-linear", "embed_tokens", "lm_head"), rank_pattern={"q_proj": 1})
    ),
    "lora on nf4": TrainConfig(lora=LoraConfig(rank=2), frozen_dtype="nf4"),
    "int8 attention": TrainConfig(freeze=("layers/attention/w_*",), frozen_dtype="int8"),
    "norms only": TrainConfig(train_only=("*norm",)),
    "soft prompt and lora": TrainConfig(
        soft_prompt=SoftPromptConfig(tokens=7, init="random"),
        lora=LoraConfig(rank=2, targets=("all-linear", "embed_tokens")),
    ),
}


# Of the full tier: see tests/conftest.py.
FULL_PARAMETERS = ("full", "lora", "lora everywhere", "lora on nf4", "int8 attention", "norms only")


def make_parameters(config, model):
    """Random parameters of which `config` trains a part; no factor of LoRA is zero."""
    selection = trainable.select(config, model, jnp.float32)
    flat = parameter_trees.flatten(tiny.parameters(model))
    base = parameter_trees.unflatten(
        {
            path: tiny.quantize(kind, leaf)
            if (kind := selection.find_kind(path))
            else leaf.astype(selection.dtype(path))
            for path, leaf in flat.items()
        }
    )
    parts = trainable.make_parameters(selection, base, jax.random.key(1))
    if selection.scales:
        leaves, tree = jax.tree.flatten(parts.trained)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        drawn = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        parts = parts._replace(trained=jax.tree.unflatten(tree, drawn))
    return parts


@functools.cache
def prepared(virtual=0):
    tokenizer = chat_templates.train_tokenizer("chatml")
    rng = np.random.default_rng(0)
    dialogues = [chat_templates.random_dialogue(rng, turns=1 + i % 3, id=i) for i in range(8)]
    virtual_tokens = VirtualTokens(len(tokenizer), virtual)
    trees = tiny.trees(dialogues, tokenizer, virtual_tokens=virtual_tokens, max_length=256)
    return trees, tiny.config(len(tokenizer))


def one_update(config, *, mesh, rows, micro_batches, devices=8):
    """(parameters before, parameters after one step of SGD, metrics)."""
    trees, model = prepared(config.soft_prompt.tokens)
    mesh = sharding.make_mesh(mesh, jax.devices()[:devices])
    parts = make_parameters(config, model)
    parts = jax.device_put(parts, sharding.state_sharding(mesh, parts))
    before = jax.device_get(parts)
    transform = optax.sgd(0.1)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), parts)
    state = train_step.initialize_state(mesh, parts.trained, transform, parts.frozen)
    step = train_step.make_train_step(model, transform, mesh, compute_dtype=jnp.float32, remat="dots", shapes=shapes)
    plan = batches.Plan(trees, max_length=256, rows=rows, micro_batches=micro_batches, seed=0)
    batch = plan.batch(0).map(lambda array: jax.device_put(array, sharding.batch_sharding(mesh)))
    state, metrics = step(state, batch)
    return before, jax.device_get(trainable.Parameters(state.trained, state.frozen)), jax.device_get(metrics)


class TrainedTest(parameterized.TestCase):
    @parameterized.parameters(
        *((kind, "chatml") for kind in sorted(_KINDS)),
        *((kind, "qwen3") for kind in ("full", "lora", "soft prompt and lora")),
    )
    @pytest.mark.quick_every(9)  # the last, whose template strips reasoning
    def test_one_pass_equals_k_passes(self, kind, family):
        tokenizer = chat_templates.train_tokenizer(family)
        model = tiny.config(len(tokenizer))
        parts = make_parameters(_KINDS[kind], model)
        dialogues = [*agreement_test.dialogues(), *([message_trees_test.random_tree(0)] if family == "chatml" else [])]
        outcome = agreement.compare(dialogues, Renderer(tokenizer), model, parts, max_length=768)
        self.assertTrue(outcome.passed, {k: v for k, v in outcome.findings.items() if v.beyond})
        self.assertGreater(outcome.responses, 5)

    @parameterized.parameters(*sorted(_KINDS))
    @pytest.mark.full
    def test_any_split_gives_the_same_update_and_frozen_parameters_keep_their_bits(self, kind):
        before, after, metrics = one_update(
            _KINDS[kind], mesh=MeshConfig(data=2, fsdp=2, tensor=2), rows=4, micro_batches=2
        )
        _, others, other_metrics = one_update(_KINDS[kind], mesh=MeshConfig(), rows=8, micro_batches=1, devices=1)
        jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
        for leaf, other in zip(jax.tree.leaves(before.trained), jax.tree.leaves(after.trained), strict=True):
            self.assertFalse(np.array_equal(leaf, other))
        np.testing.assert_allclose(metrics.loss, other_metrics.loss, rtol=1e-5)
        updates, other_updates = (jax.tree.map(np.subtract, tree.trained, before.trained) for tree in (after, others))
        self.assertLess(tiny.largest_difference(updates, other_updates), 1e-4)

    @parameterized.parameters(*sorted(_KINDS))
    def test_packing_changes_nothing_and_each_shape_is_compiled_once(self, kind):
        trees, model = prepared(_KINDS[kind].soft_prompt.tokens)
        parts = make_parameters(_KINDS[kind], model)
        transform = agreement._keep_gradient()
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), parts)
        state = train_step.initialize_state(mesh, parts.trained, transform, parts.frozen)
        step = train_step.make_train_step(
            model, transform, mesh, compute_dtype=jnp.float32, remat="dots", shapes=shapes
        )
        sums = []
        for rows in ([[0, 1, 2]], [[0], [1], [2]]):
            loss, total = 0.0, 0.0
            gradient = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes.trained)
            for row in rows:
                batch = batches.fill_rows(trees, [row], max_length=256).map(lambda array: array[None])
                weight = float(batch.weight.sum())
                state, metrics = step(state, batch)
                loss += weight * float(metrics.loss)
                gradient = jax.tree.map(
                    lambda total, leaf, weight=weight: total + weight * np.asarray(leaf),
                    gradient,
                    state.optimizer_state,
                )
                total += weight
            sums.append((loss / total, gradient))
        np.testing.assert_allclose(sums[0][0], sums[1][0], rtol=1e-5)
        self.assertLess(tiny.largest_difference(sums[0][1], sums[1][1]), 1e-4)
        self.assertEqual(step._cache_size(), 1)

    @parameterized.parameters(*sorted(_KINDS))
    @pytest.mark.full
    def test_cache_gives_the_logits_of_the_full_forward_pass(self, kind):
        trees, model = prepared(_KINDS[kind].soft_prompt.tokens)
        parameters = parameter_trees.merge(*make_parameters(_KINDS[kind], model))
        tokens = trees.tree(0).tokens[:40].tolist()
        length = jnp.full((1, len(tokens)), len(tokens), jnp.int32)
        position = jnp.arange(len(tokens), dtype=jnp.int32)[None]
        hidden = decoder.hidden_states(model, parameters, jnp.asarray(tokens)[None], position, length)
        logits = hidden[0] @ decoder.unembedding(model, parameters).T
        session = generation.Session(model, parameters)
        for end in (17, 18, 40):
            np.testing.assert_allclose(session.read(tokens[:end]), logits[end - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.full
class RunTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (
            "lora_on_nf4",
            {"lora": LoraConfig(rank=4, dropout=0.1, learning_rate_ratio=4.0), "frozen_dtype": "nf4"},
            {"ema_decay": 0.9},
        ),
        ("muon", {"freeze": ("embedding",)}, {"name": "muon"}),
        ("adafactor", {}, {"name": "adafactor", "moments_dtype": "bfloat16"}),
        (
            "soft_prompt",
            {"soft_prompt": SoftPromptConfig(tokens=4, init="text", text="Be brief.")},
            {"weight_decay": 0.1, "moments_dtype": "bfloat16"},
        ),
    )
    def test_run_that_was_stopped_ends_in_the_same_bits_and_leaves_what_is_frozen(self, changes, optimizer):
        self.enter_context(tiny.shared_programs())
        directory = pathlib.Path(self.create_tempdir().full_path)
        config = tiny.run_config(directory, steps=4, **changes)
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **optimizer))
        console = rich.console.Console(file=io.StringIO())
        run.run(config, directory / "whole", console=console)
        evaluate = loop._evaluate

        def evaluate_and_stop(run, step, *rest):
            evaluate(run, step, *rest)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        with mock.patch.object(loop, "_evaluate", evaluate_and_stop), self.assertRaises(StoppedError):
            run.run(config, directory / "run", console=console)
        run.run(config, directory / "run", console=console)
        records = [
            json.loads((directory / name / "checkpoints" / "4" / "record" / "metadata").read_text(encoding="utf-8"))
            for name in ("whole", "run")
        ]
        self.assertEqual(*records)
        first = json.loads(
            (directory / "whole" / "checkpoints" / "2" / "record" / "metadata").read_text(encoding="utf-8")
        )
        self.assertEqual(first["frozen"], records[0]["frozen"])
        self.assertNotEqual(first["trained"], records[0]["trained"])


if __name__ == "__main__":
    absltest.main()
