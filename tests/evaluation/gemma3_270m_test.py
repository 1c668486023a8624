"""Gemma 3 270M against what PyTorch computes for it: logits beyond its window, and the loss of real responses.

The reference is of the weights that transformers reads from the GGUF itself; tests/references/make_gemma_reference.py
says how it was made.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from dialog_jax.dialogues import parsing
from dialog_jax.evaluation import scoring
from dialog_jax.inference import loading
from dialog_jax.model import decoder

_ROOT = pathlib.Path(__file__).parents[2]
_MODEL = _ROOT / "assets" / "gemma3-270m"


def _difference(got, reference):
    """The norm of the difference, relative to the reference's."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(got - reference) / np.linalg.norm(reference)


@pytest.mark.full
class Gemma3Test(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if not (_MODEL / "config.json").exists():
            raise AssertionError(f"{_MODEL} is missing: run scripts/prepare_demo.py --gemma, or scripts/test.sh --all")
        cls.reference = np.load(_ROOT / "tests" / "references" / "gemma3_270m.npz")
        cls.model = loading.load_model(_MODEL, dtype=jnp.float32)

    def test_logits_are_those_of_transformers(self):
        config, parameters = self.model.config, self.model.parameters
        self.assertEqual(sum(leaf.size for leaf in jax.tree.leaves(parameters)), 268_098_176)
        tokens, positions = self.reference["tokens"][None], self.reference["positions"]
        self.assertGreater(tokens.size, max(config.windows))
        position, subtree_end = jnp.arange(tokens.size)[None], jnp.full(tokens.shape, tokens.size)
        hidden = decoder.hidden_states(config, parameters, jnp.asarray(tokens), position, subtree_end)[0, positions]
        logits = np.asarray(jnp.einsum("td,vd->tv", hidden, decoder.unembedding(config, parameters)))
        logsumexp = np.asarray(jax.nn.logsumexp(logits, axis=-1))
        differences = (
            _difference(logits[:, self.reference["vocabulary"]], self.reference["logits"]),
            _difference(logsumexp, self.reference["logsumexp"]),
        )
        print("logits, logsumexp: relative differences", differences)
        self.assertLess(max(differences), 1e-5)

    def test_losses_of_responses_are_those_of_transformers(self):
        held_out = list(parsing.read_dialogues(_ROOT / "assets" / "chitchat" / "validation.jsonl"))
        dialogues = [held_out[number] for number in self.reference["dialogues"]]
        scores = scoring.score_dialogues(
            dialogues, self.model.renderer, self.model.config, self.model.parameters, compute_dtype=jnp.float32
        )
        turns = [turn for score in scores for turn in score.record["turns"]]
        self.assertEqual([turn["tokens"] for turn in turns], self.reference["response_tokens"].tolist())
        nll = np.array([turn["nll"] for turn in turns])
        difference = np.abs(nll / self.reference["nll"] - 1).max()
        print("nll: largest relative difference", difference, "in total", nll.sum() / self.reference["nll"].sum() - 1)
        self.assertLess(difference, 1e-4)


if __name__ == "__main__":
    absltest.main()
