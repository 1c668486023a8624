"""Measurements of models and data against plain NumPy."""

import math

import numpy as np
from absl.testing import absltest

from dialog_jax.diagnosis import measurements
from dialog_jax.dialogues import parsing
from dialog_jax.evaluation.scoring import Score

_LONG = "The tide is highest at four in the afternoon, and lowest at ten."


def _score(*token_nll):
    tokens, nll = sum(map(len, token_nll)), math.fsum(map(sum, token_nll))
    return Score({"tokens": tokens, "nll": nll}, "d", 0, [np.array(one) for one in token_nll])


class MeasurementsTest(absltest.TestCase):
    def test_changes_of_parameters_are_norms_of_differences(self):
        rng = np.random.default_rng(0)
        old = {"embedding": rng.standard_normal((5, 3)), "layers": {"w_up": rng.standard_normal((2, 3, 4))}}
        new = {"embedding": old["embedding"] + 0.5, "layers": {"w_up": old["layers"]["w_up"].copy()}}
        embedding, w_up = measurements.measure_changes(old | {"final_norm": np.ones(3)}, new)
        self.assertEqual((embedding.path, w_up.path, w_up.change), ("embedding", "layers/w_up", 0.0))
        self.assertAlmostEqual(embedding.norm, np.sqrt((old["embedding"] ** 2).sum()))
        self.assertAlmostEqual(embedding.change, np.sqrt(15 * 0.25))

    def test_change_of_lora_is_that_of_the_product_of_its_factors(self):
        rng = np.random.default_rng(0)
        matrix = {
            "weight": rng.standard_normal((2, 6, 5)),
            "lora_a": rng.standard_normal((2, 6, 3)),
            "lora_b": np.zeros((2, 3, 5)),
            "lora_scale": np.array([[2.0, 2.0, 0.0], [0.5, 0.5, 0.5]]),
        }
        trained = {name: rng.standard_normal(matrix[name].shape) for name in ("lora_a", "lora_b")}

        def change(before, after):
            ((path, norm, change),) = measurements.measure_changes({"layers": {"w": before}}, {"layers": {"w": after}})
            self.assertEqual(path, "layers/w")
            self.assertAlmostEqual(norm, np.linalg.norm(matrix["weight"]))
            return change

        def product(factors):
            return [
                (a * s) @ b for a, s, b in zip(factors["lora_a"], matrix["lora_scale"], factors["lora_b"], strict=True)
            ]

        self.assertAlmostEqual(change(matrix, trained), np.linalg.norm(product(trained)))
        moved = {name: leaf + 0.1 for name, leaf in trained.items()}
        difference = np.array(product(moved)) - np.array(product(trained))
        self.assertAlmostEqual(change(matrix | trained, moved), np.linalg.norm(difference))
        # B is still zero, whatever A is; and nothing has moved.
        self.assertEqual(change(matrix, {"lora_a": trained["lora_a"], "lora_b": matrix["lora_b"]}), 0.0)
        self.assertEqual(change(matrix | trained, trained), 0.0)

    def test_change_of_lora_on_experts_is_that_of_all_their_products(self):
        rng = np.random.default_rng(0)
        shapes = {"weight": (2, 3, 6, 5), "lora_a": (2, 3, 6, 4), "lora_b": (2, 3, 4, 5)}  # layers, experts, in, out
        matrix = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        before = matrix | {
            "lora_b": np.zeros(shapes["lora_b"], np.float32),
            "lora_scale": np.float32([[2] * 4, [1] * 4]),
        }
        after = {name: matrix[name] for name in ("lora_a", "lora_b")}
        ((_, _, change),) = measurements.measure_changes({"w": before}, {"w": after})
        products = matrix["lora_a"].astype(np.float64) @ matrix["lora_b"].astype(np.float64)
        np.testing.assert_allclose(change, np.sqrt(4 * (products[0] ** 2).sum() + (products[1] ** 2).sum()), rtol=1e-6)

    def test_update_of_a_tied_unembedding_is_measured_against_the_embedding(self):
        ones = np.ones((2, 3))
        head = {"lora_a": np.zeros((3, 1)), "lora_b": np.ones((1, 2)), "lora_scale": np.ones(1)}
        after = {"lora_a": np.ones((3, 1)), "lora_b": np.ones((1, 2))}
        ((path, norm, change),) = measurements.measure_changes({"embedding": ones, "lm_head": head}, {"lm_head": after})
        self.assertEqual((path, norm, change), ("lm_head", np.sqrt(6), np.sqrt(6)))

    def test_losses_of_first_middle_and_last_tokens(self):
        scores = [_score([5.0, 1.0, 2.0, 3.0], [9.0]), _score(), _score([7.0, 3.0, 4.0])]
        found = measurements.measure_responses(scores, has_end=True)
        self.assertEqual(found, (2, 6.0, 2.0, 3.5))
        self.assertTrue(math.isnan(measurements.measure_responses(scores, has_end=False).end))
        self.assertIsNone(measurements.measure_responses([_score([1.0, 2.0])], has_end=True))

    def test_error_of_the_held_out_change_is_that_of_the_jackknife(self):
        rng = np.random.default_rng(0)
        lengths = rng.integers(5, 60, 80)
        before = [_score(rng.normal(3, 1, n)) for n in lengths]
        effects = rng.normal(-0.2, 0.3, 80)
        after = [_score(one.token_nll[0] + effect) for one, effect in zip(before, effects, strict=True)]
        found = measurements.measure_held_out_change([*before, _score()], [*after, _score()])
        change = (effects * lengths).sum() / lengths.sum()
        without = ((effects * lengths).sum() - effects * lengths) / (lengths.sum() - lengths)
        jackknife = np.sqrt(79 / 80 * ((without - without.mean()) ** 2).sum())
        self.assertEqual((found.dialogues, found.tokens), (80, lengths.sum()))
        self.assertAlmostEqual(found.change, change)
        self.assertAlmostEqual(found.error / jackknife, 1, delta=0.03)
        self.assertIsNone(measurements.measure_held_out_change(before[:1], after[:1]))

    def test_overlap_counts_long_responses_behind_the_same_message(self):
        def dialogues(*pairs):
            records = [
                {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}
                for texts in pairs
            ]
            return parsing.parse_records(records, source="data")

        training = dialogues(("When?", _LONG, "Thanks!", "Sure."), ("Hi", "Hello!"), ("And?", "Other " + _LONG))
        held_out = dialogues(
            ("Hello", "Ah", "when?", _LONG.upper().replace(" ", "\n ")),  # in another turn, spelled otherwise
            ("Hi", "Hello!"),  # too short to be compared
            ("Where?", _LONG),  # to another question
            ("And?", _LONG),
        )
        found = measurements.measure_overlap(training, held_out)
        self.assertEqual((found.responses, found.shared, found.first), (3, 1, ["dialogue 0 (data[0])"]))


if __name__ == "__main__":
    absltest.main()
