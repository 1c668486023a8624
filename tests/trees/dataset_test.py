"""Prepared trees against a dictionary of prefixes built from `apply_chat_template`; cutting, counting and storing."""

import collections

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.dialogues import parsing
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.rendering import sequences as sequences_lib
from dialog_jax.rendering.written import KINDS
from dialog_jax.trees import dataset, dialogue_trees
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.laws import oracles
from tests.rendering import chat_templates, unwritten_records


def said(*messages, id=0):
    made = [Message(role=role, content=content, weight=float(*weight or [1])) for role, content, *weight in messages]
    return Dialogue(id=id, messages=tuple(made), where=f"said.jsonl:{id + 1}")


def turns(count, *, words=3, id=0, system=True):
    """A dialogue whose responses, "reply 0", "reply 1", ..., each stand once in it."""
    messages = [("system", "Be kind.")] if system else []
    for turn in range(count):
        messages += [("user", f"ask {turn} " + "you " * words), ("assistant", f"reply {turn}.")]
    return said(*messages, id=id)


def prepare(dialogues, *, family="chatml", max_length=10_000, truncate="turns", **objective):
    renderer = sequences_lib.Renderer(chat_templates.train_tokenizer(family))
    return dataset.prepare(
        dialogues,
        renderer,
        TreeConfig(objective=ObjectiveConfig(**objective), max_length=max_length, truncate=truncate),
    )


def sequences_of(dialogue, family):
    """(prompt ids, response ids) of every response of weight above 0."""
    return [(one.prompt, one.tokens) for one in oracles.responses(dialogue, family)]


def tree_size(sequences):
    """How many different prefixes sequences have."""
    joined = [prompt + response for prompt, response in sequences]
    return len({tuple(ids[:stop]) for ids in joined for stop in range(1, len(ids) + 1)})


def contexts(tree):
    """For each node, its ancestors and itself."""
    return [oracles.context(tree, node) for node in range(len(tree.tokens))]


class PrepareTest(parameterized.TestCase):
    @parameterized.product(family=("chatml", "llama3", "qwen3", "phi3"), seed=(0, 1, 2))
    def test_trees_are_the_prefixes_of_what_inference_sees(self, family, seed):
        rng = np.random.default_rng(seed)
        dialogues = [
            chat_templates.random_dialogue(
                rng, turns=count, system=True, reasoning=family == "qwen3", weights=seed == 2, id=count
            )
            for count in (1, 2, 3, 5)
        ]
        trees = prepare(dialogues, family=family)
        numbers = {id: number for number, id in enumerate(trees.ids)}
        for dialogue in dialogues:
            weights = [m.weight for m in dialogue.messages if m.role == "assistant"]
            trained = [turn for turn, weight in enumerate(weights) if weight]
            self.assertEqual(dialogue.id in numbers, bool(trained))
            if not trained:
                continue
            prefixes = {}  # prefix -> (weight, turn)
            for turn, (prompt, response) in zip(trained, sequences_of(dialogue, family), strict=True):
                ids = prompt + response
                for i in range(1, len(ids) + 1):
                    if i > len(prompt):
                        prefixes[tuple(ids[:i])] = (weights[turn], turn)
                    else:
                        prefixes.setdefault(tuple(ids[:i]), (0, -1))
            tree = trees.tree(numbers[dialogue.id])
            for path in contexts(tree):
                node = path[-1]
                self.assertEqual(prefixes.pop(tuple(tree.tokens[path].tolist())), (tree.weight[node], tree.turn[node]))
                self.assertEqual(tree.position[node], len(path) - 1)
                visible = [j for j in range(node + 1) if node < tree.subtree_end[j]]
                self.assertEqual(visible, path)
            self.assertEmpty(prefixes)

    @pytest.mark.full
    def test_many_dialogues_keep_their_order_over_batches(self):
        dialogues = [turns(1 + id % 3, id=id) for id in range(600)]
        renderer = sequences_lib.Renderer(chat_templates.train_tokenizer("chatml"))
        trees = dataset.prepare(iter(dialogues), renderer, TreeConfig(max_length=500))
        self.assertEqual(list(trees.ids), list(range(600)))
        tokenizer = chat_templates.train_tokenizer("chatml")
        for number in (0, 255, 256, 599):
            text = tokenizer.decode(trees.tree(number).tokens)
            self.assertIn(f"reply {number % 3}", text)
            self.assertNotIn(f"reply {number % 3 + 1}", text)

    def test_sizes_count_tokens_and_targets_of_each_tree(self):
        trees = prepare([turns(1), turns(3, id=1)])
        tokens, targets = trees.sizes()
        self.assertEqual(tokens.tolist(), [len(trees.tree(n).tokens) for n in range(2)])
        expected = [sum(len(response) for _, response in sequences_of(turns(n), "chatml")) for n in (1, 3)]
        self.assertEqual(targets.tolist(), expected)

    def test_the_report_counts_trees_tokens_targets_turns_and_branches(self):
        dialogues = [turns(2, id=0), said(("user", "a"), id=1), turns(3, id=2)]
        for family in ("chatml", "qwen3"):
            pairs = [list(sequences_of(dialogues[i], family)) for i in (0, 2)]
            report = prepare(dialogues, family=family).report
            self.assertEqual((report.dialogues, report.trees, report.turns), (3, 2, 5))
            self.assertEqual(report.tokens, sum(map(tree_size, pairs)))
            self.assertEqual(report.targets, sum(len(response) for pair in pairs for _, response in pair))
            self.assertEqual(report.branching, 2 if family == "qwen3" else 0)
            self.assertEqual(report.dropped_no_target, 1)
            self.assertEqual(report.named, {"dropped, no target": ["dialogue 1 (said.jsonl:2)"]})
            self.assertIn("1 dropped, no target: dialogue 1 (said.jsonl:2)", str(report))

    @pytest.mark.full
    def test_a_report_names_at_most_some_and_counts_all(self):
        report = prepare([turns(1), *(said(("user", "a"), id=id) for id in range(1, 1100))]).report
        self.assertEqual(report.dropped_no_target, 1099)
        self.assertLen(report.named["dropped, no target"], 1000)
        self.assertIn("and 1,096 more", str(report))

    def test_no_target_in_the_whole_set_is_an_error(self):
        with self.assertRaisesRegex(ValueError, r"(?s)None of 2 dialogues has a target.*said.jsonl:1.*said.jsonl:2"):
            prepare([said(("user", "a"), ("assistant", "b", 0)), said(("user", "a"), id=1)])

    def test_an_unknown_truncation_lists_those_there_are(self):
        with self.assertRaisesRegex(ValueError, "truncate is 'cut'; it must be one of split, turns, drop, error"):
            prepare([turns(1)], truncate="cut")

    def test_a_template_s_refusal_is_passed_on(self):
        with self.assertRaisesRegex(ValueError, r"dialogue 300 \(said.jsonl:301\).*refuses"):
            prepare([turns(1, system=False, id=id) for id in range(300)] + [turns(1, id=300)], family="gemma")


class TruncateTest(parameterized.TestCase):
    @parameterized.product(family=("chatml", "qwen3"), seed=(0, 1, 2, 3))
    def test_turns_keeps_the_responses_that_fit(self, family, seed):
        rng = np.random.default_rng(seed)
        dialogue = chat_templates.random_dialogue(rng, turns=6, system=True, reasoning=family == "qwen3")
        pairs = list(sequences_of(dialogue, family))
        sizes = [len(prompt) + len(response) for prompt, response in pairs]
        for max_length in {*sizes, *(size - 1 for size in sizes)}:
            fitting = {turn for turn, size in enumerate(sizes) if size <= max_length}
            if not fitting:
                with self.assertRaisesRegex(ValueError, f"within {max_length:,} tokens"):
                    prepare([dialogue], family=family, max_length=max_length, truncate="turns")
                continue
            trees = prepare([dialogue], family=family, max_length=max_length, truncate="turns")
            size = tree_size([pairs[turn] for turn in fitting])
            self.assertEqual(len(trees.tokens) - trees.report.repeated, size)
            self.assertLessEqual(trees.sizes()[0].max(), max_length)
            self.assertEqual(set(trees.turn[trees.weight > 0]), fitting)
            report = trees.report
            self.assertEqual(
                (report.turns, report.turns_cut, report.cut), (len(fitting), 6 - len(fitting), len(fitting) < 6)
            )

    @parameterized.parameters("turns", "split", "drop", "error")
    def test_tree_larger_than_a_row_is_divided_and_loses_nothing(self, truncate):
        """Six turns of 60 words of reasoning, which history drops: no sequence is long, and the tree is."""
        messages = [
            (role, text)
            for turn in range(6)
            for role, text in (
                ("user", f"ask {turn}"),
                ("assistant", f"<think>\n{' '.join(['so'] * 60)} {turn}\n</think>\n\nreply {turn}."),
            )
        ]
        dialogue = said(*messages)
        pairs = list(sequences_of(dialogue, "qwen3"))
        max_length = max(len(prompt) + len(response) for prompt, response in pairs)
        trees = prepare([dialogue], family="qwen3", max_length=max_length, truncate=truncate)
        self.assertGreater(tree_size(pairs), 3 * max_length)
        self.assertLessEqual(trees.sizes()[0].max(), max_length)
        found = collections.Counter()
        for number in range(len(trees)):
            tree = trees.tree(number)
            for node in np.flatnonzero(tree.weight > 0).tolist():
                found[tuple(tree.tokens[oracles.context(tree, node)].tolist())] += 1
        expected = {tuple((p + r)[:stop]) for p, r in pairs for stop in range(len(p) + 1, len(p + r) + 1)}
        self.assertEqual(found, dict.fromkeys(expected, 1))
        report = trees.report
        self.assertEqual((report.turns, report.turns_cut, report.turns_shortened), (6, 0, 0))
        self.assertEqual((report.divided, report.parts), (1, len(trees)))
        self.assertBetween(report.parts_needed, 3, len(trees))
        self.assertEqual(report.repeated, len(trees.tokens) - tree_size(pairs))
        self.assertIn(f"1 trees larger than a row, divided into {len(trees)} (at least", str(report))

    def test_last_counts_its_own_sequence_only(self):
        dialogue = chat_templates.random_dialogue(np.random.default_rng(0), turns=5, reasoning=True)
        prompt, response = list(sequences_of(dialogue, "qwen3"))[-1]
        lengths = [len(p) + len(r) for p, r in sequences_of(dialogue, "qwen3")]
        trees = prepare([dialogue], family="qwen3", name="last", max_length=max(lengths))
        self.assertEqual(trees.tokens.tolist(), prompt + response)
        self.assertEqual(trees.report.shortened, 0)

    def test_drop_leaves_out_what_is_too_long_and_names_it(self):
        trees = prepare([turns(2), turns(30, id=1), turns(1, id=2)], truncate="drop", max_length=200)
        self.assertEqual(trees.ids, (0, 2))
        self.assertEqual((trees.report.dropped_too_long, trees.report.turns_cut), (1, 30))
        self.assertIn("1 dropped, too long: dialogue 1 (said.jsonl:2)", str(trees.report))

    def test_error_refuses_what_is_too_long(self):
        self.assertLen(prepare([turns(2)], truncate="error", max_length=200), 1)
        with self.assertRaisesRegex(ValueError, r"dialogue 1 \(said.jsonl:2\).* max_length = 200 tokens. Raise"):
            prepare([turns(2), turns(30, id=1)], truncate="error", max_length=200)

    @parameterized.parameters("turns", "drop", "split")
    def test_a_prompt_that_is_too_long_by_itself_is_counted_and_named(self, truncate):
        trees = prepare([turns(1), turns(2, words=300, id=1)], truncate=truncate, max_length=200)
        self.assertEqual(trees.ids, (0,))
        self.assertEqual((trees.report.dropped_too_long, trees.report.turns_cut), (1, 2))
        (named,) = trees.report.named["dropped, too long"]
        self.assertStartsWith(named, "dialogue 1 (said.jsonl:2), no turn of which fits 200 tokens")
        with self.assertRaisesRegex(ValueError, r"(?s)None of 1 dialogues.*200 tokens.*dialogue 1 \(said.jsonl:2\)"):
            prepare([turns(2, words=300, id=1)], truncate=truncate, max_length=200)

    @parameterized.parameters("joint", "roles")
    def test_too_long_without_a_response_is_not_called_without_target(self, name):
        dialogues = [turns(1), said(("user", "you " * 300), id=1)]
        report = prepare(dialogues, name=name, roles=("user",), max_length=200).report
        self.assertEqual((report.dropped_too_long, report.dropped_no_target), (1, 0))


class SplitTest(parameterized.TestCase):
    def responses(self, trees, family="chatml"):
        """(turn, decoded targets) of all trees, in order, and the decoded text of each tree's longest path."""
        tokenizer = chat_templates.train_tokenizer(family)
        found, texts = [], []
        for number in range(len(trees)):
            tree = trees.tree(number)
            for turn in np.unique(tree.turn[(tree.weight > 0) & (tree.turn >= 0)]).tolist():
                found.append((turn, tokenizer.decode(tree.tokens[(tree.turn == turn) & (tree.weight > 0)])))
            texts.append(tokenizer.decode(tree.tokens[max(contexts(tree), key=len)]))
        return found, texts

    @parameterized.product(max_length=(60, 90, 200, 333), words=(1, 6))
    def test_every_response_is_trained_once_in_its_turn(self, max_length, words):
        trees = prepare([turns(25, words=words)], truncate="split", max_length=max_length)
        found, texts = self.responses(trees)
        self.assertEqual(found, [(turn, f"reply {turn}.<|im_end|>") for turn in range(25)])
        self.assertLessEqual(trees.sizes()[0].max(), max_length)
        self.assertEqual(set(trees.ids), {0})
        report = trees.report
        self.assertEqual((report.turns, report.turns_cut, report.shortened), (25, 0, 1))
        system, asked = "<|im_start|>system\nBe kind.<|im_end|>\n", 0
        for text in texts:
            self.assertStartsWith(text, system + "<|im_start|>user\nask ")
            first = int(text.removeprefix(system + "<|im_start|>user\nask ").split()[0])
            last = text.count("reply ") + first
            self.assertLessEqual(first, asked)  # no turn is left out between the pieces
            for turn in range(first, last):
                self.assertIn(f"ask {turn} " + "you " * words + "<|im_end|>", text)
            asked = last
        self.assertEqual(asked, 25)

    def test_history_fills_up_to_half_of_the_row(self):
        trees = prepare([turns(40)], truncate="split", max_length=300)
        for number in range(1, len(trees)):
            tree = trees.tree(number)
            history = int(np.flatnonzero(tree.weight > 0)[0])
            self.assertBetween(history, 300 // 2 - 60, 300 // 2)  # a turn has fewer than 60 tokens

    def test_a_response_that_fits_nowhere_is_left_out_and_the_others_stay(self):
        before, after = turns(3).messages, turns(6, system=False).messages[6:]
        giant = (Message(role="user", content="you " * 300), Message(role="assistant", content="too late"))
        dialogue = Dialogue(id=0, messages=before + giant + after, where="said.jsonl:1")
        trees = prepare([dialogue], truncate="split", max_length=100)
        found, texts = self.responses(trees)
        self.assertEqual(found, [(n + (n > 2), f"reply {n}.<|im_end|>") for n in range(6)])
        self.assertNotIn("too late", "".join(texts))
        self.assertEqual((trees.report.turns, trees.report.turns_cut, trees.report.shortened), (6, 1, 1))

    def test_untrained_turns_before_a_response_do_not_make_it_too_long(self):
        silent = [m for n in range(20) for m in (("user", f"ask {n} you you"), ("assistant", f"no {n}.", 0))]
        dialogue = said(*silent, ("user", "and now?"), ("assistant", "reply 20."))
        found, texts = self.responses(prepare([dialogue], truncate="split", max_length=120))
        self.assertEqual(found, [(20, "reply 20.<|im_end|>")])
        self.assertIn("no 19.", texts[0])

    @parameterized.parameters(range(4))
    def test_branching_dialogues_are_split_too(self, seed):
        dialogue = chat_templates.random_dialogue(np.random.default_rng(seed), turns=12, system=True, reasoning=True)
        trees = prepare([dialogue], family="qwen3", truncate="split", max_length=300)
        tokenizer = chat_templates.train_tokenizer("qwen3")
        expected = [(n, tokenizer.decode(r)) for n, (_, r) in enumerate(sequences_of(dialogue, "qwen3"))]
        self.assertEqual(sorted(self.responses(trees, "qwen3")[0]), expected)
        self.assertGreater(len(trees), 1)
        self.assertLessEqual(trees.sizes()[0].max(), 300)

    @parameterized.parameters("conditional", "joint")
    def test_the_pieces_of_a_dialogue_sum_to_one(self, name):
        trees = prepare([turns(12), turns(1, id=1)], max_length=80, truncate="split", name=name, normalize="dialogue")
        self.assertGreater(len(trees), 3)
        sums = collections.Counter()
        for number, id in enumerate(trees.ids):
            sums[id] += float(trees.tree(number).weight.sum())
        np.testing.assert_allclose([sums[0], sums[1]], 1, rtol=1e-5)

    def test_last_trains_the_last_response_of_all_pieces(self):
        found, _ = self.responses(prepare([turns(25)], truncate="split", max_length=100, name="last"))
        self.assertEqual(found, [(24, "reply 24.<|im_end|>")])

    def test_the_turn_schedule_runs_over_all_pieces(self):
        trees = prepare([turns(12)], truncate="split", max_length=150, turn_discount=0.5)
        self.assertGreater(len(trees), 1)
        for turn in range(12):
            weights = trees.weight[(trees.turn == turn) & (trees.weight > 0)]
            np.testing.assert_array_equal(weights, 0.5 ** (11 - turn))

    @parameterized.parameters("joint", "roles")
    def test_no_message_is_trained_twice(self, name):
        trees = prepare([turns(20)], truncate="split", max_length=150, name=name, roles=("system", "user", "assistant"))
        tokenizer = chat_templates.train_tokenizer("chatml")
        counts = collections.Counter()
        for number in range(len(trees)):
            tree = trees.tree(number)
            text = tokenizer.decode(np.where(tree.weight > 0, tree.tokens, tokenizer.pad_token_id))
            counts.update(piece for n in range(20) for piece in (f"ask {n} ", f"reply {n}.") if piece in text)
            counts.update(["Be kind."] * text.count("Be kind."))
        self.assertEqual(
            counts, {"Be kind.": 1, **{f"ask {n} ": 1 for n in range(20)}, **{f"reply {n}.": 1 for n in range(20)}}
        )
        if name == "joint":  # nor is the text around them
            self.assertEqual(int((trees.weight > 0).sum()), prepare([turns(20)], name=name).report.targets)


class UnwrittenTest(parameterized.TestCase):
    """What records say and the template does not write; `tests/audit/figures_test.py` has the same for the audit."""

    def prepare(self, records, template, *, responses="rendered", on_error="stop"):
        tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
        tokenizer.chat_template = template
        renderer = sequences_lib.Renderer(tokenizer, responses=responses)
        dialogues = parsing.parse_records(records)
        return tokenizer, dataset.prepare(dialogues, renderer, TreeConfig(max_length=1000, on_error=on_error))

    @parameterized.parameters("rendered", "verbatim")
    def test_a_call_of_which_nothing_is_written_is_an_error(self, responses):
        message = r"^dialogue 0 \(records\[0\]\): message 1: .* \(call 'tide'\); the response would be '<\|im_end\|>'"
        with self.assertRaisesRegex(UserError, message):
            self.prepare([unwritten_records.CALL_RECORD], chat_templates.TEMPLATES["chatml"], responses=responses)

    def test_a_call_of_which_nothing_is_written_is_skipped_if_errors_are(self):
        records = [unwritten_records.CALL_RECORD, unwritten_records.HELLO_RECORD]
        _, trees = self.prepare(records, chat_templates.TEMPLATES["chatml"], on_error="skip")
        self.assertEqual((list(trees.ids), trees.report.skipped, trees.report.turns), ([1], 1, 1))
        self.assertStartsWith(trees.skipped[0], "dialogue 0 (records[0]): message 1: the chat template writes nothing")

    def test_each_kind_is_counted_and_named(self):
        _, trees = self.prepare(unwritten_records.RECORDS, unwritten_records.CUTTING_TEMPLATE)
        places = unwritten_records.PLACES
        counts = {kind: count for kind, count in trees.report.unwritten.items() if count}
        self.assertEqual(counts, {kind: len(places[kind]) for kind in places})
        self.assertEqual(trees.report.named, {KINDS[kind][0]: places[kind] for kind in places})
        self.assertIn(
            "2 responses whose reasoning the chat template does not write: dialogue 0 (records[0]): message 1; "
            "dialogue 1 (records[1]): message 1 (set data.responses=verbatim, or",
            str(trees.report),
        )

    def test_an_answer_inside_the_reasoning_that_the_prompt_begins_is_counted_and_named(self):
        template = unwritten_records.CUTTING_TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
        _, trees = self.prepare([unwritten_records.HELLO_RECORD], template, responses="verbatim")
        self.assertEqual({kind: count for kind, count in trees.report.unwritten.items() if count}, {"reasoning_end": 1})
        self.assertIn("dialogue 0 (records[0]): message 1: its prompt ends with <think>", str(trees.report))

    def test_verbatim_trains_the_reasoning_that_the_template_cuts(self):
        for responses, target in (
            ("rendered", "42.<|im_end|>"),
            ("verbatim", "<think>Six times seven.</think>42.<|im_end|>"),
        ):
            tokenizer, trees = self.prepare(
                unwritten_records.RECORDS[:1], unwritten_records.CUTTING_TEMPLATE, responses=responses
            )
            tree = trees.tree(0)
            self.assertEqual(tokenizer.decode(tree.tokens[tree.weight > 0]), target)
            self.assertEqual(trees.report.unwritten["reasoning"], int(responses == "rendered"))

    def test_an_empty_message_is_no_error(self):
        record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
        _, trees = self.prepare([record], chat_templates.TEMPLATES["chatml"])
        self.assertEqual((trees.report.turns, trees.report.named), (1, {}))

    def test_calls_and_results_escaped_as_json_count_as_written(self):
        template = chat_templates.TEMPLATES["chatml"].replace(
            "message.content +", "message.content | tojson + (message.tool_calls or '') | tojson +"
        )
        record = {
            "messages": [
                {"role": "user", "content": 'Say "é".'},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "say", "arguments": {"text": '"é"\n'}}]},
                {"role": "tool", "content": '{"said": "\\"é\\"", "at": [6, null]}'},
                {"role": "assistant", "content": 'I said "é".\n'},
            ]
        }
        _, trees = self.prepare([record], template)
        self.assertEqual((trees.report.turns, trees.report.named), (2, {}))

    def test_what_a_shared_history_lacks_is_counted_once(self):
        record = {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "6:10"}],
            "continuations": ["Hello!", "At six."],
        }
        _, trees = self.prepare([record], unwritten_records.CUTTING_TEMPLATE)
        self.assertEqual(trees.report.named, {KINDS["message"][0]: ["dialogue 0 (records[0]): message 1: tool"]})


class ReportTest(absltest.TestCase):
    def test_report_with_a_file_of_names_counts_and_points_to_it(self):
        counts = {"dialogues": 9, "trees": 9, "tokens": 90, "targets": 9, "turns": 9, dialogue_trees.CUT: 2}
        report = dataset.make_report(counts, {dialogue_trees.CUT: ["dialogue a", "dialogue b"]})
        self.assertIn("2 with responses left out: dialogue a; dialogue b (raise max_length", str(report))
        text = report.format("trees/*/report.json")
        self.assertIn("2 with responses left out, listed in trees/*/report.json (raise max_length", text)
        self.assertNotIn("dialogue a", text)


if __name__ == "__main__":
    absltest.main()
