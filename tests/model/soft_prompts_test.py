"""The embeddings of a soft prompt before training."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.model import soft_prompts
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.training import sharding
from dialog_jax.training.config import MeshConfig

_EMBEDDING = np.random.default_rng(0).normal(3.0, 0.5, (200, 8)).astype(np.float32)


def make(seed=0, text_tokens=(), embedding=_EMBEDDING, **config):
    config = SoftPromptConfig(**config)
    return np.asarray(soft_prompts.init_soft_prompt(config, jnp.asarray(embedding), text_tokens, jax.random.key(seed)))


class InitTest(parameterized.TestCase):
    @parameterized.parameters((5, [7, 8, 7, 8, 7]), (1, [7]), (2, [7, 8]))
    def test_text_is_cut_or_repeated(self, tokens, rows):
        made = make(tokens=tokens, init="text", text="Hi there", text_tokens=[7, 8])
        np.testing.assert_array_equal(made, _EMBEDDING[rows])

    def test_vocabulary_takes_other_rows_of_the_embedding_for_each_seed(self):
        first, again, other = (make(seed, tokens=30) for seed in (0, 0, 1))
        self.assertTrue((first[:, None] == _EMBEDDING[None]).all(axis=2).any(axis=1).all())
        np.testing.assert_array_equal(first, again)
        self.assertFalse(np.array_equal(first, other))

    def test_random_has_the_standard_deviation_of_the_embedding(self):
        made = make(tokens=100, init="random", embedding=_EMBEDDING.astype(jnp.bfloat16))
        self.assertEqual(made.dtype, np.float32)
        self.assertAlmostEqual(made.std(), 0.5, delta=0.05)
        self.assertAlmostEqual(made.mean(), 0.0, delta=0.1)

    def test_whole_on_every_device_of_a_divided_embedding(self):
        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        divided = jax.device_put(_EMBEDDING, sharding.parameter_sharding(mesh, ["embedding"], _EMBEDDING.shape))
        config = SoftPromptConfig(tokens=3)
        made = soft_prompts.init_soft_prompt(config, divided, (), jax.random.key(0))
        self.assertTrue(made.sharding.is_fully_replicated)
        np.testing.assert_array_equal(made, make(tokens=3))

    def test_text_without_tokens_is_refused(self):
        with self.assertRaisesRegex(UserError, "soft_prompt.text is ' ', which the tokenizer gives no token"):
            make(tokens=3, init="text", text=" ")


if __name__ == "__main__":
    absltest.main()
