import dataclasses
import json
import pathlib
import resource
import shutil
import tempfile
import tracemalloc
from unittest import mock

import gguf
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers
from absl.testing import absltest, parameterized
from hypothesis import strategies

from dialog_jax.formats import gguf_file, tokenizer_files
from dialog_jax.model import decoder, gguf_config, model_files, parameter_trees, pretrained, quantization, saving
from dialog_jax.training import sharding
from dialog_jax.training.config import MeshConfig
from tests.training import tiny

_REFERENCES = pathlib.Path(__file__).parents[1] / "references"
_SMOLLM2 = pathlib.Path(__file__).parents[2] / "assets" / "smollm2-135m-instruct"
_TINY_CONFIG = tiny.config(64)
_TINY = ("llama", "llama_bias", "qwen2", "qwen3")


def _logits(config, parameters, tokens):
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    subtree_end = jnp.full(tokens.shape, tokens.shape[1])
    hidden = decoder.hidden_states(config, parameters, jnp.asarray(tokens), position, subtree_end)
    return np.asarray(jnp.einsum("btd,vd->btv", hidden, decoder.unembedding(config, parameters)))


def _assert_equal_to_rounding(got, reference):
    """The norm of the difference, relative to the reference's.

    On AVX2 and SSE4.2, with and without XLA's optimizations, it is 5e-7 to 9e-7. For SmolLM2, rope_theta off by 0.1%
    gives 4e-5, and norm_epsilon off by 10% gives 1.6e-5.
    """
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    np.testing.assert_array_less(np.linalg.norm(got - reference) / np.linalg.norm(reference), 4e-6)


def _load(directory):
    config = pretrained.load_config(directory)
    return config, pretrained.load_parameters(directory, config)


def _assert_equal_bits(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), first, second)


class _TemporaryTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.directory = pathlib.Path(temporary.name)

    def copy(self, name="llama"):
        shutil.copytree(_REFERENCES / f"tiny_{name}", self.directory / name)
        return self.directory / name

    def edit_config(self, directory, **fields):
        config = json.loads((directory / "config.json").read_text()) | fields
        (directory / "config.json").write_text(json.dumps(config))

    def edit_tensors(self, directory, edit):
        tensors = safetensors.numpy.load_file(directory / "model.safetensors")
        edit(tensors)
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")

    def assert_load_fails(self, directory, *patterns):
        with self.assertRaises(ValueError) as caught:
            _load(directory)
        for pattern in patterns:
            self.assertRegex(str(caught.exception), pattern)

    def assert_damage_is_an_error(self, file, content, header):
        """Whatever becomes of the header, the model loads or a ValueError names it; soon, in little memory."""
        place = strategies.integers(0, header - 1)
        byte = strategies.tuples(place, strategies.binary(min_size=1, max_size=1))
        number = strategies.tuples(
            place,
            strategies.sampled_from([2**63 - 1, 2**64 - 1, 2**32, 2**31, 10**9, 0]).map(
                lambda n: n.to_bytes(8, "little")
            ),
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        @hypothesis.given(
            strategies.lists(byte | number, max_size=3), strategies.integers(0, len(content)) | strategies.none()
        )
        @hypothesis.settings(max_examples=120, deadline=10_000, derandomize=True)
        def holds(written, kept):
            damaged = bytearray(content)
            for at, what in written:
                damaged[at : at + len(what)] = what
            file.write_bytes(damaged[:kept])
            try:
                _load(file if file.suffix == ".gguf" else file.parent)
            except ValueError as error:
                self.assertRegex(str(error), file.parent.name if file.suffix != ".gguf" else file.name)

        holds()
        self.assertLess(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 1 << 20)  # KiB


class ReferenceTest(parameterized.TestCase):
    @parameterized.parameters(*_TINY)
    def test_tiny_models_give_the_logits_of_transformers(self, name):
        reference = np.load(_REFERENCES / f"tiny_{name}" / "reference.npz")
        got = _logits(*_load(_REFERENCES / f"tiny_{name}"), reference["tokens"])
        _assert_equal_to_rounding(got, reference["logits"])

    def test_smollm2_gives_the_logits_of_transformers(self):
        if not (_SMOLLM2 / "config.json").exists():
            self.fail(f"{_SMOLLM2} is missing: run scripts/prepare_demo.py, or scripts/test.sh, which does")
        reference = np.load(_REFERENCES / "smollm2.npz")
        config, parameters = _load(_SMOLLM2)
        self.assertEqual(sum(leaf.size for leaf in jax.tree.leaves(parameters)), 134_515_008)
        got = _logits(config, parameters, reference["tokens"][None])[0]
        _assert_equal_to_rounding(got[:, reference["vocabulary"]], reference["logits"])
        wide = got.astype(np.float64)
        logsumexp = np.log(np.sum(np.exp(wide - wide.max(-1, keepdims=True)), -1)) + wide.max(-1)
        _assert_equal_to_rounding(logsumexp, reference["logsumexp"])


class ConfigTest(_TemporaryTest):
    def test_config_of_transformers_5_and_before_read_the_same(self):
        directory = self.copy()
        new = pretrained.load_config(directory)
        fields = json.loads((directory / "config.json").read_text())
        scaling = fields.pop("rope_parameters")
        theta = scaling.pop("rope_theta")
        for kind in ("rope_type", "type"):
            old = {name: value for name, value in scaling.items() if name != "rope_type"} | {kind: "llama3"}
            fields |= {"rope_theta": theta, "rope_scaling": old}
            (directory / "config.json").write_text(json.dumps(fields))
            self.assertEqual(pretrained.load_config(directory), new)
        self.assertEqual(new.rotary[0].scaling.original_max_length, 32)
        self.assertEqual((new.head_dim, new.width, new.heads, new.kv_heads), (20, 48, 4, 2))

    def test_config_defaults_are_those_of_each_family(self):
        directory = self.copy("qwen2")
        got = pretrained.load_config(directory)
        self.assertEqual((got.head_dim, got.qkv_bias, got.output_bias, got.rotary[0].theta), (12, True, False, 1e6))
        self.assertTrue(pretrained.load_config(_REFERENCES / "tiny_llama_bias").output_bias)

    @parameterized.parameters(
        dict(model_type="gpt_neox"),
        dict(model_type=None),
        dict(hidden_act="gelu"),
        dict(mlp_bias=True),
        dict(attention_dropout=0.1),
        dict(quantization_config={"quant_method": "fp8"}),
        dict(sliding_window=128),
        dict(use_sliding_window=True),
        dict(layer_types=["full_attention", "sliding_attention"]),
        dict(partial_rotary_factor=0.5),
        dict(hidden_size=None),
        dict(num_key_value_heads=3),
    )
    def test_config_unsupported_is_an_error_that_names_file_and_field(self, **fields):
        directory = self.copy()
        self.edit_config(directory, **fields)
        name = {"num_key_value_heads": "kv_heads"}.get(next(iter(fields)), next(iter(fields)))
        with self.assertRaisesRegex(ValueError, f"config.json.*{name}"):
            pretrained.load_config(directory)

    def test_config_with_unknown_rope_or_incomplete_scaling_is_an_error(self):
        directory = self.copy()
        self.edit_config(directory, rope_parameters={"rope_type": "cosine", "rope_theta": 1e4, "factor": 2.0})
        with self.assertRaisesRegex(ValueError, "rope_type is 'cosine'"):
            pretrained.load_config(directory)
        self.edit_config(directory, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0})
        with self.assertRaisesRegex(ValueError, "config.json.*low_freq_factor"):
            pretrained.load_config(directory)

    def test_config_sliding_window_that_is_off_is_no_error(self):
        directory = self.copy("qwen2")
        self.edit_config(directory, sliding_window=128, use_sliding_window=False)
        pretrained.load_config(directory)

    def test_config_missing_or_broken_is_an_error_that_names_the_file(self):
        with self.assertRaisesRegex(ValueError, "config.json does not exist"):
            pretrained.load_config(self.directory)
        for text in ("{", "[]"):
            (self.directory / "config.json").write_text(text)
            with self.assertRaisesRegex(ValueError, "config.json"):
                pretrained.load_config(self.directory)


class SaveTest(_TemporaryTest):
    @parameterized.parameters(*_TINY)
    def test_save_gives_back_the_same_tensors_and_config(self, name):
        config, parameters = _load(_REFERENCES / f"tiny_{name}")
        saving.save_pretrained(self.directory / "saved", config, parameters)
        self.assertEqual(pretrained.load_config(self.directory / "saved"), config)
        _assert_equal_bits(pretrained.load_parameters(self.directory / "saved", config), parameters)
        first = safetensors.numpy.load_file(_REFERENCES / f"tiny_{name}" / "model.safetensors")
        second = safetensors.numpy.load_file(self.directory / "saved" / "model.safetensors")
        self.assertEqual(first.keys(), second.keys())
        _assert_equal_bits(first, second)

    def test_save_in_shards_reads_back_the_same(self):
        config, parameters = _load(_REFERENCES / "tiny_qwen3")
        saved = self.directory / "saved"
        saving.save_pretrained(saved, config, parameters, shard_bytes=50_000)
        shards = sorted(file.name for file in saved.glob("*.safetensors"))
        index = json.loads((saved / "model.safetensors.index.json").read_text())
        self.assertGreater(len(shards), 2)
        self.assertEqual(sorted(set(index["weight_map"].values())), shards)
        self.assertEqual(index["metadata"]["total_size"], 4 * sum(leaf.size for leaf in jax.tree.leaves(parameters)))
        self.assertLess(max((saved / shard).stat().st_size for shard in shards), 55_000)
        _assert_equal_bits(_load(saved)[1], parameters)

    def test_save_of_numbers_too_large_for_float16_is_an_error(self):
        config, parameters = _load(_REFERENCES / "tiny_qwen3")
        parameters["final_norm"] = parameters["final_norm"].at[0].set(1e5)
        with self.assertRaisesRegex(ValueError, "final_norm has numbers up to 1e.05, which are too large for float16"):
            saving.save_pretrained(self.directory / "saved", config, parameters, dtype="float16")
        self.assertEmpty(list(self.directory.iterdir()))

    def test_stop_tokens_replace_those_of_the_generation_config_only_if_they_differ(self):
        config, parameters = _load(_REFERENCES / "tiny_qwen3")
        for number, (fields, stop_tokens, expected) in enumerate(
            [
                ({"eos_token_id": 5}, {5}, 5),
                ({"eos_token_id": [7, 5]}, {5, 7}, [7, 5]),
                ({"eos_token_id": 5}, {5, 6}, [5, 6]),
            ]
        ):
            saved = self.directory / str(number)
            saving.save_pretrained(saved, config, parameters, generation=fields, stop_tokens=stop_tokens)
            got = json.loads((saved / "generation_config.json").read_text())
            self.assertEqual(got["eos_token_id"], expected)

    def test_licence_is_read_from_the_card_or_the_gguf_file(self):
        card = self.directory / "README.md"
        self.assertEqual(model_files.read_licence(self.directory), {})
        for text, expected in (
            ("---\nlicense: mit\n---\n# A", {"license": "mit"}),
            ("no front matter", {}),
            ("---\nlicense: [a: b: c\n---\n", {}),
            ("---\n- a\n---\n", {}),
        ):
            card.write_text(text)
            self.assertEqual(model_files.read_licence(self.directory), expected)
        file = self.directory / "a.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_license("apache-2.0")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        self.assertEqual(model_files.read_licence(file), {"license": "apache-2.0"})

    def test_save_into_a_directory_that_is_not_empty_is_an_error_and_leaves_it(self):
        config, parameters = _load(_REFERENCES / "tiny_qwen3")
        saved = self.directory / "saved"
        saving.save_pretrained(saved, config, parameters)
        with self.assertRaisesRegex(ValueError, "saved exists already; give a new directory"):
            saving.save_pretrained(saved, config, jax.tree.map(jnp.zeros_like, parameters))
        _assert_equal_bits(_load(saved)[1], parameters)

    def test_save_interrupted_leaves_no_model_and_is_no_obstacle(self):
        config, parameters = _load(_REFERENCES / "tiny_qwen3")
        saved = self.directory / "saved"

        stop = mock.patch.object(tokenizer_files, "save_tokenizer", side_effect=KeyboardInterrupt)
        with stop, self.assertRaises(KeyboardInterrupt):
            saving.save_pretrained(saved, config, parameters, tokenizer=object())
        self.assertFalse(saved.exists())
        saving.save_pretrained(saved, config, parameters)
        names = {file.name for file in saved.iterdir()}
        self.assertEqual(names, {"config.json", "generation_config.json", "model.safetensors"})
        self.assertEqual([file.name for file in self.directory.iterdir()], ["saved"])

    def test_save_with_parameters_of_another_config_is_an_error_and_writes_nothing(self):
        config, parameters = _load(_REFERENCES / "tiny_qwen3")
        with self.assertRaisesRegex(ValueError, "embedding"):
            saving.save_pretrained(self.directory / "saved", dataclasses.replace(config, vocab_size=5), parameters)
        with self.assertRaisesRegex(ValueError, "lm_head"):
            saving.save_pretrained(
                self.directory / "saved", dataclasses.replace(config, tie_embeddings=True), parameters
            )
        self.assertEmpty(list(self.directory.iterdir()))


class LoadTest(_TemporaryTest):
    @parameterized.parameters(ml_dtypes.bfloat16, np.float16)
    def test_load_of_half_precision_gives_float32_of_the_same_values(self, dtype):
        directory = self.copy()
        _, parameters = _load(directory)
        self.edit_tensors(directory, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
        needed = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), parameters)
        _assert_equal_bits(_load(directory)[1], needed)

    def test_load_places_each_parameter_where_it_is_told(self):
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        seen = {}

        def sharding(path, shape):
            seen[path] = shape
            axis = next((i for i, size in enumerate(shape) if size % 8 == 0), None)
            spec = [None] * len(shape)
            if axis is not None:
                spec[axis] = "fsdp"
            return jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

        config, plain = _load(_REFERENCES / "tiny_llama")
        placed = pretrained.load_parameters(_REFERENCES / "tiny_llama", config, sharding=sharding)
        _assert_equal_bits(placed, plain)
        weight = placed["layers"]["feed_forward"]["w_gate"]
        self.assertEqual(weight.sharding.spec, jax.sharding.PartitionSpec(None, "fsdp", None))
        self.assertEqual(seen["layers", "feed_forward", "w_gate"], (2, 48, 80))

    @parameterized.parameters(*quantization.KINDS)
    def test_load_quantized_gives_the_codes_of_the_loaded_matrices_on_any_mesh(self, kind):
        config, plain = _load(_REFERENCES / "tiny_llama")
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
        errors = {}
        for place in (None, lambda path, shape: sharding.parameter_sharding(mesh, path, shape)):
            loaded = pretrained.load_parameters(
                _REFERENCES / "tiny_llama",
                config,
                sharding=place,
                find_kind=lambda path: kind if path == "layers/feed_forward/w_down" else "",
                report_error=errors.__setitem__,
            )
            codes = loaded["layers"]["feed_forward"].pop("w_down")
            w_down = plain["layers"]["feed_forward"]["w_down"]
            _assert_equal_bits(codes, tiny.quantize(kind, w_down))
            others = parameter_trees.split(plain, lambda path: not path.endswith("w_down"))[0]
            _assert_equal_bits(loaded, others)
        self.assertEqual(list(errors), [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)])
        _, error = quantization.quantize(kind, np.asarray(w_down[1]))
        self.assertEqual(errors["model.layers.1.mlp.down_proj.weight"], error)

    @parameterized.parameters(*quantization.KINDS)
    @pytest.mark.quick_every(2)
    def test_load_quantized_never_holds_the_matrices_as_they_are_published(self, kind):
        config = dataclasses.replace(_TINY_CONFIG, layers=16, width=128, feed_forward=512)
        saving.save_pretrained(self.directory / "deep", config, decoder.init_parameters(config, jax.random.key(0)))
        layer = 4 * 128 * 512
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        loaded = pretrained.load_parameters(
            self.directory / "deep", config, find_kind=lambda path: kind if "/w_" in path else ""
        )
        _, peak = tracemalloc.get_traced_memory()
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
        self.assertLess(peak, held + 8 * layer)  # of one published layer at a time and what is computed from it

    def test_load_quantized_of_weights_that_are_not_finite_is_an_error_that_names_them(self):
        directory = self.copy()
        self.edit_tensors(directory, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill(np.nan))
        config = pretrained.load_config(directory)
        for kind in quantization.KINDS:
            with self.assertRaisesRegex(
                ValueError, "model.layers.1.mlp.up_proj.weight has weights that are not finite"
            ):
                pretrained.load_parameters(directory, config, find_kind=lambda path: kind if "/w_" in path else "")  # noqa: B023

    def test_load_with_missing_tensor_is_an_error_that_names_it(self):
        directory = self.copy()
        self.edit_tensors(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        self.assert_load_fails(directory, "llama: ", r"model\.layers\.1\.mlp\.up_proj\.weight is missing", "again")

    def test_load_with_unexpected_tensor_is_an_error_that_names_it(self):
        directory = self.copy()
        self.edit_tensors(directory, lambda tensors: tensors.update(extra=np.zeros(3, np.float32)))
        self.assert_load_fails(directory, "model.safetensors", "tensor extra")

    def test_load_ignores_a_copy_of_the_tied_matrix_and_old_rotary_buffers(self):
        directory = self.copy("qwen2")
        _, needed = _load(directory)

        def edit(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)

        self.edit_tensors(directory, edit)
        _assert_equal_bits(_load(directory)[1], needed)

    def test_load_of_a_tied_config_with_another_unembedding_does_not_tie(self):
        directory = self.copy("qwen2")
        tied, needed = _load(directory)
        self.assertTrue(tied.tie_embeddings)
        other = np.random.default_rng(0).normal(size=(tied.vocab_size, tied.width)).astype(np.float32)
        self.edit_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": other}))
        config, parameters = _load(directory)
        self.assertEqual(config, dataclasses.replace(tied, tie_embeddings=False))
        np.testing.assert_array_equal(parameters["lm_head"], other)
        _assert_equal_bits(parameters["embedding"], needed["embedding"])
        (note,) = model_files.describe_weights(directory, config).notes
        self.assertRegex(note, "config.json ties the embeddings, but lm_head.weight differs")
        self.assertEmpty(model_files.describe_weights(_REFERENCES / "tiny_qwen2", tied).notes)
        saving.save_pretrained(self.directory / "saved", config, parameters)
        self.assertFalse(json.loads((self.directory / "saved" / "config.json").read_text())["tie_word_embeddings"])
        _assert_equal_bits(_load(self.directory / "saved")[1], parameters)

    def test_load_of_a_tied_config_with_the_unembedding_alone_uses_it_twice(self):
        directory = self.copy("qwen2")
        _, needed = _load(directory)

        def edit(tensors):
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

        self.edit_tensors(directory, edit)
        _assert_equal_bits(_load(directory)[1], needed)

    @parameterized.parameters("", "module.model.", "base_model.model.model.", "transformer.", "_orig_mod.model.")
    def test_load_of_names_with_another_prefix_gives_the_same_parameters(self, prefix):
        for name in ("qwen2", "llama"):
            directory = self.copy(name)
            _, needed = _load(directory)
            outer = prefix.removesuffix("model.") if prefix.endswith(".model.") else ""

            def edit(tensors, outer=outer):
                for old in list(tensors):
                    new = f"{outer}{old}" if old == "lm_head.weight" else prefix + old.removeprefix("model.")
                    tensors[new] = tensors.pop(old)

            self.edit_tensors(directory, edit)
            _assert_equal_bits(_load(directory)[1], needed)

    def wrap(self, name, prefix, head, extra, **fields):
        """The tiny model as the decoder of a model of images and text."""
        directory = self.copy(name)

        def edit(tensors):
            for old in list(tensors):
                new = head if old == "lm_head.weight" else prefix + old.removeprefix("model.")
                tensors[new] = tensors.pop(old)
            tensors.update({key: np.zeros((2, 3), np.float32) for key in extra})

        self.edit_tensors(directory, edit)
        config = json.loads((directory / "config.json").read_text())
        text = config | fields.pop("text", {})
        (directory / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text} | fields))
        return directory

    @parameterized.parameters(
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("model.text_model.", "lm_head.weight"),
    )
    def test_load_of_a_wrapper_gives_its_decoder_and_a_note_of_the_rest(self, prefix, head):
        extra = ("vision_tower.encoder.layers.0.layer_norm1.weight", "vision_tower.head.bias", "projector.weight")
        for name in ("llama", "qwen2", "qwen3"):
            needed_config, needed = _load(_REFERENCES / f"tiny_{name}")
            directory = self.wrap(name, prefix, head, extra)
            config, parameters = _load(directory)
            self.assertEqual(config, needed_config)
            _assert_equal_bits(parameters, needed)
            (note,) = model_files.describe_weights(directory, config).notes
            self.assertRegex(
                note, r"^holds more than a language model: 3 tensors \(projector, vision_tower\) are not read"
            )

    def test_wrapper_has_the_defaults_of_transformers_and_says_what_it_wraps(self):
        for family in ("llama", "qwen2", "qwen3"):
            directory = self.directory / f"{family} alone"
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps({"text_config": {"model_type": family}}))
            config, theirs = pretrained.load_config(directory), transformers.CONFIG_MAPPING[family]()
            self.assertEqual(
                (config.vocab_size, config.width, config.layers, config.heads, config.kv_heads, config.feed_forward),
                (
                    theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads,
                    theirs.num_key_value_heads, theirs.intermediate_size,
                ),
            )  # fmt: skip
            self.assertEqual((config.max_length, config.head_dim), (theirs.max_position_embeddings, 128))
            self.assertEqual(config.norm_epsilon, theirs.rms_norm_eps)
        directory = self.wrap("qwen3", "language_model.model.", "lm_head.weight", (), text={"model_type": "mamba"})
        with self.assertRaisesRegex(ValueError, "config.json: model_type is 'llava' with a text_config of .*'mamba'"):
            pretrained.load_config(directory)

    def test_wrapper_that_is_quantized_or_has_two_decoders_is_refused(self):
        directory = self.wrap("llama", "language_model.model.", "language_model.lm_head.weight", ())
        fields = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(fields | {"quantization_config": {"bits": 4}}))
        self.assert_load_fails(directory, "quantization_config is")
        (directory / "config.json").write_text(json.dumps(fields))
        extra = "second.language_model.layers.0.self_attn.o_proj.weight"
        self.edit_tensors(directory, lambda tensors: tensors.update({extra: np.zeros(3, np.float32)}))
        self.assert_load_fails(directory, "there are 2 decoders, .*'language_model.model.', 'second.language_model.'")

    def test_load_of_shards_with_other_names_gives_the_same_parameters(self):
        config, needed = _load(_REFERENCES / "tiny_qwen3")
        saved = self.directory / "saved"
        saving.save_pretrained(saved, config, needed, shard_bytes=100_000)
        (saved / "model.safetensors.index.json").rename(saved / "weights [1].safetensors.index.json")
        _assert_equal_bits(_load(saved)[1], needed)
        index = saved / "weights [1].safetensors.index.json"
        fields = json.loads(index.read_text())
        shards = sorted(set(fields["weight_map"].values()))
        for number, shard in enumerate(shards):
            (saved / shard).rename(saved / f"part {number}.bin")
        names = {shard: f"part {number}.bin" for number, shard in enumerate(shards)}
        weight_map = {name: names[shard] for name, shard in fields["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": weight_map}))
        _assert_equal_bits(_load(saved)[1], needed)

    def test_load_without_index_reads_one_file_or_all_numbered_ones(self):
        config, needed = _load(_REFERENCES / "tiny_qwen3")
        saved = self.directory / "saved"
        saving.save_pretrained(saved, config, needed, shard_bytes=100_000)
        (saved / "model.safetensors.index.json").unlink()
        _assert_equal_bits(_load(saved)[1], needed)
        shutil.copy(_REFERENCES / "tiny_qwen3" / "model.safetensors", saved / "other.safetensors")
        self.assert_load_fails(
            saved, "there is no model.safetensors.index.json; the directory has model-00001-of", "other"
        )
        for shard in saved.glob("model-*"):
            shard.unlink()
        _assert_equal_bits(_load(saved)[1], needed)
        shutil.copy(_REFERENCES / "tiny_qwen2" / "model.safetensors", saved / "more.safetensors")
        self.assert_load_fails(saved, "the directory has more.safetensors, other.safetensors")
        shutil.copy(saved / "other.safetensors", saved / "model.safetensors")  # as transformers, this one
        _assert_equal_bits(_load(saved)[1], needed)

    def test_added_rows_are_the_mean_of_the_others(self):
        for name in ("llama", "qwen2"):
            directory = _REFERENCES / f"tiny_{name}"
            config, needed = _load(directory)
            larger = dataclasses.replace(config, vocab_size=config.vocab_size + 3)
            parameters = pretrained.load_parameters(directory, larger, added_rows=3)
            for key in {"embedding", "lm_head"} & parameters.keys():
                rows = np.asarray(needed[key], np.float64)
                np.testing.assert_array_equal(parameters[key][:-3], needed[key])
                mean = sum(rows) / len(rows)
                np.testing.assert_allclose(parameters[key][-3:], np.stack([mean] * 3), rtol=1e-6, atol=1e-9)
        self.assertEqual(
            {"embedding", "lm_head"} & _load(_REFERENCES / "tiny_llama")[1].keys(), {"embedding", "lm_head"}
        )

    @parameterized.parameters((np.float32, "float32"), (np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16"))
    def test_type_of_the_weights_is_that_of_most_of_them(self, dtype, name):
        directory = self.copy()
        config = pretrained.load_config(directory)

        def edit(tensors):
            norms = {key: array for key, array in tensors.items() if array.ndim == 1}
            tensors.update({key: array.astype(dtype) for key, array in tensors.items()} | norms)

        self.edit_tensors(directory, edit)
        self.assertEqual(model_files.describe_weights(directory, config).dtype, name)

    def test_load_with_wrong_vocabulary_is_an_error_with_both_shapes(self):
        directory = self.copy()
        self.edit_config(directory, vocab_size=132)
        self.assert_load_fails(directory, "model.safetensors", "embed_tokens", r"\[131, 48\]", r"\[132, 48\]")

    def test_load_of_integer_tensors_is_an_error(self):
        directory = self.copy()
        self.edit_tensors(directory, lambda t: t.update({"model.norm.weight": np.ones(48, np.int8)}))
        self.assert_load_fails(directory, "model.norm.weight is int8")

    @parameterized.parameters(4, 5000, 200_000)
    def test_load_of_truncated_file_is_an_error_that_names_it(self, kept):
        directory = self.copy()
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        self.assert_load_fails(directory, "model.safetensors is not a complete safetensors file", "again")

    def test_load_of_flipped_or_missing_bytes_loads_or_is_an_error_that_names_it(self):
        file = self.copy() / "model.safetensors"
        content = file.read_bytes()
        self.assert_damage_is_an_error(file, content, 8 + int.from_bytes(content[:8], "little"))

    @parameterized.parameters(
        [{"data_offsets": [0, 1 << 40]}],
        [{"data_offsets": [-8, 0]}],
        [{"data_offsets": [0, 8]}],  # shared with another
        [{"shape": [-2]}],
        [{"shape": [1 << 62, 1 << 62]}],
        [{"dtype": "F99"}],
    )
    def test_load_of_a_header_that_lies_is_an_error(self, lie):
        directory = self.copy()
        entries = {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]} | lie,
        }
        header = json.dumps(entries).encode()
        (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        self.assert_load_fails(directory, "model.safetensors is not a complete safetensors file")

    def test_load_of_a_header_that_is_no_text_is_an_error(self):
        directory = self.copy()
        for header, size in ((b"\xff\xfe{}", 4), (b"{}", 1 << 62), (b"[" * 100_000, 100_000), (b"{}", 0)):
            (directory / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header)
            self.assert_load_fails(directory, "model.safetensors is not a complete safetensors file")

    def test_load_of_more_layers_than_tensors_is_an_error(self):
        directory = self.copy()
        self.edit_config(directory, num_hidden_layers=10**9)
        self.assert_load_fails(directory, "tensors are missing: it has .* 1,000,000,000 layers")

    @parameterized.parameters([["a"]], [{"model.norm.weight": 3}], [{"model.norm.weight": None}], ["text"])
    def test_load_with_index_of_another_kind_is_an_error(self, weight_map):
        directory = self.copy()
        (directory / "model.safetensors").unlink()
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        self.assert_load_fails(directory, "index.json", "weight_map does not map names to file names")

    def test_load_of_files_that_are_links_as_in_the_cache_of_the_hub(self):
        directory = self.copy()
        blob = self.directory / "blob"
        (directory / "model.safetensors").rename(blob)
        (directory / "model.safetensors").symlink_to(blob)
        _assert_equal_bits(_load(directory)[1], _load(_REFERENCES / "tiny_llama")[1])

    def test_load_without_weights_is_an_error(self):
        directory = self.copy()
        (directory / "model.safetensors").unlink()
        self.assert_load_fails(directory, "model.safetensors does not exist")

    def test_load_with_missing_shard_or_listed_tensor_is_an_error(self):
        config, parameters = _load(_REFERENCES / "tiny_qwen3")
        saved = self.directory / "saved"
        saving.save_pretrained(saved, config, parameters, shard_bytes=100_000)
        index = saved / "model.safetensors.index.json"
        fields = json.loads(index.read_text())
        index.write_text(
            json.dumps(fields | {"weight_map": fields["weight_map"] | {"more": "model-00001-of-00003.safetensors"}})
        )
        self.assert_load_fails(saved, "tensor more of model.safetensors.index.json is missing")
        index.write_text(json.dumps(fields))
        next(saved.glob("model-00002*")).unlink()
        self.assert_load_fails(saved, "model-00002-of-.* does not exist")

    @parameterized.parameters("../model.safetensors", "/etc/passwd", "..", "a\\b", "sub/model.safetensors")
    def test_load_with_index_that_leaves_the_directory_is_an_error(self, shard):
        directory = self.copy()
        (directory / "model.safetensors").unlink()
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
        self.assert_load_fails(directory, "index.json", "not a file name")

    def test_resolve_of_local_paths_is_the_path_and_of_nothing_an_error(self):
        self.assertEqual(pretrained.resolve(self.directory), self.directory)
        with self.assertRaisesRegex(ValueError, "nobody/nothing.*no local directory.*Hub"):
            pretrained.resolve("nobody/nothing")
        with self.assertRaisesRegex(ValueError, "no local directory"):
            pretrained.resolve(self.directory / "typo" / "in" / "path")


class GgufTest(_TemporaryTest):
    def write(self, name, edit=lambda tensors: None, fields=(), source=None):
        """The tiny model as llama.cpp stores it."""
        source = source or _REFERENCES / f"tiny_{name}"
        config = pretrained.load_config(source)
        tensors = safetensors.numpy.load_file(source / "model.safetensors")
        edit(tensors)
        file = self.directory / f"{name}.gguf"
        architecture = "gemma3" if config.family == "gemma3_text" else config.family
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_block_count(config.layers)
        writer.add_context_length(config.max_length)
        writer.add_embedding_length(config.width)
        writer.add_feed_forward_length(config.feed_forward)
        writer.add_head_count(config.heads)
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rotary[-1].theta)
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
        if architecture == "gemma3":
            writer.add_sliding_window(max(config.windows))
            if linear := config.rotary[-1].scaling:
                writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
                writer.add_rope_scaling_factor(linear.factor)
            if config.logit_cap:
                writer.add_final_logit_softcapping(config.logit_cap)
        for key, value in fields:
            writer.add_string(key, value)
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.layers)
        for published, array in tensors.items():
            if config.family == "llama" and ("q_proj" in published or "k_proj" in published):
                half = config.head_dim // 2
                order = [
                    head * config.head_dim + part * half + pair
                    for head in range(len(array) // config.head_dim)
                    for pair in range(half)
                    for part in range(2)
                ]
                array = array[order]
            if architecture == "gemma3" and published.endswith("norm.weight"):
                array = array + np.float32(1)
            writer.add_tensor(names.get_name(published, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    @parameterized.parameters("llama_bias", "qwen2", "qwen3")
    def test_gguf_gives_the_same_config_and_parameters_as_safetensors(self, name):
        config, needed = _load(_REFERENCES / f"tiny_{name}")
        got_config, got = _load(self.write(name))
        self.assertEqual(got_config, config)
        _assert_equal_bits(got, needed)

    @parameterized.parameters(({},), ({"final_logit_softcapping": 20.0},))
    def test_gguf_of_gemma3_gives_the_same_config_and_parameters_as_safetensors(self, fields):
        directory = self.copy("gemma3_text")
        rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
        rope["sliding_attention"]["rope_theta"] = 10_000.0  # llama.cpp's files do not say it, nor the attention scale
        if fields:
            rope["full_attention"] = {"rope_type": "default", "rope_theta": 100_000.0}
        self.edit_config(directory, query_pre_attn_scalar=12, rope_parameters=rope, **fields)

        def round_norms(tensors):  # published as bfloat16, which survives that one is added in float32
            for name in (name for name in tensors if name.endswith("norm.weight")):
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16).astype(np.float32)

        self.edit_tensors(directory, round_norms)
        config, needed = _load(directory)
        got_config, got = _load(self.write("gemma3", source=directory))
        self.assertEqual(got_config, config)
        self.assertEqual(config.windows, (24, 24, 24, 24, 24, 0))
        _assert_equal_bits(got, needed)

    def test_gguf_of_gemma3_without_a_window_is_an_error_and_with_a_pattern_follows_it(self):
        content = gguf_file.open_gguf(self.write("gemma3", source=self.copy("gemma3_text")))

        def read(**changes):
            values = {name: field.contents() for name, field in content.fields.items()}
            values |= {f"gemma3.{name}": value for name, value in changes.items()}
            fields = {name: mock.Mock(contents=lambda value=value: value) for name, value in values.items()}
            fields = {name: field for name, field in fields.items() if values[name] is not None}
            return gguf_config.from_gguf(pathlib.Path("a.gguf"), gguf_file.Gguf(fields, content.tensors))

        got = read(**{"attention.sliding_window_pattern": 3, "rope.freq_base_swa": 500.0})
        self.assertEqual(got.windows, (24, 24, 0, 24, 24, 0))
        self.assertEqual([kind.theta for kind in got.rotary], [500.0, 100_000.0])
        self.assertEqual(read().attention_scale, 12**-0.5)
        for name, value in (("attention.sliding_window", None), ("rope.scaling.type", "yarn")):
            with self.assertRaisesRegex(ValueError, f"a.gguf: gemma3.{name} is"):
                read(**{name: value})

    def test_gguf_quantized_gives_the_same_codes_as_safetensors(self):
        loaded = [
            pretrained.load_parameters(
                path, pretrained.load_config(path), find_kind=lambda path: "nf4" if "/w_" in path else ""
            )
            for path in (_REFERENCES / "tiny_llama_bias", self.write("llama_bias"))
        ]
        _assert_equal_bits(*loaded)

    def split(self, file, count, stem):
        """Writes the files that llama.cpp's gguf-split makes of one: the fields in the first, tensors in all."""
        reader = gguf.GGUFReader(file)
        tensors = reader.tensors
        for number in range(count):
            name = f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"
            writer = gguf.GGUFWriter(self.directory / name, "qwen3")
            if not number:
                for field in reader.fields.values():
                    if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                        writer.add_key_value(field.name, field.contents(), field.types[0])
            writer.add_key_value("split.no", number, gguf.GGUFValueType.UINT16)
            writer.add_key_value("split.count", count, gguf.GGUFValueType.UINT16)
            for tensor in tensors[number * len(tensors) // count : (number + 1) * len(tensors) // count]:
                writer.add_tensor(tensor.name, np.array(tensor.data))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return [self.directory / f"{stem}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]

    def test_gguf_in_several_files_is_read_as_one_from_any_of_them(self):
        config, needed = _load(_REFERENCES / "tiny_qwen3")
        whole = self.write("qwen3")
        files = self.split(whole, 3, "model[1]")
        hashes = set()
        for file in files:
            self.assertEqual(pretrained.load_config(file), config)
            _assert_equal_bits(pretrained.load_parameters(file, config), needed)
            hashes.add(model_files.fingerprint(file))
        self.assertLen(hashes, 1)
        data = bytearray(files[2].read_bytes())
        data[-1] ^= 1
        files[2].write_bytes(data)
        self.assertNotIn(model_files.fingerprint(files[0]), hashes)
        files[1].unlink()
        self.assert_load_fails(
            files[2], r"is one of 3 files of a model, and model\[1\]-00002-of-00003.gguf is not beside it"
        )
        shutil.copy(files[0], files[1])
        self.assert_load_fails(files[2], "its 3 files do not belong together")

    def test_gguf_in_capitals_is_read(self):
        config, needed = _load(_REFERENCES / "tiny_qwen3")
        file = self.write("qwen3").rename(self.directory / "MODEL.GGUF")
        self.assertEqual(pretrained.load_config(file), config)
        _assert_equal_bits(pretrained.load_parameters(file, config), needed)
        self.assertEqual(model_files.describe_weights(file, config), ("float32", ()))

    def test_gguf_with_missing_tensor_or_truncated_is_an_error(self):
        file = self.write("qwen3", edit=lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        self.assert_load_fails(file, r"qwen3\.gguf: tensor blk\.1\.ffn_up\.weight is missing")
        file = self.write("qwen3")
        for kept in (2, 1000, 100_000):
            file.write_bytes(file.read_bytes()[:kept])
            self.assert_load_fails(file, r"qwen3\.gguf is not a complete GGUF file")
            file = self.write("qwen3")

    def test_gguf_with_flipped_or_missing_bytes_loads_or_is_an_error_that_names_it(self):
        file = self.write("qwen3")
        content = file.read_bytes()
        self.assert_damage_is_an_error(file, content, gguf.GGUFReader(file).data_offset)

    def test_gguf_with_scaled_rope_is_an_error(self):
        self.assert_load_fails(self.write("qwen3", fields=[("qwen3.rope.scaling.type", "yarn")]), "rope.scaling.type")

    def test_gguf_of_another_architecture_is_an_error(self):
        file = self.directory / "other.gguf"
        writer = gguf.GGUFWriter(file, "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self.assert_load_fails(file, "general.architecture is 'mamba'")


if __name__ == "__main__":
    absltest.main()
