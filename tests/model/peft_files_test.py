"""Adapters in PEFT's format: PEFT's own give its logits, ours are read back, and what is not supported is named.

The other direction was checked once with peft 0.21.2, torch 2.13 and transformers 5.24 in float32: the directories of
`RoundTripTest`, written for the models of tests/references, open in `PeftModel.from_pretrained` and give our logits to
1e-5 of the largest, and so does a reader that adds lora_alpha / r * B A and knows no other field (at most 4.0e-5 where
logits reach 9.9). So do adapters of all matrices, experts included, and of some of those that a module holds, of
phi3_plain, granitemoehybrid, qwen3_moe, glm4_moe and gpt_oss (at most 9.5e-6 where logits reach 4.1). Soft prompts that
`write_prompt` has written give our logits to 4e-6.
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.model import adapters, decoder, model_files, parameter_trees, peft_files, peft_reading, pretrained
from dialog_jax.model.decoder_config import Experts
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from tests.training import tiny

FULL_PARAMETERS = ("experts", "experts_transposed", "experts_down")  # of the full tier: see tests/conftest.py

_REFERENCES = pathlib.Path(__file__).parents[1] / "references"
_EVERYWHERE = ("all-linear", "embed_tokens", "lm_head")
_MODEL = tiny.config(96, tie_embeddings=False)
_OF_EXPERTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")
# Models of which a module of transformers holds several matrices.
_JOINED = (
    tiny.config(96, family="phi3", tie_embeddings=False),
    tiny.config(96, family="granitemoehybrid", tie_embeddings=False),
    tiny.config(
        96,
        family="glm4_moe",
        layers=3,
        tie_embeddings=False,
        experts=Experts(count=4, active=2, width=24, dense_layers=(1,), shared_width=24, scoring="sigmoid"),
    ),
    tiny.config(
        96,
        family="gpt_oss",
        tie_embeddings=False,
        experts=Experts(count=3, active=2, width=24, scoring="softmax_of_top", biases=True, clamp=7.0, gate_slope=1.7),
    ),
)


def compute_logits(model, parameters, tokens):
    length = tokens.shape[1]
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    hidden = decoder.hidden_states(model, parameters, tokens, position, jnp.full(tokens.shape, length, jnp.int32))
    return hidden @ decoder.unembedding(model, parameters).T


def draw_adapter(lora, model=_MODEL, seed=0):
    """(scales, random factors) of a config."""
    scales = adapters.find_scales(model, lora)
    rng = np.random.default_rng(seed)
    shapes = adapters.abstract_factors(model, scales)
    return scales, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def list_updates(scales, factors):
    """{path: scale * A B of each layer, float64}."""
    flat = parameter_trees.flatten(factors)
    updates = {}
    for path, scale in scales.items():
        a, b = (np.float64(flat[f"{path}/{name}"]) for name in ("lora_a", "lora_b"))
        experts = (1,) * (a.ndim - 1 - scale.ndim)
        wide = np.float64(scale).reshape(*scale.shape[:-1], *experts, scale.shape[-1])
        updates[path] = np.einsum("...ir,...r,...ro->...io", a, wide, b)
    return updates


def assert_logits_equal(logits, reference):
    """Within 1e-5 of the largest."""
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


class ReferenceTest(parameterized.TestCase):
    @parameterized.parameters("patterns", "rslora", "tied", "fused", "experts", "experts_transposed", "experts_down")
    def test_adapter_of_peft_gives_its_logits(self, name):
        directory = _REFERENCES / f"peft_{name}"
        reference = np.load(directory / "reference.npz")
        base = _REFERENCES / str(reference["base"])
        model = pretrained.load_config(base)
        adapter = peft_reading.read_adapter(directory, model, base=base)
        own = adapters.attach_scales(pretrained.load_parameters(base, model), adapter.scales)
        parameters = jax.tree.map(jnp.asarray, parameter_trees.merge(own, adapter.factors))
        tokens = jnp.asarray(reference["tokens"])
        with jax.default_matmul_precision("highest"):
            logits = compute_logits(model, parameters, tokens)
        assert_logits_equal(logits, reference["logits"])

    @parameterized.parameters("prompt_llama", "prompt_qwen3")
    def test_soft_prompt_of_peft_gives_its_logits(self, name):
        directory = _REFERENCES / f"peft_{name}"
        reference = np.load(directory / "reference.npz")
        base = _REFERENCES / str(reference["base"])
        model = pretrained.load_config(base)
        prompt = peft_reading.read_adapter(directory, model, base=base).soft_prompt
        parameters = pretrained.load_parameters(base, model) | {decoder.SOFT_PROMPT: jnp.asarray(prompt)}
        virtual = VirtualTokens(model.vocab_size, len(prompt))
        tokens = jnp.asarray(np.stack([virtual.prepend(row) for row in reference["tokens"]]))
        with jax.default_matmul_precision("highest"):
            logits = compute_logits(model, parameters, tokens)[:, len(prompt) :]
        assert_logits_equal(logits, reference["logits"])

    def test_embeddings_that_peft_saves_must_be_those_of_the_model(self):
        directory = pathlib.Path(self.create_tempdir().full_path)
        base, other = _REFERENCES / "tiny_qwen3", directory / "other"
        model = pretrained.load_config(base)
        shutil.copytree(base, other)
        tensors = safetensors.numpy.load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + np.float32(1e-3)
        safetensors.numpy.save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        with self.assertRaisesRegex(UserError, "lm_head.base_layer.weight is not the model's own"):
            peft_reading.read_adapter(_REFERENCES / "peft_rslora", model, base=other)

    def test_adapter_of_another_model_is_refused(self):
        with self.assertRaisesRegex(UserError, r"q_proj have shapes .* needed. Name the model"):
            peft_reading.read_adapter(_REFERENCES / "peft_patterns", _MODEL)
        with self.assertRaisesRegex(UserError, r"prompt_embeddings has shape \[7, 48\].*width is 32"):
            peft_reading.read_adapter(_REFERENCES / "peft_prompt_llama", _MODEL)
        one_layer = tiny.config(131, width=48, layers=1, head_dim=20, feed_forward=80)
        with self.assertRaisesRegex(UserError, r"tensor model.layers.1.* is of no matrix of this model \(8 in all\)"):
            peft_reading.read_adapter(_REFERENCES / "peft_patterns", one_layer)


class RoundTripTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    @parameterized.product(
        lora=(
            LoraConfig(rank=3, alpha=5.0, targets=_EVERYWHERE),
            LoraConfig(rank=2, alpha=3.0, rslora=True, targets=("q_proj", "layers.1.mlp.up_proj")),
            LoraConfig(
                rank=2,
                targets=("all-linear", "embed_tokens"),
                rank_pattern={r"layers\.1\.self_attn\.q_proj": 5, "up_proj": 1},
                alpha_pattern={"layers.0.*": 9.0},
            ),
        ),
        wrapped=(False, True),
    )
    def test_what_is_written_is_read_with_one_rank_and_the_same_updates(self, lora, wrapped):
        scales, factors = draw_adapter(lora)
        peft_files.write_lora(self.directory, _MODEL, scales, factors, base_name="some", wrapped=wrapped)
        adapter = peft_reading.read_adapter(self.directory, _MODEL)
        expected, updates = list_updates(scales, factors), list_updates(adapter.scales, adapter.factors)
        self.assertEqual(updates.keys(), expected.keys())
        for path, update in updates.items():
            np.testing.assert_allclose(update, expected[path], rtol=1e-5, atol=1e-5)
        self.assertEqual({float(s) for scale in adapter.scales.values() for s in scale.flat} - {0.0}, {1.0})
        fields = json.loads((self.directory / peft_files.CONFIG).read_text())
        self.assertEqual(fields["r"], fields["lora_alpha"])
        self.assertFalse(fields["rank_pattern"] or fields["alpha_pattern"] or fields["use_rslora"])

    @parameterized.product(
        model=_JOINED,
        lora=(
            LoraConfig(rank=2, alpha=2.0, targets=(*_EVERYWHERE, *_OF_EXPERTS)),
            LoraConfig(
                rank=2,
                alpha=2.0,
                targets=("q_proj", "o_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.up_proj", "experts.up_proj"),
                rank_pattern={"layers.1.self_attn.q_proj": 3},
                alpha_pattern={"layers.1.self_attn.q_proj": 3},
            ),
        ),
    )
    def test_parts_of_a_module_are_read_as_the_arrays_that_were_written(self, model, lora):
        absent = "experts" if not model.experts else "layers.1.mlp" if not model.dense_layers else "none"
        lora = dataclasses.replace(lora, targets=tuple(target for target in lora.targets if absent not in target))
        scales, factors = draw_adapter(lora, model)
        peft_files.write_lora(self.directory, model, scales, factors, base_name="some")
        adapter = peft_reading.read_adapter(self.directory, model)
        self.assertEqual(adapter.scales.keys(), scales.keys())
        read, written = parameter_trees.flatten(adapter.factors), parameter_trees.flatten(factors)
        for path, scale in scales.items():
            np.testing.assert_array_equal(adapter.scales[path], scale)
            used = (scale > 0).reshape(*scale.shape[:-1], *(1,) * (written[f"{path}/lora_a"].ndim - scale.ndim), -1)
            np.testing.assert_array_equal(read[f"{path}/lora_a"], written[f"{path}/lora_a"] * used)
            np.testing.assert_array_equal(read[f"{path}/lora_b"], written[f"{path}/lora_b"] * used.swapaxes(-1, -2))

    def test_experts_with_names_of_their_own_are_read_as_those_of_one_parameter(self):
        model = _JOINED[2]
        scales, factors = draw_adapter(LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "experts.up_proj")), model)
        peft_files.write_lora(self.directory, model, scales, factors, base_name="some")
        expected = list_updates(scales, factors)
        (self.directory / peft_files.CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]})
        )
        flat = parameter_trees.flatten(factors)
        tensors = {}
        for path, place in (("attention/w_query", "self_attn.q_proj"), ("experts/w_up", "mlp.experts.{}.up_proj")):
            for factor in ("A", "B"):
                for index in np.ndindex(flat[f"layers/{path}/lora_a"].shape[:-2]):
                    layer, *expert = index
                    layer = model.sparse_layers[layer] if expert else layer
                    name = f"base_model.model.model.layers.{layer}.{place.format(*expert)}.lora_{factor}.weight"
                    tensors[name] = np.ascontiguousarray(flat[f"layers/{path}/lora_{factor.lower()}"][index].T)
        safetensors.numpy.save_file(tensors, self.directory / peft_files.WEIGHTS)
        adapter = peft_reading.read_adapter(self.directory, model)
        updates = list_updates(adapter.scales, adapter.factors)
        self.assertEqual(updates.keys(), expected.keys())
        for path, update in updates.items():
            np.testing.assert_allclose(update, expected[path], rtol=1e-6)
        del tensors[next(name for name in tensors if "experts.3." in name and "lora_A" in name)]
        safetensors.numpy.save_file(tensors, self.directory / peft_files.WEIGHTS)
        with self.assertRaisesRegex(UserError, "is there without its other factor"):
            peft_reading.read_adapter(self.directory, model)
        tensors = {name: tensor for name, tensor in tensors.items() if ".experts.3." not in name}
        safetensors.numpy.save_file(tensors, self.directory / peft_files.WEIGHTS)
        with self.assertRaisesRegex(
            UserError, r"experts\.3\.up_proj has no factors, and other experts of its layer have"
        ):
            peft_reading.read_adapter(self.directory, model)

    def test_update_of_a_joined_module_is_that_of_its_parts(self):
        model = _JOINED[0]
        lora = LoraConfig(rank=2, alpha=5.0, targets=("q_proj", "v_proj"), rank_pattern={"layers.1.*v_proj": 3})
        scales, factors = draw_adapter(lora, model)
        peft_files.write_lora(self.directory, model, scales, factors, base_name="some")
        tensors = safetensors.numpy.load_file(self.directory / peft_files.WEIGHTS)
        fields = json.loads((self.directory / peft_files.CONFIG).read_text())
        self.assertEqual((fields["r"], fields["lora_alpha"], fields["target_modules"]), (5, 5, ["qkv_proj"]))
        updates = list_updates(scales, factors)
        for layer in range(2):
            a, b = (
                np.float64(tensors[f"base_model.model.model.layers.{layer}.self_attn.qkv_proj.lora_{name}.weight"])
                for name in "AB"
            )
            queries, values = (updates[f"layers/attention/w_{name}"][layer].T for name in ("query", "value"))
            expected = np.concatenate([queries, np.zeros((16, 32)), values])
            np.testing.assert_allclose(b @ a, expected, rtol=1e-5, atol=1e-5)

    def test_parts_have_all_columns_of_a_module_before_training(self):
        model = _JOINED[0]
        scales, factors = draw_adapter(LoraConfig(rank=2, alpha=2.0, targets=("q_proj",)), model)
        peft_files.write_lora(self.directory, model, scales, factors, base_name="some")
        tensors = safetensors.numpy.load_file(self.directory / peft_files.WEIGHTS)
        zeros = {name: tensor * (".lora_A." in name) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(zeros, self.directory / peft_files.WEIGHTS)
        adapter = peft_reading.read_adapter(self.directory, model)
        self.assertEqual({path: scale.shape for path, scale in adapter.scales.items()}, {
            f"layers/attention/w_{name}": (2, 2) for name in ("query", "key", "value")
        })  # fmt: skip

    def test_names_are_those_of_the_class_that_serves_the_model(self):
        scales, factors = draw_adapter(LoraConfig(rank=1, targets=("layers.1.mlp.up_proj", "lm_head")))
        for wrapped, prefix in ((False, "model."), (True, "model.language_model.")):
            directory = self.directory / str(wrapped)
            directory.mkdir()
            peft_files.write_lora(directory, _MODEL, scales, factors, base_name="some", wrapped=wrapped)
            self.assertCountEqual(
                safetensors.numpy.load_file(directory / peft_files.WEIGHTS),
                [
                    f"base_model.model.{module}.lora_{factor}.weight"
                    for module in (f"{prefix}layers.1.mlp.up_proj", "lm_head")
                    for factor in "AB"
                ],
            )
            fields = json.loads((directory / peft_files.CONFIG).read_text())
            self.assertEqual(fields["target_modules"], ["lm_head", f"{prefix}layers.1.mlp.up_proj"])

    def test_targets_in_a_model_that_reads_images_are_none_of_its_other_parts(self):
        scales, factors = draw_adapter(LoraConfig(rank=1))
        for wrapped, number in ((False, 7), (True, 14)):  # ends of names; the modules of two layers
            directory = self.directory / str(wrapped)
            directory.mkdir()
            peft_files.write_lora(directory, _MODEL, scales, factors, base_name="some", wrapped=wrapped)
            targets = json.loads((directory / peft_files.CONFIG).read_text())["target_modules"]
            self.assertLen(targets, number)
            self.assertEqual({target.startswith("model.language_model.") for target in targets}, {wrapped})

    @parameterized.parameters("bfloat16", "float16")
    def test_type_of_the_factors_can_be_chosen(self, dtype):
        scales, factors = draw_adapter(LoraConfig(rank=2, alpha=2.0, targets=("q_proj",)))
        peft_files.write_lora(self.directory, _MODEL, scales, factors, base_name="some", dtype=dtype)
        read = peft_reading.read_adapter(self.directory, _MODEL).factors
        jax.tree.map(
            np.testing.assert_array_equal, read, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), factors)
        )

    def test_soft_prompt_beside_lora_is_read_with_it(self):
        scales, factors = draw_adapter(LoraConfig(rank=2, targets=("q_proj",)))
        prompt = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
        peft_files.write_lora(self.directory, _MODEL, scales, factors, base_name="some")
        (self.directory / peft_files.PROMPT).mkdir()
        peft_files.write_prompt(
            self.directory / peft_files.PROMPT, _MODEL, prompt, base_name="some", init="TEXT", text="Be kind."
        )
        adapter = peft_reading.read_adapter(self.directory, _MODEL)
        np.testing.assert_array_equal(adapter.soft_prompt, prompt)
        self.assertEqual(list(adapter.scales), ["layers/attention/w_query"])

    def test_hash_is_of_the_content(self):
        scales, factors = draw_adapter(LoraConfig(rank=2, targets=("q_proj",)))
        hashes = []
        for name, scale in (("a", 1), ("b", 1), ("c", 2)):
            (self.directory / name).mkdir()
            changed = jax.tree.map(lambda x, scale=scale: x * scale, factors)
            peft_files.write_lora(self.directory / name, _MODEL, scales, changed, base_name="some")
            hashes.append(peft_reading.fingerprint(self.directory / name))
        self.assertEqual(hashes[0], hashes[1])
        self.assertNotEqual(hashes[0], hashes[2])


class RefusedTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        scales, factors = draw_adapter(LoraConfig(rank=2, targets=("q_proj",)))
        peft_files.write_lora(self.directory, _MODEL, scales, factors, base_name="some")
        self.config, self.weights = self.directory / peft_files.CONFIG, self.directory / peft_files.WEIGHTS

    def change(self, **fields):
        self.config.write_text(json.dumps(json.loads(self.config.read_text()) | fields))

    def change_tensors(self, change):
        tensors = safetensors.numpy.load_file(self.weights)
        change(tensors)
        safetensors.numpy.save_file(tensors, self.weights)

    @parameterized.parameters(
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"trainable_token_indices": [1, 2]},
        {"alora_invocation_tokens": [3]},
        {"layer_replication": [[0, 2]]},
        {"megatron_config": {"a": 1}},
        {"ensure_weight_tying": True},
        {"kasa_config": {"a": 1}},
        {"a_feature_of_next_year": {"a": 1}},
    )
    def test_what_is_not_supported_is_named(self, **fields):
        peft_reading.read_adapter(self.directory, _MODEL)
        self.change(**fields)
        ((name, value),) = fields.items()
        with self.assertRaisesRegex(UserError, f"{name} is .*not supported") as raised:
            peft_reading.read_adapter(self.directory, _MODEL)
        self.assertIn(repr(value), str(raised.exception))

    @parameterized.parameters(
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'.*Convert it"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA and PROMPT_TUNING are supported"),
        ({"r": None}, "r is None; a number is needed"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; a number is needed"),
        ({"lora_alpha": -1}, "adapter_config.json: lora.alpha is -1"),
        ({"rank_pattern": {"(": 2}}, "adapter_config.json: lora.rank_pattern.*no regular expression"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts'; a list of names is needed"),
        ({"r": 3}, "rank of model.layers.0.self_attn.q_proj is 2 in .*safetensors and 3 in"),
    )
    def test_values_that_are_wrong_are_named(self, fields, message):
        self.change(**fields)
        with self.assertRaisesRegex(UserError, message):
            peft_reading.read_adapter(self.directory, _MODEL)

    @parameterized.parameters(
        (lambda tensors: tensors.clear(), "no factors of a matrix of this model; its target_modules are .'q_proj'"),
        (lambda tensors: tensors.pop(min(tensors)), "is there without its other factor"),
        (lambda tensors: tensors.update(extra=np.ones(3, np.float32)), "tensor extra is of no matrix"),
        (lambda tensors: tensors.update({max(tensors): np.ones((4, 4), np.int8)}), "is int8; float32"),
        (lambda tensors: tensors.update({max(tensors): np.ones(4, np.float32)}), "not those of matrices"),
    )
    def test_tensors_that_are_wrong_are_named(self, change, message):
        self.change_tensors(change)
        with self.assertRaisesRegex(UserError, message):
            peft_reading.read_adapter(self.directory, _MODEL)

    def test_missing_and_damaged_files_are_named(self):
        self.weights.write_bytes(self.weights.read_bytes()[:-40])
        with self.assertRaisesRegex(UserError, "adapter_model.safetensors is no safetensors file, or is cut off"):
            peft_reading.read_adapter(self.directory, _MODEL)
        self.weights.unlink()
        with self.assertRaisesRegex(UserError, "adapter_model.safetensors: no such file"):
            peft_reading.read_adapter(self.directory, _MODEL)
        with self.assertRaisesRegex(UserError, "adapter_config.json is missing"):
            peft_reading.read_adapter(self.directory.parent, _MODEL)

    def test_adapter_of_a_model_with_another_hash_is_refused(self):
        base = _REFERENCES / "tiny_llama"
        origin = self.directory / peft_files.ORIGIN
        origin.write_text(json.dumps({"base": model_files.fingerprint(base)}))
        peft_reading.read_adapter(self.directory, _MODEL, base=base)
        with self.assertRaisesRegex(UserError, "trained on another model than tiny_qwen3"):
            peft_reading.read_adapter(self.directory, _MODEL, base=_REFERENCES / "tiny_qwen3")


if __name__ == "__main__":
    absltest.main()
