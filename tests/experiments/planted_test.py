"""Wrong responses where they should be, and the area under the ROC curve against a loop."""

import numpy as np
import planted
from absl.testing import absltest


def _records(count):
    turns = [("user", "q"), ("assistant", "r")]
    return [
        {
            "id": f"d{n}",
            "messages": [{"role": role, "content": f"{text}{n}.{i}"} for i in range(3) for role, text in turns],
        }
        for n in range(count)
    ]


class PlantTest(absltest.TestCase):
    def test_wrong_responses_are_those_of_other_dialogues_and_nothing_else_changes(self):
        records = _records(20)
        changed, wrong = planted.plant(records, share=0.2)
        self.assertLen(wrong, 12)
        self.assertLen({identifier for identifier, _ in wrong}, 12)
        for before, after in zip(records, changed, strict=True):
            for index, (one, other) in enumerate(zip(before["messages"], after["messages"], strict=True)):
                self.assertEqual(one != other, (before["id"], index) in wrong)
        contents = [
            sorted(message["content"] for record in each for message in record["messages"])
            for each in (records, changed)
        ]
        self.assertEqual(*contents)


class AreaTest(absltest.TestCase):
    def test_area_is_the_share_of_pairs_in_the_right_order(self):
        rng = np.random.default_rng(0)
        rank, is_wrong = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.3
        pairs = [(r, w) for r in rank[~is_wrong] for w in rank[is_wrong]]
        expected = sum(1.0 if r > w else 0.5 if r == w else 0.0 for r, w in pairs) / len(pairs)
        area = planted.measure_area(rank, is_wrong, np.arange(40))
        self.assertAlmostEqual(area.value, expected)

    def test_error_is_the_deviation_over_many_sets(self):
        rng = np.random.default_rng(1)

        def draw():
            is_wrong = np.arange(120) % 4 == 0
            return planted.measure_area(rng.normal(size=120) - is_wrong, is_wrong, np.arange(120))

        areas = [draw() for _ in range(25)]
        self.assertAlmostEqual(areas[0].error / np.std([area.value for area in areas]), 1.0, delta=0.35)


if __name__ == "__main__":
    absltest.main()
