"""Message trees: against a dictionary of prefixes made message by message, and against their paths as dialogues."""

import collections
import dataclasses

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.rendering import sequences
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from tests.rendering import chat_templates
from tests.trees.dataset_test import contexts, prepare, sequences_of

_WORDS = ("ten", "kind", "12", "Paris", "no, thank you", "why so", "it is")


def random_tree(seed, *, messages=14, reasoning=False, weights=False):
    """A user message and what follows it; every message has up to three answers, each of its own first letter."""
    rng = np.random.default_rng(seed)
    made, parents, answers = [Message(role="user", content="Begin.")], [-1], collections.Counter()
    while len(made) < messages:
        parent = int(rng.integers(len(made)))
        if answers[parent] == 3:
            continue
        role = "assistant" if made[parent].role == "user" else "user"
        content = f"{'ABC'[answers[parent]]} {rng.choice(_WORDS)} {len(made)}."
        if reasoning and role == "assistant":
            content = f"<think>\n{rng.choice(_WORDS)} {len(made)}\n</think>\n\n{content}"
        weight = float(rng.choice([0.0, 0.5, 1.0, 2.0])) if weights else 1.0
        made.append(Message(role=role, content=content, weight=weight))
        parents.append(parent)
        answers[parent] += 1
    return Dialogue(id=seed, messages=tuple(made), parents=tuple(parents), where=f"tree.jsonl:{seed + 1}")


def paths_of(dialogue):
    """Each root-to-leaf path as a list of message numbers, by walking down from the root."""
    found, walks = [], [[0]]
    while walks:
        walk = walks.pop(0)
        children = [i for i, parent in enumerate(dialogue.parents) if parent == walk[-1]]
        found += [] if children else [walk]
        walks += [[*walk, child] for child in children]
    return found


def path_dialogue(dialogue, path, *, train=None):
    """The path as a dialogue of its own; only the messages in `train`, if given, are trained on."""
    messages = [dialogue.messages[i] for i in path]
    if train is not None:
        kept = zip(path, messages, strict=True)
        messages = [m if i in train else dataclasses.replace(m, weight=0.0) for i, m in kept]
    return Dialogue(id=dialogue.id, messages=tuple(messages))


def weights_by_prefix(tree):
    return {tuple(tree.tokens[path].tolist()): float(tree.weight[path[-1]]) for path in contexts(tree)}


class OnceTest(parameterized.TestCase):
    """`merge_weights=max`, the default: each message is trained once."""

    def expected(self, dialogue, family, factor=lambda message: 1.0):
        """prefix -> weight, from every response with the history that leads to it."""
        found = collections.Counter()
        for index, message in enumerate(dialogue.messages):
            if message.role != "assistant" or not message.weight:
                continue
            path = [*dialogue.ancestors(index), index]
            ((prompt, response),) = sequences_of(path_dialogue(dialogue, path, train={index}), family)
            for stop in range(1, len(prompt) + len(response) + 1):
                weight = message.weight * factor(index) if stop > len(prompt) else 0
                found[tuple((prompt + response)[:stop])] += weight
        return found

    @parameterized.product(family=("chatml", "qwen3", "llama3"), seed=(0, 1, 2, 3), weights=(False, True))
    def test_each_response_is_trained_once_after_its_own_history(self, family, seed, weights):
        dialogue = random_tree(seed, reasoning=family == "qwen3", weights=weights)
        trees = prepare([dialogue], family=family)
        self.assertLen(trees, 1)
        self.assertEqual(weights_by_prefix(trees.tree(0)), self.expected(dialogue, family))
        responses = sum(m.role == "assistant" and m.weight > 0 for m in dialogue.messages)
        self.assertEqual(trees.report.turns, responses)

    @parameterized.parameters(range(4))
    def test_turns_are_counted_along_each_path(self, seed):
        dialogue = random_tree(seed)
        tree = prepare([dialogue]).tree(0)
        tokenizer = chat_templates.train_tokenizer("chatml")
        for path in contexts(tree):
            if tree.weight[path[-1]] > 0:
                text = tokenizer.decode(tree.tokens[path[:-1]])
                self.assertEqual(tree.turn[path[-1]], text.count("<|im_start|>assistant") - 1)

    @parameterized.parameters(range(4))
    def test_a_shared_response_has_the_largest_schedule_of_its_paths(self, seed):
        dialogue = random_tree(seed)
        paths = paths_of(dialogue)

        def factor(index):
            def schedule(path):
                responses = [i for i in path if dialogue.messages[i].role == "assistant"]
                return 0.5 ** (len(responses) - 1 - responses.index(index))

            return max(schedule(path) for path in paths if index in path)

        tree = prepare([dialogue], turn_discount=0.5).tree(0)
        self.assertEqual(weights_by_prefix(tree), self.expected(dialogue, "chatml", factor))

    @parameterized.parameters(range(4))
    def test_last_trains_what_is_last_in_some_path(self, seed):
        dialogue = random_tree(seed)
        last = {max(i for i in path if dialogue.messages[i].role == "assistant") for path in paths_of(dialogue)}
        tree = prepare([dialogue], name="last").tree(0)
        expected = self.expected(dialogue, "chatml", lambda index: float(index in last))
        self.assertEqual(
            {prefix: weight for prefix, weight in weights_by_prefix(tree).items() if weight},
            {prefix: weight for prefix, weight in expected.items() if weight},
        )

    @parameterized.product(seed=(0, 1, 2), objective=("joint", "roles"))
    def test_text_outside_responses_counts_once(self, seed, objective):
        dialogue = random_tree(seed)
        options = {"name": objective, "roles": ("user", "assistant")}
        expected = {}
        for path in paths_of(dialogue):
            alone = weights_by_prefix(prepare([path_dialogue(dialogue, path)], **options).tree(0))
            expected |= {prefix: max(weight, expected.get(prefix, 0)) for prefix, weight in alone.items()}
        self.assertEqual(weights_by_prefix(prepare([dialogue], **options).tree(0)), expected)

    def test_normalize_turn_makes_each_response_a_mean(self):
        dialogue = random_tree(1)
        expected = collections.Counter()
        for index, message in enumerate(dialogue.messages):
            if message.role == "assistant":
                path = [*dialogue.ancestors(index), index]
                ((prompt, response),) = sequences_of(path_dialogue(dialogue, path, train={index}), "chatml")
                for stop in range(len(prompt) + 1, len(prompt) + len(response) + 1):
                    expected[tuple((prompt + response)[:stop])] += 1 / len(response)
        got = {p: w for p, w in weights_by_prefix(prepare([dialogue], normalize="turn").tree(0)).items() if w}
        self.assertEqual(got.keys(), expected.keys())
        np.testing.assert_allclose(list(got.values()), [expected[prefix] for prefix in got], rtol=1e-6)


class SumTest(parameterized.TestCase):
    """`merge_weights=sum`: as if each path were a dialogue of its own."""

    @parameterized.product(
        seed=(0, 1),
        family=("chatml", "qwen3"),
        objective=(
            {},
            {"turn_discount": 0.5},
            {"turn_weights": (1.0, 0.0, 2.0)},
            {"name": "last"},
            {"name": "roles", "roles": ("user",)},
            {"name": "joint"},
            {"normalize": "turn"},
        ),
    )
    @pytest.mark.quick_every(5)
    def test_weights_add_up_over_paths(self, seed, family, objective):
        dialogue = random_tree(seed, reasoning=family == "qwen3", weights="name" in objective)
        expected = collections.Counter()
        for path in paths_of(dialogue):
            with_targets = [m.role == "user" or m.weight > 0 for m in path_dialogue(dialogue, path).messages]
            if not any(with_targets):
                continue
            try:
                alone = prepare([path_dialogue(dialogue, path)], family=family, **objective)
            except ValueError as error:
                self.assertIn("has a target", str(error))
                continue
            for prefix, weight in weights_by_prefix(alone.tree(0)).items():
                expected[prefix] += weight
        got = weights_by_prefix(prepare([dialogue], family=family, merge_weights="sum", **objective).tree(0))
        got, expected = ({p: w for p, w in d.items() if w} for d in (got, expected))
        self.assertEqual(got.keys(), expected.keys())
        np.testing.assert_allclose([got[p] for p in got], [expected[p] for p in got], rtol=1e-6)

    def test_of_one_path_sum_and_max_are_one(self):
        dialogue = chat_templates.random_dialogue(np.random.default_rng(0), turns=3)
        first, second = (prepare([dialogue], name="joint", merge_weights=merge).tree(0) for merge in ("sum", "max"))
        np.testing.assert_array_equal(first.weight, second.weight)


class TruncationTest(parameterized.TestCase):
    def prepare(self, dialogues, max_length, **options):
        return prepare(dialogues, max_length=max_length, **options)

    @parameterized.product(seed=(0, 1, 2, 3), truncate=("turns", "split"), name=("conditional", "last", "joint"))
    @pytest.mark.quick_every(5)
    def test_trees_fit_and_no_response_is_trained_twice(self, seed, truncate, name):
        dialogue = random_tree(seed, messages=20)
        size = len(prepare([dialogue]).tree(0).tokens)
        for max_length in (size // 4, size // 2):
            trees = prepare([dialogue], max_length=max_length, truncate=truncate, name=name)
            tokenizer = chat_templates.train_tokenizer("chatml")
            found = collections.Counter()
            for number in range(len(trees)):
                tree = trees.tree(number)
                self.assertLessEqual(len(tree.tokens), max_length)
                ends = np.flatnonzero((tree.turn >= 0) & (tree.weight > 0))
                ends = [n for n in ends if tree.tokens[n] == tokenizer.convert_tokens_to_ids("<|im_end|>")]
                for node in ends:
                    path = [node]
                    while tree.parent[path[-1]] >= 0:
                        path.append(int(tree.parent[path[-1]]))
                    found[tokenizer.decode(tree.tokens[path[::-1]]).rsplit("assistant\n")[-1]] += 1
            self.assertEqual(set(found.values()), {1})
            all_responses = sum(m.role == "assistant" for m in dialogue.messages)
            if truncate == "split" and name == "conditional":
                self.assertEqual(found.total() + trees.report.turns_cut, all_responses)
            self.assertEqual(found.total(), trees.report.turns)

    def test_split_trains_what_turns_cuts(self):
        dialogue = random_tree(5, messages=24)
        longest = int(prepare([dialogue]).tree(0).position.max()) + 1
        cut, split = (prepare([dialogue], max_length=longest - 1, truncate=how).report for how in ("turns", "split"))
        self.assertGreater(split.turns, cut.turns)
        self.assertEqual(split.turns, sum(m.role == "assistant" for m in dialogue.messages))
        self.assertEqual((split.shortened, split.turns_cut), (1, 0))

    def test_error_and_drop(self):
        dialogue = random_tree(0)
        with self.assertRaisesRegex(ValueError, r"dialogue 0 \(tree.jsonl:1\): has more than max_length"):
            prepare([dialogue], max_length=60, truncate="error")
        whole = random_tree(1, messages=2)
        report = prepare([dialogue, whole], max_length=60, truncate="drop").report
        self.assertEqual((report.dropped_too_long, report.trees), (1, 1))


class BatchTest(absltest.TestCase):
    @pytest.mark.full
    def test_trees_among_lists_keep_their_order(self):
        rng = np.random.default_rng(0)
        dialogues = [
            random_tree(n, messages=5) if n % 3 == 0 else chat_templates.random_dialogue(rng, turns=2, id=n)
            for n in range(300)
        ]
        renderer = sequences.Renderer(chat_templates.train_tokenizer("chatml"))
        together = dataset.prepare(dialogues, renderer, TreeConfig(max_length=2000))
        self.assertEqual(list(together.ids), list(range(300)))
        for number in (0, 1, 255, 256, 258, 299):
            alone = dataset.prepare([dialogues[number]], renderer, TreeConfig(max_length=2000))
            np.testing.assert_array_equal(together.tree(number).tokens, alone.tree(0).tokens)
            np.testing.assert_array_equal(together.tree(number).weight, alone.tree(0).weight)


if __name__ == "__main__":
    absltest.main()
