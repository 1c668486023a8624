"""The gradients that are compared, against separate passes; the parts of a prompt, against its text."""

import pathlib
import tempfile

import jax
import joint_vs_conditional
import numpy as np
from absl.testing import absltest
from harness import Losses

from tests.experiments import tiny_run
from tests.experiments.harness_test import dialogues, trees


def flat(gradient):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)])


class GradientsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.model = tiny_run.save_model(directory)

    def oracle(self, chosen):
        """(gradient of log Pr(y | x), of log Pr(x, y), tokens of y, of x and y)."""
        config, parameters, tokenizer = self.model.config, self.model.parameters, self.model.tokenizer
        tokens, of_responses = tiny_run.passes(chosen)
        whole, everything = np.zeros_like(tokens), np.zeros_like(of_responses)
        for line, dialogue in enumerate(chosen):
            text = tokenizer.apply_chat_template([m.as_dict() for m in dialogue.messages], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            whole[line, : len(ids)] = ids
            everything[line, : len(ids) - 1] = 1
        return (
            -flat(tiny_run.gradient(config, parameters, tokens, of_responses)),
            -flat(tiny_run.gradient(config, parameters, whole, everything)),
            int(of_responses.sum()),
            int(everything.sum()),
        )

    def test_gradients_equal_those_of_separate_passes(self):
        chosen = dialogues(3)
        joint, conditional = trees(self.model, chosen, name="joint"), trees(self.model, chosen)
        found = joint_vs_conditional.compare_gradients(
            self.model.config, self.model.parameters, joint, conditional, [[0, 2], [1]]
        )
        first, both, responses, everything = self.oracle(chosen)
        expected = {
            "log Pr(y given x)": first,
            "log Pr(x, y), Pr(x) by a frozen copy": first,
            "log Pr(x, y)": both,
            "log Pr(x)": both - first,
        }
        self.assertEqual(list(found), list(expected))
        for name, gradient in expected.items():
            np.testing.assert_allclose(found[name].norm, np.linalg.norm(gradient), rtol=1e-4)
            cosine = gradient @ first / np.linalg.norm(gradient) / np.linalg.norm(first)
            np.testing.assert_allclose(found[name].cosine, cosine, atol=1e-4)
            gap = np.abs(gradient - first).max() / np.abs(first).max()
            np.testing.assert_allclose(found[name].largest_difference, gap, rtol=1e-3, atol=1e-5)
        self.assertLess(found["log Pr(x, y)"].cosine, 0.99)
        counts = [own.targets for own in found.values()]
        self.assertEqual(counts, [responses, everything, everything, everything - responses])

    def test_parts_are_the_tokens_of_their_texts(self):
        chosen = dialogues(2)
        joint = trees(self.model, chosen, name="joint")
        of_messages = trees(self.model, chosen, name="roles", roles=("user", "assistant"))
        nodes = [np.arange(1, len(joint.tree(n).tokens)) for n in range(2)]
        turns = np.concatenate([joint.tree(n).turn[1:] for n in range(2)])
        size = len(turns)
        losses = Losses(np.repeat([0, 1], [len(own) for own in nodes]), np.concatenate(nodes), turns, np.zeros(size))
        parts = joint_vs_conditional.split_targets(losses, joint, of_messages)
        tokens = np.concatenate([joint.tree(n).tokens[1:] for n in range(2)])
        texts = {name: self.model.tokenizer.decode(tokens[part]) for name, part in parts.items()}
        messages = [message for dialogue in chosen for message in dialogue.messages]
        spoken = {role: [m.content for m in messages if m.role == role] for role in ("user", "assistant")}
        self.assertEqual(texts["users"].replace("<|im_end|>", ""), "".join(spoken["user"]))
        self.assertEqual(texts["responses"], "".join(f"{content}<|im_end|>" for content in spoken["assistant"]))
        np.testing.assert_array_equal(sum(part.astype(int) for part in parts.values()), np.ones(size, int))

    def test_mean_is_over_the_part_only(self):
        losses = Losses(np.array([0, 0, 1]), np.arange(3), np.array([0, -1, 0]), np.array([1.0, 50.0, 3.0]))
        other = losses._replace(nll=np.array([0.5, 2.0, 1.5]))
        part = losses.turn >= 0
        self.assertEqual(joint_vs_conditional.mean_loss(losses, part).value, 2.0)
        self.assertEqual(joint_vs_conditional.mean_loss(losses, part, other).value, 1.0)


if __name__ == "__main__":
    absltest.main()
