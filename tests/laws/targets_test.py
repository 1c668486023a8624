"""Every target appears exactly once, behind exactly its context: from dialogues to trees, and from trees to batches."""

import collections
import itertools

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.batching import batches
from dialog_jax.rendering import sequences as sequences_lib
from dialog_jax.trees import dataset, fitting, objectives, prefix_tree
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.laws import budget, oracles, strategies
from tests.rendering import chat_templates


def prepare(dialogues, family, *, max_length=100_000, truncate="turns", share_prefixes=False, **objective):
    """Trees; None where nothing is trained on."""
    try:
        return dataset.prepare(
            dialogues,
            sequences_lib.Renderer(chat_templates.train_tokenizer(family)),
            TreeConfig(
                objective=ObjectiveConfig(**objective),
                max_length=max_length,
                truncate=truncate,
                share_prefixes=share_prefixes,
            ),
        )
    except ValueError as error:
        if "has a target under objective" not in str(error):
            raise
        return None


class DialoguesTest(parameterized.TestCase):
    def check(self, dialogues, family, objective):
        trees = prepare(dialogues, family, **objective)
        numbers = {} if trees is None else {id: number for number, id in enumerate(trees.ids)}
        for dialogue in dialogues:
            expected = oracles.targets(dialogue, objective, family)
            self.assertEqual(dialogue.id in numbers, bool(expected))
            if not expected:
                continue
            tree = trees.tree(numbers[dialogue.id])
            found = oracles.tree_targets(tree)
            self.assertLen({(context, token) for context, token, _, _ in found}, len(found))
            got = {(context, token): (weight, turn) for context, token, weight, turn in found}
            self.assertEqual(got.keys(), expected.keys())
            np.testing.assert_allclose([got[key][0] for key in got], [expected[key][0] for key in got], rtol=1e-5)
            self.assertEqual([got[key][1] for key in got], [expected[key][1] for key in got])

    @parameterized.parameters(*chat_templates.FAMILIES)
    @budget.cases(30)
    @hypothesis.given(data=st.data())
    def test_a_tree_has_the_targets_of_its_responses_one_by_one(self, family, data):
        records = data.draw(st.lists(strategies.records(family), min_size=1, max_size=3))
        self.check(strategies.parsed(records), family, data.draw(strategies.objectives))

    @parameterized.parameters(*strategies.BYTE_LEVEL)
    @budget.cases(30)
    @hypothesis.given(data=st.data())
    def test_tokens_of_parts_have_the_weight_of_the_part_they_end_in(self, family, data):
        record = data.draw(strategies.records(family, kind="parts"))
        self.check(strategies.parsed([record]), family, data.draw(strategies.objectives))

    @parameterized.parameters(*chat_templates.FAMILIES)
    @budget.cases(8)
    @hypothesis.given(data=st.data())
    def test_a_tree_has_each_beginning_once_and_no_other_token(self, family, data):
        dialogues = strategies.parsed([data.draw(strategies.records(family))])
        trees = prepare(dialogues, family)
        if trees is not None:
            tree = trees.tree(0)
            found = [tuple(tree.tokens[oracles.context(tree, node)].tolist()) for node in range(len(tree.tokens))]
            self.assertLen(set(found), len(found))
            self.assertEqual(set(found), oracles.nodes(dialogues[0], family))


class LeavesTest(parameterized.TestCase):
    def untrimmed(self, dialogue, family, objective):
        """{(context, token): (weight, turn)} of the tree of all that is rendered, wherever it ends."""
        renderer = sequences_lib.Renderer(chat_templates.train_tokenizer(family))
        config = ObjectiveConfig(**objective)
        pieces = fitting.unfold(dialogue, config)
        rendered = renderer.render(
            [p.dialogue for p in pieces], full=config.needs_full_rendering, locate=config.needs_span
        )
        pieces = [piece._replace(sequences=list(own)) for piece, own in zip(pieces, rendered, strict=True)]
        factors = fitting.compute_factors(dialogue, pieces, config)
        found = []
        for piece, own in zip(pieces, factors, strict=True):
            spans = objectives.supervise(piece.sequences, piece.dialogue, config, own, context=piece.context)
            number = piece.path if config.merge_weights == "sum" else 0
            turned = [[s._replace(turn=s.turn + piece.omitted_turns * (s.turn >= 0)) for s in some] for some in spans]
            found += [(sequence.tokens, some, number) for sequence, some in zip(piece.sequences, turned, strict=True)]
        if not found:
            return {}
        tree = prefix_tree.build_tree([(tokens, some) for tokens, some, _ in found], [number for *_, number in found])
        (tree,) = prefix_tree.normalize([tree], config.normalize)
        return {(context, token): (weight, turn) for context, token, weight, turn in oracles.tree_targets(tree)}

    @parameterized.parameters("chatml", "qwen3", "mistral")
    @budget.cases(40)
    @hypothesis.given(data=st.data())
    def test_trees_end_with_targets_and_have_all_of_them(self, family, data):
        """Nothing behind the last target of a path: of messages of weight 0, or of no interest to the objective."""
        dialogues = strategies.parsed([data.draw(strategies.records(family))])
        objective = data.draw(st.one_of(strategies.objectives, strategies.objectives_of_all))
        try:
            trees = prepare(dialogues, family, **objective)
        except ValueError as error:  # a template that cannot place a message
            hypothesis.assume("changes more than" not in str(error))
            raise
        expected = self.untrimmed(dialogues[0], family, objective)
        self.assertEqual(trees is None, not expected)
        if trees is None:
            return
        tree = trees.tree(0)
        leaves = set(range(len(tree.tokens))) - set(tree.parent.tolist())
        self.assertTrue(all(tree.weight[leaf] > 0 for leaf in leaves), tree.weight)
        got = {(context, token): (weight, turn) for context, token, weight, turn in oracles.tree_targets(tree)}
        self.assertEqual(got, expected)


class BuildTreeTest(absltest.TestCase):
    @budget.cases(150)
    @hypothesis.given(data=st.data())
    def test_weights_of_responses_add_up_and_others_do_not_path_by_path(self, data):
        sequences = data.draw(st.lists(strategies.strings(min_length=1), min_size=1, max_size=5))
        paths = sorted(data.draw(st.lists(st.integers(0, 2), min_size=len(sequences), max_size=len(sequences))))
        tree = strategies.built(sequences, paths)
        expected = {}
        for (ids, spans), path in zip(sequences, paths, strict=True):
            for stop in range(1, len(ids) + 1):
                sums, _ = expected.setdefault(tuple(ids[:stop]), (collections.defaultdict(lambda: [0.0, 0.0]), [-1]))
                _, turns = expected[tuple(ids[:stop])]
                for begin, end, weight, turn in spans:
                    if begin < stop <= end:
                        of_responses, others = sums[path]
                        added = turn >= 0
                        sums[path] = [of_responses + added * weight, others if added else max(others, weight)]
                        turns.append(turn)
        got = {}
        for node in range(len(tree.tokens)):
            prefix = tuple(tree.tokens[oracles.context(tree, node)].tolist())
            self.assertNotIn(prefix, got)
            got[prefix] = (float(tree.weight[node]), int(tree.turn[node]))
        wanted = {
            prefix: (sum(max(pair) for pair in sums.values()) if len(prefix) > 1 else 0.0, max(turns))
            for prefix, (sums, turns) in expected.items()
        }
        self.assertEqual(got, wanted)


@st.composite
def row_lengths(draw, trees):
    """A max_length, often no larger than the largest tree."""
    tokens, _ = trees.sizes()
    return int(tokens.max()) + draw(st.sampled_from([0, 0, 1, 5, 30]))


class EpochTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    @budget.cases(80)
    @hypothesis.given(data=st.data())
    def test_an_epoch_has_every_target_of_every_tree_once(self, shared_prefixes, data):
        trees = strategies.stored(data.draw(strategies.forests(shared_prefixes=shared_prefixes)))
        plan = batches.Plan(
            trees,
            max_length=data.draw(row_lengths(trees)),
            rows=data.draw(st.sampled_from([1, 2, 4])),
            micro_batches=data.draw(st.sampled_from([1, 2, 3])),
            seed=data.draw(st.integers(0, 2**40)),
        )
        rows = len(plan.rows(0))
        expected = [target for number in range(len(trees)) for target in oracles.tree_targets(trees.tree(number))]
        epochs = 3
        given = [row for step in range(-(-epochs * plan.rows_per_epoch // rows)) for row in plan.rows(step)]
        for epoch in range(epochs):
            part = given[epoch * plan.rows_per_epoch : (epoch + 1) * plan.rows_per_epoch]
            self.assertCountEqual([tree for row in part for tree in row], range(len(trees)))
        found, taken, step = [], 0, 0
        while taken < plan.rows_per_epoch:
            batch = plan.batch(step).map(lambda array: array.reshape(rows, -1))
            batch = batch.map(lambda array, left=plan.rows_per_epoch - taken: array[:left])
            found += oracles.row_targets(batch)
            taken, step = taken + rows, step + 1
        if not shared_prefixes:
            self.assertCountEqual(found, expected)
        got, wanted = oracles.added_up(found), oracles.added_up(expected)
        self.assertEqual(got.keys(), wanted.keys())
        np.testing.assert_allclose([got[key] for key in got], [wanted[key] for key in got], rtol=1e-6)

    @budget.cases(40)
    @hypothesis.given(data=st.data())
    def test_evaluation_has_every_target_once(self, data):
        trees = strategies.stored(data.draw(strategies.forests()))
        options = {"max_length": data.draw(row_lengths(trees)), "rows": data.draw(st.integers(1, 5))}
        given = [batch for batch, _ in batches.evaluation_batches(trees, **options)]
        expected = [target for number in range(len(trees)) for target in oracles.tree_targets(trees.tree(number))]
        self.assertCountEqual([target for batch in given for target in oracles.row_targets(batch)], expected)

    @parameterized.parameters("chatml", "qwen3", "mistral")
    @budget.cases(8)
    @hypothesis.given(data=st.data())
    def test_packed_dialogues_have_the_targets_of_their_responses(self, family, data):
        """From records to batches at once, with a shared system prompt or without."""
        records = data.draw(st.lists(strategies.records(family), min_size=1, max_size=6))
        dialogues = strategies.parsed(records)
        trees = prepare(dialogues, family, share_prefixes=data.draw(st.booleans()))
        expected = collections.Counter()
        for dialogue in dialogues:
            for key, (weight, _) in oracles.targets(dialogue, {}, family).items():
                expected[key] += weight
        self.assertEqual(trees is None, not expected)
        if trees is None:
            return
        plan = batches.Plan(
            trees, max_length=data.draw(row_lengths(trees)), rows=1, micro_batches=1, seed=data.draw(st.integers(0, 99))
        )
        found = [target for step in range(plan.rows_per_epoch) for target in oracles.row_targets(plan.batch(step))]
        got = oracles.added_up(found)
        self.assertEqual(got.keys(), expected.keys())
        np.testing.assert_allclose([got[key] for key in got], [expected[key] for key in got], rtol=1e-5)


class HostsTest(absltest.TestCase):
    @budget.cases(60)
    @hypothesis.given(data=st.data())
    def test_hosts_together_have_the_whole_batch(self, data):
        trees = strategies.stored(data.draw(strategies.forests(shared_prefixes=True)))
        rows = data.draw(st.sampled_from([1, 2, 4, 6]))
        options = {
            "max_length": data.draw(row_lengths(trees)),
            "rows": rows,
            "micro_batches": data.draw(st.integers(1, 3)),
            "seed": 5,
        }
        cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
        order = data.draw(st.permutations(range(rows)))
        shares = [order[start:stop] for start, stop in itertools.pairwise(cuts)]
        plan, step = batches.Plan(trees, **options), data.draw(st.sampled_from([0, 1, 7]))
        whole, parts = plan.batch(step), [plan.batch(step, own) for own in shares]
        for name, array in whole._asdict().items():
            if array is not None:
                joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
                np.testing.assert_array_equal(joined, array[:, order], err_msg=name)


class PlanTest(absltest.TestCase):
    @budget.cases(60)
    @hypothesis.given(data=st.data())
    def test_a_batch_is_a_function_of_seed_and_step(self, data):
        trees = strategies.stored(data.draw(strategies.forests(shared_prefixes=True)))
        options = {
            "max_length": data.draw(row_lengths(trees)),
            "rows": 2,
            "micro_batches": 2,
            "seed": data.draw(st.integers(0, 9)),
        }
        asked = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
        plan = batches.Plan(trees, **options)
        for step in asked:
            first, fresh = plan.batch(step), batches.Plan(trees, **options).batch(step)
            for name, array in first._asdict().items():
                np.testing.assert_array_equal(array, getattr(fresh, name), err_msg=name)


if __name__ == "__main__":
    absltest.main()
