"""Bins of turns and their means, against arrays that can be read."""

import numpy as np
import which_turns
from absl.testing import absltest
from harness import Losses


class WhichTurnsTest(absltest.TestCase):
    def test_rare_turns_stand_together(self):
        turn = np.repeat([-1, 0, 1, 2, 3], [500, 300, 200, 80, 30])
        self.assertEqual(which_turns.turn_bins(turn), [(0, 0), (1, 1), (2, 3)])

    def test_too_few_late_tokens_join_the_turn_before(self):
        turn = np.repeat([0, 1, 2], [300, 200, 80])
        self.assertEqual(which_turns.turn_bins(turn), [(0, 0), (1, 2)])

    def test_no_rare_turn_stands_alone(self):
        self.assertEqual(which_turns.turn_bins(np.repeat([0, 1], [300, 200])), [(0, 0), (1, 1)])

    def test_few_tokens_are_one_bin(self):
        self.assertEqual(which_turns.turn_bins(np.repeat([0, 1, 2], [30, 20, 10])), [(0, 2)])

    def test_means_are_those_of_the_turns(self):
        losses = Losses(
            tree=np.array([0, 0, 0, 1, 1, 1]),
            node=np.arange(6),
            turn=np.array([-1, 0, 1, 0, 1, 2]),
            nll=np.array([100.0, 1.0, 2.0, 5.0, 4.0, 9.0]),
        )
        other = losses._replace(nll=np.zeros(6) + 0.5)
        bins = [(0, 0), (1, 2)]
        self.assertEqual([mean.value for mean in which_turns.by_turn(losses, bins)], [3.0, 5.0])
        self.assertEqual([mean.value for mean in which_turns.by_turn(losses, bins, other)], [2.5, 4.5])


if __name__ == "__main__":
    absltest.main()
