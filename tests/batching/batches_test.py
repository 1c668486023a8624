"""Rows as arrays, drawn; and the order of batches: every tree once an epoch, whatever the split, from (seed, step)."""

import collections
import itertools

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.batching import batches
from dialog_jax.trees import dataset, prefix_tree


def stored(*trees, shared_prefix_length=0):
    return dataset.concatenate_trees(trees, shared_prefix_lengths=[shared_prefix_length] * len(trees))


def path(tokens, start, weight=1.0, turn=0):
    """A tree that is a path; its tokens from `start` on are targets."""
    tokens = np.array(tokens, np.int32)
    return prefix_tree.build_tree([(tokens, [prefix_tree.Span(start, len(tokens), weight, turn)])])


def random_trees(seed, count, longest=30):
    """Paths whose tokens are all their own number, so that a row tells which trees it holds."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    return stored(
        *(path(np.full(length, number + 1), int(rng.integers(1, length))) for number, length in enumerate(lengths))
    )


def trees_of(batch):
    """The trees of each row, by their tokens, segment by segment: a list over [M, B]."""
    rows = []
    for tokens, segment in zip(
        batch.tokens.reshape(-1, batch.tokens.shape[-1]),
        batch.segment.reshape(-1, batch.segment.shape[-1]),
        strict=True,
    ):
        row = []
        for number in range(1, segment.max() + 1):
            (value,) = set(tokens[segment == number].tolist())
            row.append(value - 1)
        rows.append(row)
    return rows


def plan_of(trees, **options):
    return batches.Plan(trees, **{"max_length": 32, "rows": 2, "micro_batches": 1, "seed": 0, **options})


def assert_equal(first, second):
    for name in batches.Batch._fields:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


class FillRowsTest(parameterized.TestCase):
    def test_picture_of_two_trees_in_a_row_and_a_row_of_padding(self):
        branching = prefix_tree.build_tree(  # h x a b and h x b u c
            [
                (np.array([11, 12, 13, 14]), [prefix_tree.Span(2, 4, 1.0, 0)]),
                (np.array([11, 12, 14, 15, 16]), [prefix_tree.Span(4, 5, 0.5, 1)]),
            ]
        )
        trees = stored(path([7, 8, 9], 1, turn=3), branching)
        batch = batches.fill_rows(trees, [[1, 0], []], max_length=12)
        # fmt: off
        pictures = batches.Batch(
            tokens=     [[11, 12, 13, 14, 14, 15, 16,  7,  8,  9,  0,  0], [0] * 12],
            position=   [[ 0,  1,  2,  3,  2,  3,  4,  0,  1,  2,  0,  0], [0] * 12],
            subtree_end=[[ 7,  7,  4,  4,  7,  7,  7, 10, 10, 10, 11, 12], range(1, 13)],
            segment=    [[ 1,  1,  1,  1,  1,  1,  1,  2,  2,  2,  0,  0], [0] * 12],
            source=     [[ 1,  2,  5,   7, 8,  0] + [ 0] * 6, [ 0] * 12],
            target=     [[13, 14, 16,   8, 9,  0] + [ 0] * 6, [ 0] * 12],
            weight=     [[ 1,  1, 0.5,  1, 1,  0] + [ 0] * 6, [ 0] * 12],
            turn=       [[ 0,  0,  1,   3, 3, -1] + [-1] * 6, [-1] * 12],
        )
        # fmt: on
        self.assertIsNone(batch.teacher_token)
        self.assertIsNone(batch.teacher_log_probability)
        for name, picture in pictures._asdict().items():
            if picture is None:
                continue
            array = getattr(batch, name)
            np.testing.assert_array_equal(array, np.array([list(row) for row in picture]), err_msg=name)
            self.assertEqual(array.dtype, np.float32 if name == "weight" else np.int32)

    def test_a_token_sees_its_tree_and_padding_sees_itself(self):
        trees = random_trees(0, 12)
        rows = [[3, 1], [0], [], [5, 7, 2]]
        batch = batches.fill_rows(trees, rows, max_length=96)
        for b in range(len(rows)):
            for i in range(96):
                visible = [j for j in range(i + 1) if i < batch.subtree_end[b, j]]
                segment = batch.segment[b, i]
                wanted = [j for j in range(i + 1) if batch.segment[b, j] == segment] if segment else [i]
                self.assertEqual(visible, wanted)
        self.assertEqual(trees_of(batch), rows)


class PlanTest(parameterized.TestCase):
    @parameterized.product(rows=(1, 2, 4), micro_batches=(1, 3))
    def test_every_tree_comes_once_an_epoch(self, rows, micro_batches):
        trees = random_trees(0, 100)
        plan = plan_of(trees, rows=rows, micro_batches=micro_batches)
        steps = -(-3 * plan.rows_per_epoch // (rows * micro_batches))
        given = [row for step in range(steps) for row in trees_of(plan.batch(step))]
        for epoch in range(3):
            part = given[epoch * plan.rows_per_epoch : (epoch + 1) * plan.rows_per_epoch]
            self.assertCountEqual(itertools.chain(*part), range(100))

    @parameterized.product(rows=(2, 4), micro_batches=(1, 2))
    def test_steps_of_any_size_take_the_same_rows_in_the_same_order(self, rows, micro_batches):
        trees = random_trees(1, 50)
        one, other = plan_of(trees, rows=1), plan_of(trees, rows=rows, micro_batches=micro_batches)
        size = rows * micro_batches
        for step in (0, 1, 7):
            single = [trees_of(one.batch(n))[0] for n in range(step * size, (step + 1) * size)]
            self.assertEqual(trees_of(other.batch(step)), single)

    @parameterized.parameters(([0, 1], [2, 3]), ([0, 2], [3], [1]))
    def test_hosts_together_hold_the_rows_of_one(self, *shares):
        plan = plan_of(random_trees(2, 60), rows=4, micro_batches=3)
        for step in (0, 5):
            whole = plan.batch(step)
            for own in shares:
                assert_equal(plan.batch(step, own), whole.map(lambda array, own=own: array[:, own]))
        for given, whole in zip(plan.batches(3, 6, [1, 2]), plan.batches(3, 6), strict=True):
            assert_equal(given, whole.map(lambda array: array[:, [1, 2]]))

    def test_a_batch_depends_on_seed_and_step_only(self):
        trees = random_trees(3, 60)
        first, second = plan_of(trees), plan_of(trees)
        for step in (9, 0, 30, 1):  # in any order, over several epochs
            assert_equal(first.batch(step), second.batch(step))
        assert_equal(first.batch(9), plan_of(trees).batch(9))
        self.assertNotEqual(plan_of(trees, seed=1).rows(0), first.rows(0))

    def test_epochs_have_other_orders_and_other_neighbours(self):
        plan = plan_of(random_trees(4, 200), rows=1)
        epochs = [[tuple(*plan.rows(e * plan.rows_per_epoch + n)) for n in range(plan.rows_per_epoch)] for e in (0, 1)]
        self.assertNotEqual(*epochs)
        self.assertNotEqual(*({frozenset(row) for row in epoch} for epoch in epochs))

    @parameterized.parameters((0, 7), (5, 9), (40, 41), (3, 3))
    def test_prefetched_batches_are_those_of_their_steps_from_anywhere(self, start, stop):
        plan = plan_of(random_trees(5, 60), micro_batches=2)
        given = list(plan.batches(start, stop))
        self.assertLen(given, stop - start)
        for step, batch in enumerate(given, start):
            assert_equal(batch, plan.batch(step))

    def test_rows_are_full_on_dialogue_sized_trees(self):
        rng = np.random.default_rng(0)
        lengths = np.minimum(rng.lognormal(np.log(437), 1.1, 4000).astype(int) + 20, 1024)
        ones = [path(np.ones(length), 1) for length in range(2, 1025)]
        trees = stored(*(ones[length - 2] for length in lengths))
        plan = plan_of(trees, max_length=1024, rows=4)
        used = collections.Counter()
        for step in range(plan.rows_per_epoch // 4):
            segment = plan.batch(step).segment
            used.update({"tokens": int((segment > 0).sum()), "room": segment.size})
        self.assertGreater(used["tokens"] / used["room"], 0.98)


class EvaluationTest(parameterized.TestCase):
    @parameterized.parameters(1, 3, 100)
    def test_every_tree_comes_once_and_padding_fills_the_last_batch(self, rows):
        trees = random_trees(6, 80)
        given = list(batches.evaluation_batches(trees, max_length=32, rows=rows))
        for batch, numbers in given:
            self.assertEqual(batch.tokens.shape, (1, rows, 32))
            self.assertEqual(trees_of(batch), numbers)
        self.assertCountEqual(itertools.chain(*(row for _, part in given for row in part)), range(80))
        self.assertEmpty([row for _, part in given[:-1] for row in part if not row])

    def test_a_limit_takes_the_same_rows_whatever_their_number_in_a_batch(self):
        trees = random_trees(7, 80)
        sets = []
        for rows in (1, 2, 5):
            given = batches.evaluation_batches(trees, max_length=32, rows=rows, limit=7)
            sets.append([row for _, part in given for row in part if row])
        self.assertLen(sets[0], 7)
        self.assertEqual(sets[0], sets[1])
        self.assertEqual(sets[0], sets[2])

    def test_a_host_fills_its_own_rows_of_each_batch(self):
        trees = random_trees(6, 30)
        options = dict(max_length=32, rows=4)
        for (own, numbers), (whole, all_numbers) in zip(
            batches.evaluation_batches(trees, local_rows=[3, 0], **options),
            batches.evaluation_batches(trees, **options),
            strict=True,
        ):
            assert_equal(own, whole.map(lambda array: array[:, [3, 0]]))
            self.assertEqual(numbers, all_numbers)


def tree_with_shared_prefix(number, seed):
    """A tree that begins with 50 + number, 1, 2 and then branches: two responses."""
    rng = np.random.default_rng(seed)
    head = np.array([50 + number, 1, 2], np.int32)
    tails = [np.concatenate([[10 + branch], rng.integers(20, 40, rng.integers(1, 5))]) for branch in range(2)]
    weights = rng.uniform(0.5, 2, 3).astype(np.float32)
    return prefix_tree.build_tree(
        [
            (
                np.concatenate([head, tail]).astype(np.int32),
                [
                    prefix_tree.Span(1, 3, float(weights[2]), -1),
                    prefix_tree.Span(4, 3 + len(tail), float(weights[branch]), branch),
                ],
            )
            for branch, tail in enumerate(tails)
        ]
    )


def targets_of(batch, b):
    """{(context, token): (weight, turn)} of a row, the context found by the mask; equal ones are added up."""
    found = {}
    indices = np.arange(batch.tokens.shape[1])
    for source, target, weight, turn in zip(
        batch.source[b], batch.target[b], batch.weight[b], batch.turn[b], strict=True
    ):
        if weight:
            visible = (indices <= source) & (source < batch.subtree_end[b])
            assert (batch.position[b][visible] == np.arange(visible.sum())).all()
            key = (tuple(batch.tokens[b][visible].tolist()), int(target))
            found[key] = (found.get(key, (0,))[0] + float(weight), int(turn))
    return found


class SharedPrefixTest(parameterized.TestCase):
    def test_picture(self):
        trees = stored(
            path([7, 8, 9], 2), path([7, 8, 5], 2), path([4, 4], 1), path([7, 8, 6, 6], 3), shared_prefix_length=2
        )
        batch = batches.fill_rows(trees, [[0, 2, 1, 3]], max_length=9)
        # fmt: off
        np.testing.assert_array_equal(batch.tokens,      [[7, 8, 9, 5, 6, 6, 4, 4, 0]])
        np.testing.assert_array_equal(batch.position,    [[0, 1, 2, 2, 2, 3, 0, 1, 0]])
        np.testing.assert_array_equal(batch.subtree_end, [[6, 6, 3, 4, 6, 6, 8, 8, 9]])
        np.testing.assert_array_equal(batch.segment,     [[1, 1, 1, 1, 1, 1, 2, 2, 0]])
        np.testing.assert_array_equal(batch.source,      [[1, 1, 4, 6, 0, 0, 0, 0, 0]])
        np.testing.assert_array_equal(batch.target,      [[9, 5, 6, 4, 0, 0, 0, 0, 0]])
        # fmt: on

    @parameterized.parameters(range(10))
    def test_targets_are_those_of_the_trees_alone_and_shared_ones_add_up(self, seed):
        rng = np.random.default_rng(seed)
        made = [tree_with_shared_prefix(int(rng.integers(3)), (seed, n)) for n in range(8)]
        trees = stored(*made, shared_prefix_length=3)
        row = rng.permutation(8).tolist()
        batch = batches.fill_rows(trees, [row], max_length=120)
        expected = {}
        for number in row:
            alone = batches.fill_rows(trees, [[number]], max_length=120)
            for key, (weight, turn) in targets_of(alone, 0).items():
                expected[key] = (expected.get(key, (0,))[0] + weight, turn)
        got = targets_of(batch, 0)
        self.assertEqual(got.keys(), expected.keys())
        for key in got:
            self.assertAlmostEqual(got[key][0], expected[key][0], places=5)
            self.assertEqual(got[key][1], expected[key][1])
        kinds = len({int(tree.tokens[0]) for tree in made})
        self.assertEqual((batch.segment > 0).sum(), sum(len(tree.tokens) for tree in made) - 3 * (8 - kinds))

    def test_plan_counts_a_shared_prefix_once(self):
        made = [tree_with_shared_prefix(n % 2, (0, n)) for n in range(40)]
        plan = plan_of(stored(*made, shared_prefix_length=3), max_length=64, rows=1)
        alone = plan_of(stored(*made), max_length=64, rows=1)
        self.assertLess(plan.rows_per_epoch, alone.rows_per_epoch)
        for some in (plan, alone):
            filled = sum(int((some.batch(step).segment > 0).sum()) for step in range(some.rows_per_epoch))
            self.assertEqual(filled, some.tokens_per_epoch)
        self.assertEqual(alone.tokens_per_epoch, sum(len(tree.tokens) for tree in made))


if __name__ == "__main__":
    absltest.main()
