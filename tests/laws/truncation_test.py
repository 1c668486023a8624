"""Cutting to length: what is kept and what is counted as cut are all there is, and what is kept is what it was."""

import collections

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from dialog_jax.dialogues.dialogue import Dialogue
from tests.laws import budget, oracles, strategies
from tests.laws.targets_test import prepare

_FAMILIES = ("chatml", "llama3", "qwen3", "gemma", "mistral")


def wanted(dialogue):
    return [i for i, message in enumerate(dialogue.messages) if message.role == "assistant" and message.weight > 0]


def fitting(dialogue, family, max_length):
    """The responses whose own sequences, prompt and response, have at most `max_length` tokens."""
    ones = (oracles.response(dialogue, message, family) for message in wanted(dialogue))
    return {one.message for one in ones if len(one.prompt + one.tokens) <= max_length}


@st.composite
def distinct(draw, records):
    """A record with other words in each message, a few of them much longer than the others."""
    record = draw(records)
    messages = []
    for number, message in enumerate(record["messages"]):
        text = f"{number} {message['content']}" * draw(st.sampled_from([1, 1, 1, 6]))
        messages.append({**message, "content": text})
    return {**record, "messages": messages}


def lengths(data, dialogue, family):
    """A limit at which something is likely to be cut."""
    size = len(oracles.nodes(dialogue, family))
    return data.draw(st.integers(2, max(2, size + 1)), label="max_length")


class TurnsTest(parameterized.TestCase):
    @parameterized.parameters(*_FAMILIES)
    @budget.cases(25)
    @hypothesis.given(data=st.data())
    def test_turns_trains_every_response_that_fits_once_behind_all_of_its_history(self, family, data):
        (dialogue,) = strategies.parsed([data.draw(strategies.records(family))])
        objective = data.draw(st.sampled_from([{}, {"turn_discount": 0.5}, {"normalize": "dialogue"}]))
        max_length = lengths(data, dialogue, family)
        kept = fitting(dialogue, family, max_length)
        expected = collections.Counter()
        for one, weights in oracles.response_weights(dialogue, objective, family, kept=kept):
            for n, weight in enumerate(weights):
                expected[tuple(one.prompt + one.tokens[:n]), one.tokens[n]] += weight
        trees = prepare([dialogue], family, max_length=max_length, truncate="turns", **objective)
        self.assertEqual(trees is None, not kept)
        if trees is None:
            return
        report, size = trees.report, len(oracles.nodes(dialogue, family, kept=kept))
        self.assertLessEqual(trees.sizes()[0].max(), max_length)
        self.assertEqual((report.turns, report.turns_cut), (len(kept), len(wanted(dialogue)) - len(kept)))
        self.assertEqual(report.cut, int(report.turns_cut > 0))
        self.assertEqual((report.divided, len(trees) > 1), (int(size > max_length), size > max_length))
        self.assertEqual(report.repeated, report.tokens - size)
        found = [target for number in range(len(trees)) for target in oracles.tree_targets(trees.tree(number))]
        self.assertLen({target[:2] for target in found}, len(found))  # no target is in two trees
        got = oracles.added_up(found)
        self.assertEqual(got.keys(), expected.keys())
        np.testing.assert_allclose([got[key] for key in got], [expected[key] for key in got], rtol=1e-5)

    @parameterized.parameters(*_FAMILIES)
    @budget.cases(15)
    @hypothesis.given(data=st.data())
    def test_drop_and_error_take_whole_dialogues_only(self, family, data):
        (dialogue,) = strategies.parsed([data.draw(strategies.records(family))])
        max_length = lengths(data, dialogue, family)
        whole = len(fitting(dialogue, family, max_length)) == len(wanted(dialogue))
        if not wanted(dialogue):
            return
        dropped = prepare([dialogue], family, max_length=max_length, truncate="drop")
        self.assertEqual(dropped is not None, whole)
        if whole:
            kept = prepare([dialogue], family, max_length=max_length, truncate="error")
            self.assertCountEqual(
                [target for number in range(len(kept)) for target in oracles.tree_targets(kept.tree(number))],
                oracles.tree_targets(prepare([dialogue], family).tree(0)),
            )
        else:
            with self.assertRaisesRegex(ValueError, r"dialogue 0 \(records\[0\]\): has more than max_length"):
                prepare([dialogue], family, max_length=max_length, truncate="error")


class SplitTest(parameterized.TestCase):
    """Each response that can be trained at all is trained once, behind as much of its history as the trees say."""

    def histories(self, dialogue, message, family):
        """The response behind each history that a piece may give it, from the shortest on."""
        path = oracles.path_to(dialogue, message)
        system = int(dialogue.messages[path[0]].role == "system")
        roles = [dialogue.messages[index].role for index in path]
        users = [place for place in range(system, len(path) - 1) if roles[place] == "user"]
        # The last user message and the last answers to it with tool results; then all from a user message on. Tool
        # results stay with their calls, and the response with the results before it.
        last = len(path) - 1
        messages = [dialogue.messages[index] for index in path]
        calls = [bool(message.fields.get("tool_calls")) for message in messages]
        starts = [
            place
            for place in range(users[-1] + 1 if users else last + 1, len(path))
            if roles[place] == "assistant"
            and not calls[place - 1]
            and (roles[place - 1] != "tool" or (place < last and calls[place]))
        ]
        starts = starts or ([users[-1] + 1] if users else [])
        kept_messages = [[*path[:system], path[users[-1]], *path[start:]] for start in reversed(starts)]
        kept_messages += [path[:system] + path[start:] for start in reversed(users)]
        for kept in [*kept_messages, path]:
            part = Dialogue(id=0, messages=tuple(dialogue.messages[i] for i in kept))
            yield oracles.response(part, len(kept) - 1, family)

    @parameterized.parameters(*_FAMILIES)
    @budget.cases(25)
    @hypothesis.given(data=st.data())
    def test_split_trains_each_response_once_or_counts_it(self, family, data):
        kinds = st.one_of(
            strategies.lists(family, max_turns=6, kind="words"), strategies.message_trees(family, kind="words")
        )
        (dialogue,) = strategies.parsed([data.draw(distinct(kinds))])
        max_length = lengths(data, dialogue, family)
        trees = prepare([dialogue], family, max_length=max_length, truncate="split")
        found = collections.Counter()
        turns = {}
        for number in range(0 if trees is None else len(trees)):
            self.assertLessEqual(len(trees.tree(number).tokens), max_length)
            for context, token, weight, turn in oracles.tree_targets(trees.tree(number)):
                found[context, token] += weight
                turns[context, token] = turn
        trained = set()
        for message in wanted(dialogue):
            histories = list(self.histories(dialogue, message, family))
            path = oracles.path_to(dialogue, message)
            turn = sum(dialogue.messages[i].role == "assistant" for i in path) - 1
            behind = {tuple(one.prompt): one for one in histories}
            used = [one for one in behind.values() if (tuple(one.prompt + one.tokens[:-1]), one.tokens[-1]) in found]
            self.assertLessEqual(len(used), 1)
            fits = len(histories[0].prompt + histories[0].tokens) <= max_length
            self.assertEqual(bool(used), fits)
            if len(histories[-1].prompt + histories[-1].tokens) <= max_length:  # its history is complete
                self.assertEqual(used, [behind[tuple(histories[-1].prompt)]])
            for one in used:
                trained.add(message)
                for n, token in enumerate(one.tokens):
                    key = (tuple(one.prompt + one.tokens[:n]), token)
                    # Two responses to one history may begin alike; what is left must be the other's.
                    found[key] -= dialogue.messages[message].weight
                    self.assertEqual(turns[key], turn)
        self.assertEqual({key: weight for key, weight in found.items() if abs(weight) > 1e-5}, {})
        if trees is not None:
            self.assertEqual(trees.report.turns, len(trained))
            self.assertEqual(trees.report.turns + trees.report.turns_cut, len(wanted(dialogue)))


if __name__ == "__main__":
    absltest.main()
