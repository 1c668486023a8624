"""The check passes where one pass equals K passes, and fails, naming the place, for one pass broken in each way."""

import dataclasses
import math
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.batching import batches
from dialog_jax.dialogues import parsing
from dialog_jax.dialogues.dialogue import Dialogue, Message, Part
from dialog_jax.evaluation import agreement, differences
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training import loss, score_steps, train_step
from dialog_jax.training.trainable import Parameters
from dialog_jax.trees import dataset, prefix_tree
from tests.rendering import chat_templates, unwritten_records
from tests.training import tiny
from tests.trees import message_trees_test

_fill_rows = batches.fill_rows
_weighted_loss = loss.weighted_loss


def dialogues():
    """Three, the first of which has reasoning and weights."""
    contents = [
        "What is 12 plus 7?",
        "<think>\nten and nine\n</think>\n\n19.",
        "And twice that?",
        "<think>\n19 and 19\n</think>\n\n38.",
        "Thanks",
        "You are welcome.",
    ]
    weights = [1.0, 1.0, 1.0, 0.5, 1.0, 2.0]
    messages = [
        Message(role=("user", "assistant")[index % 2], content=content, weight=weight)
        for index, (content, weight) in enumerate(zip(contents, weights, strict=True))
    ]
    others = [chat_templates.random_dialogue(np.random.default_rng(n), turns=2, id=n) for n in (1, 2)]
    return [Dialogue(id=0, messages=tuple(messages), where="random[0]"), *others]


_made = {}


def once(make):
    """`make`, but what it made for a model is used again: rows can be broken without compiling anew."""

    def made(model, *args, **kwargs):
        if (make, model) not in _made:
            _made[make, model] = make(model, *args, **kwargs)
        return _made[make, model]

    return made


def compare(family="chatml", which=None, *, max_length=768):
    tokenizer = chat_templates.train_tokenizer(family)
    model = tiny.config(len(tokenizer))
    which = dialogues() if which is None else which
    parameters = Parameters(tiny.parameters(model), {})
    return agreement.compare(which, Renderer(tokenizer), model, parameters, max_length=max_length)


def compare_again(family):
    """The same with what earlier calls have compiled."""
    with (
        mock.patch.object(train_step, "make_train_step", once(train_step.make_train_step)),
        mock.patch.object(score_steps, "make_score_step", once(score_steps.make_score_step)),
    ):
        return compare(family)


def broken(change):
    """One pass whose rows `change` makes wrong; it is given their arrays and may write into them."""

    def fill_rows(*args, **kwargs):
        batch = _fill_rows(*args, **kwargs)
        change(batch)
        return batch

    return mock.patch.object(batches, "fill_rows", fill_rows)


def positions_go_on(batch):
    batch.position[:] = np.arange(batch.position.shape[1])


def mask_is_causal_only(batch):
    batch.subtree_end[:] = batch.subtree_end.shape[1]


def branches_are_seen_by_their_dialogue(batch):
    """Each token is visible to the end of its dialogue, as if trees did not branch."""
    for segment in range(1, batch.segment.max() + 1):
        (tokens,) = np.nonzero(batch.segment[0] == segment)
        batch.subtree_end[0, tokens] = tokens[-1] + 1


def source_is_one_too_early(batch):
    batch.source[batch.weight > 0] -= 1


def one_weight_is_lost(batch):
    batch.weight[0, 4] = 0


def one_weight_is_doubled(batch):
    batch.weight[0, 4] *= 2


def one_target_is_another_token(batch):
    batch.target[0, 4] += 1


def one_position_is_wrong(batch):
    batch.position[0, 3] += 1


class AgreementTest(parameterized.TestCase):
    @parameterized.parameters("chatml", "mistral")
    @pytest.mark.quick_every(2)
    def test_prefix_preserving_templates_pass(self, family):
        outcome = compare(family)
        self.assertTrue(outcome.passed, outcome)
        self.assertEmpty(outcome.left_out)
        self.assertEqual((outcome.dialogues, outcome.responses, outcome.rows), (3, 7, [outcome.rows[0]]))
        self.assertLess(outcome.one_pass_tokens, outcome.k_pass_tokens)
        for what, finding in outcome.findings.items():
            self.assertGreater(finding.compared, 0, what)

    def test_template_that_strips_reasoning_branches_and_passes(self):
        outcome = compare("qwen3")
        self.assertTrue(outcome.passed, outcome)
        self.assertGreater(outcome.branching, 0)
        self.assertEqual(outcome.findings["token ids"].compared, outcome.response_tokens)

    @pytest.mark.full
    def test_random_dialogues_in_several_rows_pass(self):
        rng = np.random.default_rng(3)
        drawn = [chat_templates.random_dialogue(rng, turns=3, reasoning=True, weights=True, id=n) for n in range(8)]
        outcome = compare("qwen3", drawn, max_length=400)
        self.assertTrue(outcome.passed, outcome)
        self.assertGreater(len(outcome.rows), 1)
        self.assertGreater(max(map(len, outcome.rows)), 1)

    @parameterized.parameters("chatml", "qwen3")
    @pytest.mark.full
    def test_message_trees_and_parts_pass(self, family):
        drawn = [message_trees_test.random_tree(n, reasoning=True, weights=True) for n in (0, 1)]
        parts = Message(
            role="assistant",
            content="ten and nine.",
            parts=(Part(text="ten", weight=0.0), Part(text=" and ", weight=0.25), Part(text="nine.", weight=2.0)),
        )
        question = Message(role="user", content="What is 12 plus 7?")
        drawn.append(Dialogue(id="p", messages=(question, parts)))
        only_the_end = dataclasses.replace(parts, parts=(Part(text=parts.content, weight=0.0),))
        drawn.append(Dialogue(id="q", messages=(question, only_the_end)))
        outcome = compare(family, drawn)
        self.assertTrue(outcome.passed, outcome)
        self.assertEqual(outcome.dialogues, 4)
        self.assertGreaterEqual(outcome.branching, 2)

    @pytest.mark.full
    def test_message_tree_larger_than_a_row_is_compared_in_several(self):
        tree = message_trees_test.random_tree(0)
        outcome = compare("chatml", [tree], max_length=90)
        self.assertTrue(outcome.passed, outcome)
        self.assertEqual(outcome.responses, sum(message.role == "assistant" for message in tree.messages))
        self.assertEmpty(outcome.left_out)
        self.assertGreater(len(outcome.rows), 1)

    def test_a_response_that_loses_its_call_is_left_out_and_no_disagreement(self):
        (dialogue,) = parsing.parse_records([unwritten_records.CALL_RECORD])
        outcome = compare("chatml", [dialogue])
        self.assertEqual((outcome.responses, outcome.findings["refusals"].beyond), (0, 0))
        (sentence,) = outcome.left_out
        self.assertStartsWith(sentence, "refused: dialogue 0 (records[0]): message 1: the chat template writes nothing")

    @pytest.mark.full
    def test_responses_longer_than_a_row_are_left_out_and_counted(self):
        tree = message_trees_test.random_tree(0)
        responses = sum(message.role == "assistant" for message in tree.messages)
        outcome = compare("chatml", [tree], max_length=60)
        self.assertTrue(outcome.passed, outcome)
        self.assertBetween(outcome.responses, 1, responses - 1)
        self.assertRegex(outcome.left_out[0], rf"{responses - outcome.responses} of {responses} responses, which")

    # Which findings must be beyond, at least, and what the first of them must say.
    @parameterized.named_parameters(
        ("positions", positions_go_on, "chatml", ("positions", "loss of a response", "gradient by parameter"), r"turn"),
        (
            "mask",
            mask_is_causal_only,
            "chatml",
            ("token ids", "loss of a row", "gradient direction"),
            r"they diverge at",
        ),
        ("branches", branches_are_seen_by_their_dialogue, "qwen3", ("token ids", "loss of a row"), r"dialogue 0"),
        ("source", source_is_one_too_early, "chatml", ("token ids", "loss of a row", "gradient norm"), r"token 0 "),
        ("lost", one_weight_is_lost, "chatml", ("token ids", "loss of a row"), r"token 4 "),
        ("doubled", one_weight_is_doubled, "chatml", ("weights", "loss of a row", "gradient norm"), r"token 4 "),
        ("target", one_target_is_another_token, "chatml", ("token ids", "weights", "loss of a row"), r"token 4 "),
        ("position", one_position_is_wrong, "chatml", ("positions", "loss of a response"), r": token 3 of its context"),
    )
    @pytest.mark.full
    def test_broken_row_fails_and_the_place_is_named(self, change, family, kinds, where):
        with broken(change):
            outcome = compare_again(family)
        self.assertFalse(outcome.passed)
        beyond = [what for what, finding in outcome.findings.items() if finding.beyond]
        self.assertContainsSubset(kinds, beyond)
        place = outcome.findings[kinds[0]].largest.where
        self.assertRegex(place, r"^dialogue \d \(random\[\d\]\), message \d")
        self.assertRegex(place, where)

    @pytest.mark.full
    def test_mask_that_ignores_branches_changes_nothing_where_there_are_none(self):
        with broken(branches_are_seen_by_their_dialogue):
            outcome = compare("chatml", dialogues()[:1])
        self.assertEqual(outcome.branching, 0)
        self.assertTrue(outcome.passed)

    @pytest.mark.full
    def test_wrong_gradient_of_a_right_loss_fails_and_the_parameter_is_named(self):
        def without_unembedding(hidden, unembedding, *rest, **kwargs):
            return _weighted_loss(hidden, jax.lax.stop_gradient(unembedding), *rest, **kwargs)

        with mock.patch.object(loss, "weighted_loss", without_unembedding):
            outcome = compare()
        beyond = [what for what, finding in outcome.findings.items() if finding.beyond]
        self.assertEqual(beyond, ["gradient norm", "gradient direction", "gradient by parameter"])
        self.assertEqual(outcome.findings["gradient by parameter"].largest.where, "embedding, row 0")
        self.assertEqual(outcome.findings["gradient by parameter"].beyond, 1)

    def test_wrong_loss_of_a_right_row_fails(self):
        def too_much(model, *, compute_dtype):
            scored = make(model, compute_dtype=compute_dtype)

            def score(parameters, batch):
                scores = scored(parameters, batch)
                return scores._replace(nll=scores.nll.at[0, 6].multiply(1.001))

            return score

        make = score_steps.make_score_step
        with mock.patch.object(score_steps, "make_score_step", too_much):
            outcome = compare()
        beyond = {what: finding.beyond for what, finding in outcome.findings.items() if finding.beyond}
        self.assertEqual(beyond, {"loss of a response": 1})

    def test_tokenizer_that_truncates_fails(self):
        self.addCleanup(chat_templates.train_tokenizer("chatml").backend_tokenizer.no_truncation)

        def truncating(renderer, *args, **kwargs):
            renderer.tokenizer.backend_tokenizer.enable_truncation(40)
            return render(renderer, *args, **kwargs)

        self.addCleanup(chat_templates.train_tokenizer("chatml").backend_tokenizer.no_truncation)
        render = agreement.Renderer.render
        with mock.patch.object(agreement.Renderer, "render", truncating):
            outcome = compare()
        self.assertFalse(outcome.passed)

    def test_weights_that_are_not_finite_fail(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        model = tiny.config(len(tokenizer))
        parameters = tiny.parameters(model)
        parameters["final_norm"] = parameters["final_norm"].at[0].set(math.nan)
        outcome = agreement.compare(dialogues(), Renderer(tokenizer), model, Parameters(parameters, {}), max_length=768)
        self.assertFalse(outcome.passed)
        self.assertEqual(outcome.findings["loss of a response"].largest.size, math.inf)


class LeftOutTest(absltest.TestCase):
    def test_refused_dialogues_are_named_and_the_others_compared(self):
        system = dialogues()[1]
        system = dataclasses.replace(system, id="s", messages=(Message(role="system", content="Hi"), *system.messages))
        outcome = compare("gemma", [system, dialogues()[2]])
        self.assertTrue(outcome.passed, outcome)
        self.assertEqual(outcome.dialogues, 1)
        (line,) = outcome.left_out
        self.assertRegex(line, r"^refused: dialogue s .* System role not supported")

    def test_refusal_by_one_side_only_fails(self):
        def accept(dialogue, **_):
            return []

        system = dataclasses.replace(dialogues()[1], messages=(Message(role="system", content="Hi"),))
        with mock.patch.object(agreement.k_passes, "make_passes", accept):
            outcome = compare("gemma", [system])
        self.assertFalse(outcome.passed)
        self.assertEqual(outcome.findings["refusals"].beyond, 1)

    @pytest.mark.full
    def test_responses_that_exceed_the_row_are_counted_and_the_others_compared(self):
        first = dialogues()[0]
        lengths = [
            len(one.tokens) for one in agreement.k_passes.make_passes(first, chat_templates.train_tokenizer("chatml"))
        ]
        outcome = compare("chatml", [first], max_length=lengths[1])
        self.assertTrue(outcome.passed, outcome)
        self.assertEqual(outcome.responses, 2)
        self.assertRegex(outcome.left_out[0], r"dialogue 0 \(random\[0\]\): 1 of 3 responses, which exceed")

    def test_nothing_compared_is_not_passed(self):
        outcome = compare("chatml", [dialogues()[0]], max_length=20)
        self.assertFalse(outcome.passed)
        self.assertRegex(outcome.left_out[0], "3 of 3 responses")
        silent = dataclasses.replace(dialogues()[0], messages=dialogues()[0].messages[:1])
        outcome = compare("chatml", [silent])
        self.assertFalse(outcome.passed)
        self.assertRegex(outcome.left_out[0], "no assistant message has a weight above 0")
        self.assertFalse(compare("chatml", []).passed)


class ReadTargetsTest(absltest.TestCase):
    def test_context_is_read_off_the_mask(self):
        # h x a b / h x b u c, where both a b and c are supervised, behind a dialogue of two tokens.
        tree = prefix_tree.build_tree(
            [
                (np.array([10, 11, 12, 13], np.int32), [prefix_tree.Span(2, 4, 1.0, 0)]),
                (np.array([10, 11, 13, 14, 15], np.int32), [prefix_tree.Span(4, 5, 0.5, 1)]),
            ]
        )
        other = prefix_tree.build_tree([(np.array([7, 8], np.int32), [prefix_tree.Span(1, 2, 1.0, 0)])])
        trees = dataset.concatenate_trees([other, tree])
        batch = batches.fill_rows(trees, [[0, 1]], max_length=12)
        first, *found = differences.read_targets(batch, np.arange(12.0))
        self.assertEqual((first.context.tolist(), first.token), ([7], 8))
        self.assertEqual(
            [(target.context.tolist(), target.position.tolist(), target.token, target.weight) for target in found],
            [
                ([10, 11], [0, 1], 12, 1.0),
                ([10, 11, 12], [0, 1, 2], 13, 1.0),
                ([10, 11, 13, 14], [0, 1, 2, 3], 15, 0.5),
            ],
        )
        self.assertEqual([target.nll for target in found], [1.0, 2.0, 3.0])


class GradientTest(absltest.TestCase):
    def test_a_parameter_whose_sign_is_wrong_is_found_though_its_norm_is_right(self):
        right = {"layers": {"w": np.array([[3.0, 4.0], [1.0, 2.0]])}, "embedding": np.array([100.0, 0.0])}
        wrong = {"layers": {"w": np.array([[3.0, 4.0], [-1.0, -2.0]])}, "embedding": np.array([100.0, 0.0])}
        findings = differences.Agreement().findings
        differences.compare_gradients(wrong, right, "row 0", findings)
        largest = findings["gradient by parameter"].largest
        self.assertAlmostEqual(largest.size, 2.0)
        self.assertIn("layers/w[1]", largest.where)
        self.assertEqual(findings["gradient norm"].beyond, 0)
        self.assertEqual(findings["gradient direction"].beyond, 1)


if __name__ == "__main__":
    absltest.main()
