"""Every family against its reference: logits and gradients of transformers, the same files back, and the laws of trees.

The references are tiny random models (see tests/references/make_references.py): rows of 96 tokens, longer than the
windows, and the gradient of the mean loss of the next token, of which each tensor has up to 64 values and its norm.
"""

import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.inference import generation
from dialog_jax.model import decoder, decoding, families, parameter_trees, pretrained, saving, tensor_names
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training import trainable
from dialog_jax.training.config import TrainConfig
from tests.model import forests

_REFERENCES = pathlib.Path(__file__).parents[1] / "references"


def _model_type(directory):
    fields = json.loads((directory / "config.json").read_text())
    return fields.get("text_config", fields)["model_type"]


_NAMES = sorted(
    directory.name.removeprefix("tiny_")
    for directory in _REFERENCES.glob("tiny_*/")
    if _model_type(directory) in families.FAMILIES
)
# Windows, two RoPEs and `1 + w`; experts and sinks; tensors in one, LongRoPE. The others are of the full tier.
FULL_PARAMETERS = tuple(name for name in _NAMES if name not in ("llama", "gemma3_text", "gpt_oss", "phi3"))


@functools.cache
def load(name):
    """(config, parameters, arrays of the reference)."""
    directory = _REFERENCES / f"tiny_{name}"
    config = pretrained.load_config(directory)
    return config, pretrained.load_parameters(directory, config), np.load(directory / "reference.npz")


def compute_logits(config, parameters, tokens):
    """[B, T, V], by one pass over rows that are paths."""
    batch, length = tokens.shape
    position = jnp.broadcast_to(jnp.arange(length), (batch, length))
    ends = jnp.full((batch, length), length)
    hidden = decoder.hidden_states(config, parameters, jnp.asarray(tokens), position, ends)
    return _logits(config, parameters, hidden)


def _logits(config, parameters, hidden):
    return decoder.cap_logits(config, hidden @ decoder.unembedding(config, parameters).T)


def compute_gradient(name):
    """(logits, {published name: gradient}) of a reference's loss."""
    config, parameters, reference = load(name)
    tokens = reference["tokens"]
    config = config.for_length(tokens.shape[1])

    def loss(parameters):
        logits = compute_logits(config, parameters, tokens)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.mean(nll), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(parameters)
    # Written as if they were the parameters, gradients have the published names and layouts.
    with tempfile.TemporaryDirectory() as directory:
        saving.save_pretrained(pathlib.Path(directory) / "gradient", config, gradient)
        published = safetensors.numpy.load_file(pathlib.Path(directory) / "gradient" / "model.safetensors")
    compared = [key.removeprefix("gradient/") for key in reference if key.startswith("gradient/")]
    return logits, {tensor: published[name] for tensor, name in tensor_names.standardize_names(compared).items()}


def pick_values(gradient):
    """The values of a gradient that references have."""
    return gradient.reshape(-1)[:: max(1, -(-gradient.size // 64))]


def _relative_error(got, needed):
    got, needed = np.asarray(got, np.float64), np.asarray(needed, np.float64)
    return np.linalg.norm(got - needed) / np.linalg.norm(needed)


class FamiliesTest(parameterized.TestCase):
    @parameterized.parameters(*_NAMES)
    def test_logits_and_gradients_are_those_of_transformers(self, name):
        logits, gradients = compute_gradient(name)
        _, _, reference = load(name)
        self.assertLess(_relative_error(logits, reference["logits"]), 4e-6)
        for tensor, gradient in gradients.items():
            needed, norm = reference[f"gradient/{tensor}"], float(reference[f"norm/{tensor}"])
            # Of an expert that no token chose, both are 0.
            self.assertLessEqual(np.abs(pick_values(gradient) - needed).max(), 2e-5 * norm, tensor)
            self.assertAlmostEqual(np.linalg.norm(gradient.astype(np.float64)), norm, delta=2e-5 * norm, msg=tensor)
        self.assertGreater(len(gradients), 10)

    def test_longrope_has_other_factors_for_rows_up_to_the_original_length(self):
        config, parameters, reference = load("phi3")
        tokens = reference["tokens"][:, :32]
        got = compute_logits(config.for_length(32), parameters, tokens)
        self.assertLess(_relative_error(got, reference["short_logits"]), 4e-6)
        self.assertGreater(_relative_error(got, reference["logits"][:, :32]), 1e-2)
        # With the factors for short rows, longer contexts are refused.
        self.assertEqual([config.for_length(length).context for length in (1, 32, 33)], [32, 32, 256])
        with self.assertRaisesRegex(UserError, "exceeds the model's context of 32"):
            generation.Session(config.for_length(32), parameters).read(list(range(33)))

    @parameterized.parameters(*_NAMES)
    def test_saved_files_have_the_same_tensors_and_config(self, name):
        config, parameters, _ = load(name)
        with tempfile.TemporaryDirectory() as directory:
            saved = pathlib.Path(directory) / "saved"
            saving.save_pretrained(saved, config, parameters)
            self.assertEqual(pretrained.load_config(saved), config)
            tensors = safetensors.numpy.load_file(saved / "model.safetensors")
        first = safetensors.numpy.load_file(_REFERENCES / f"tiny_{name}" / "model.safetensors")
        names = tensor_names.standardize_names(first.keys())
        self.assertEqual(tensors.keys(), set(names.values()))
        for tensor, standard in names.items():
            np.testing.assert_array_equal(tensors[standard], first[tensor], err_msg=tensor)

    @parameterized.parameters("gemma3", "gemma4")
    def test_wrapper_is_saved_with_its_other_parts_as_they_are(self, family):
        config, parameters, _ = load(family)
        first = _REFERENCES / f"tiny_{family}"
        changed = {**parameters, "final_norm": parameters["final_norm"] + 1}
        with tempfile.TemporaryDirectory() as directory:
            saved = pathlib.Path(directory) / "saved"
            saving.save_pretrained(saved, config, changed, wrapper=first, shard_bytes=50_000)
            self.assertEqual(pretrained.load_config(saved), config)
            again = pretrained.load_parameters(saved, config)
            tensors = {}
            for file in saved.glob("*.safetensors"):
                tensors |= safetensors.numpy.load_file(file)
            fields, needed = (json.loads((place / "config.json").read_text()) for place in (saved, first))
        jax.tree.map(np.testing.assert_array_equal, again, changed)
        original = safetensors.numpy.load_file(first / "model.safetensors")
        self.assertEqual(tensors.keys(), original.keys())
        for name, array in original.items():
            if name not in ("language_model.model.norm.weight", "model.language_model.norm.weight"):
                np.testing.assert_array_equal(tensors[name], array, err_msg=name)
        self.assertEqual({**fields, "text_config": 0}, {**needed, "text_config": 0})

    @parameterized.parameters(*_NAMES)
    def test_tokens_one_by_one_with_a_cache_give_the_hidden_states_of_one_pass(self, name):
        config, parameters, reference = load(name)
        tokens = jnp.asarray(reference["tokens"])
        config = config.for_length(tokens.shape[1])
        cache = decoding.empty_cache(config, 2, 96, chunk=20)  # windows of 16 or 24: two rounds of 36 or 44 slots
        extend = jax.jit(functools.partial(decoding.extend, config))
        pieces, start = [], 0
        for size in [20, 20, 20, *[1] * 36]:
            hidden, cache = extend(parameters, cache, tokens[:, start : start + size], jnp.int32(start))
            pieces.append(hidden)
            start += size
        got = _logits(config, parameters, jnp.concatenate(pieces, axis=1))
        self.assertLess(_relative_error(got, reference["logits"]), 4e-6)

    @parameterized.parameters("llama", "gemma2", "gemma3_text", "granite")
    def test_soft_prompt_that_begins_with_words_acts_as_these_words(self, name):
        config, parameters, reference = load(name)
        words = reference["tokens"][0, :5]
        settings = TrainConfig(soft_prompt=SoftPromptConfig(tokens=5, init="text", text="five words"))
        selection = trainable.select(settings, config, jnp.float32)
        parts = trainable.make_parameters(selection, parameters, jax.random.key(0), soft_prompt_text=words.tolist())
        virtual = np.concatenate([config.vocab_size + np.arange(5), reference["tokens"][0, 5:]])
        got = compute_logits(config, parameter_trees.merge(*parts), virtual[None].astype(np.int32))
        self.assertLess(_relative_error(got, reference["logits"][:1]), 4e-6)

    @parameterized.parameters(*_NAMES)
    def test_tree_gives_each_path_what_it_gives_alone(self, name):
        config, parameters, _ = load(name)
        rng = np.random.default_rng(0)
        parents = forests.random_parents(rng, 96, root=0.0, branch=0.05)
        tokens = rng.integers(0, config.vocab_size, 96)
        position, ends = map(jnp.asarray, forests.arrays(parents))
        run = jax.jit(functools.partial(decoder.hidden_states, config, parameters))
        got = run(jnp.asarray(tokens)[None], position[None], ends[None])[0]
        longest = 0
        for leaf in sorted(set(range(96)) - set(parents)):
            path = np.array(forests.lineage(parents, leaf))
            row = np.zeros((1, 96), np.int32)
            row[0, : len(path)] = tokens[path]
            alone = run(jnp.asarray(row), jnp.arange(96)[None], jnp.full((1, 96), 96))[0, : len(path)]
            self.assertLess(_relative_error(got[path], alone), 4e-6)
            longest = max(longest, len(path))
        self.assertGreater(longest, 40)  # longer than the windows


if __name__ == "__main__":
    absltest.main()
