"""The uneven set, against dialogues written out; the three means, against loops."""

import normalization
import numpy as np
from absl.testing import absltest
from harness import Losses

from dialog_jax.dialogues.dialogue import Dialogue, Message


def dialogue(name, *words):
    """Responses of so many words."""
    messages = []
    for count in words:
        messages += [Message(role="user", content="Hi"), Message(role="assistant", content="yes " * count)]
    return Dialogue(id=name, messages=tuple(messages))


# Three responses of one, two and three tokens, and a dialogue of one response of one token.
_LOSSES = Losses(
    tree=np.array([0, 0, 0, 0, 0, 0, 1]),
    node=np.arange(7),
    turn=np.array([0, 1, 1, 2, 2, 2, 0]),
    nll=np.array([1.0, 2.0, 4.0, 3.0, 6.0, 9.0, 10.0]),
)


class NormalizationTest(absltest.TestCase):
    def test_uneven_set_alternates_few_and_many_responses(self):
        few = [dialogue("a", 5), dialogue("b", 30, 1), dialogue("c", 9)]
        many = [dialogue("d", *[8] * 10, 3, 20), dialogue("e", *[1] * 13, 40)]
        others = [
            dialogue("three responses", 1, 20, 1),
            dialogue("even", *[8] * 12),
            dialogue("none short", *[4] * 11, 20),
            dialogue("none long", *[3] * 11, 19),
            dialogue("eleven", *[1] * 10, 30),
        ]
        chosen = normalization.select_uneven([*others[:3], *many, *others[3:], *few])
        self.assertEqual([one.id for one in chosen], ["a", "d", "b", "e"])

    def test_means_equal_loops(self):
        token = [1, 2, 4, 3, 6, 9, 10]
        turns = [[1], [2, 4], [3, 6, 9], [10]]
        dialogues = [[1, 2, 4, 3, 6, 9], [10]]
        expected = {
            "token": np.mean(token),
            "turn": np.mean([np.mean(own) for own in turns]),
            "dialogue": np.mean([np.mean(own) for own in dialogues]),
        }
        found = {unit: mean.value for unit, mean in normalization.by_unit(_LOSSES).items()}
        self.assertEqual(list(found), list(expected))
        for unit, value in expected.items():
            self.assertAlmostEqual(found[unit], value)

    def test_difference_is_of_the_same_targets(self):
        other = _LOSSES._replace(nll=_LOSSES.nll - np.array([1.0, 0, 0, 0, 0, 0, 0]))
        found = {unit: mean.value for unit, mean in normalization.by_unit(_LOSSES, other).items()}
        self.assertAlmostEqual(found["token"], 1 / 7)
        self.assertAlmostEqual(found["turn"], 1 / 4)
        self.assertAlmostEqual(found["dialogue"], 1 / 12)

    def test_buckets_are_by_the_length_of_the_response(self):
        sizes = [3, 4, 5, 8, 40]
        losses = Losses(
            tree=np.repeat(np.arange(5), sizes),
            node=np.arange(60),
            turn=np.zeros(60, int),
            nll=np.repeat([1.0, 2.0, 3.0, 4.0, 5.0], sizes),
        )
        found = [mean.value for mean in normalization.by_length(losses)]
        np.testing.assert_allclose(found, [11 / 7, 47 / 13, np.nan, np.nan, 5.0])


if __name__ == "__main__":
    absltest.main()
