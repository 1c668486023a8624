"""Numbers and weights of responses from score files written by hand."""

import json
import math
import pathlib

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.errors import UserError
from dialog_jax.evaluation import selection

# (tokens, nll, nll_last, nll_none) of each turn.
_TURNS = {
    "a": [(4, 8.0, 8.0, 16.0), (2, 1.0, 3.0, 2.0)],
    7: [(10, 30.0, 30.0, 24.0)],
    "empty": [],
    "b": [(1, 0.5, 0.5, 0.0), (5, 10.0, 5.0, 20.0)],
}


def _records(turns=_TURNS):
    return [
        {
            "id": identifier,
            "content": f"{number:016x}",
            "tokens": 0,
            "nll": 0,
            "turns": [
                {"turn": k, "message": 2 * k + 1, "tokens": t, "nll": nll, "nll_last": last, "nll_none": none}
                for k, (t, nll, last, none) in enumerate(values)
            ],
        }
        for number, (identifier, values) in enumerate(turns.items())
    ]


class SelectionTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.create_tempdir().full_path)

    def read(self, records=None, name="scores.jsonl"):
        file = self.directory / name
        file.write_text("".join(json.dumps(record) + "\n" for record in records or _records()))
        return selection.read_scores(str(file))

    @parameterized.parameters(
        ("perplexity", [math.exp(2), math.exp(0.5), math.exp(3), math.exp(0.5), math.exp(2)]),
        ("ifd", [0.5, 0.5, 1.25, math.nan, 0.5]),
        ("history_gain", [0, 1, 0, 0, -1]),
        ("length", [4, 2, 10, 1, 5]),
        ("longest", [4, 2, 10, 1, 5]),
    )
    def test_values(self, name, expected):
        np.testing.assert_allclose(selection.measure(name, [self.read()]), expected)

    def test_rho_is_what_the_second_model_gains_per_token(self):
        tuned = _records()
        tuned[0]["turns"][0]["nll"] = 6.0
        tuned[1]["turns"][0]["nll"] = 31.0
        value = selection.measure("rho", [self.read(), self.read(tuned, "tuned.jsonl")])
        np.testing.assert_allclose(value, [0.5, 0, -0.1, 0, 0])

    @parameterized.parameters(
        ("length", {"keep": 0.4}, [0, 0, 1, 0, 1]),
        ("length", {"keep": 0.4, "prefer": "low"}, [0, 1, 0, 1, 0]),
        ("length", {"keep": 1e-9}, [0, 0, 1, 0, 0]),
        ("length", {"keep": 1.0}, [1, 1, 1, 1, 1]),
        ("length", {"threshold": 4.0}, [1, 0, 1, 0, 1]),
        ("length", {"threshold": 4.0, "prefer": "low"}, [1, 1, 0, 1, 0]),
        ("length", {}, [1.0, 0.6, 1.8, 0.2, 1.4]),
        ("length", {"prefer": "low"}, [1.0, 1.4, 0.2, 1.8, 0.6]),
        ("perplexity", {"keep": 0.4}, [0, 1, 0, 1, 0]),
        ("perplexity", {"threshold": 8.0}, [1, 1, 0, 1, 1]),
        ("perplexity", {}, [0.8, 1.6, 0.2, 1.6, 0.8]),
        # Above 1 and undefined: never kept, however large the share.
        ("ifd", {"keep": 1.0}, [1, 1, 0, 0, 1]),
        ("ifd", {"threshold": 0.1}, [1, 1, 0, 0, 1]),
        ("ifd", {}, [1, 1, 0, 0, 1]),
        ("history_gain", {"threshold": 0.5}, [0, 1, 0, 0, 0]),
    )
    def test_weights(self, name, options, expected):
        np.testing.assert_allclose(selection.choose(name, [self.read()], **options).weight, expected)

    def test_of_equal_values_some_are_kept_whatever_the_order_of_the_file(self):
        turns = {f"d{number}": [(3, 1.0, 1.0, 1.0)] * 2 for number in range(50)}
        kept = []
        for order in (list(turns), list(turns)[::-1]):
            scores = self.read(_records({name: turns[name] for name in order}))
            chosen = selection.choose("length", [scores], keep=0.3)
            names = [(identifier, k) for identifier in scores for k in range(2)]
            kept.append({name for name, weight in zip(names, chosen.weight, strict=True) if weight})
        self.assertLen(kept[0], 30)
        self.assertEqual(*kept)
        self.assertNotEqual(kept[0], set(names[:30]))

    def test_random_depends_on_seed_id_and_message_only(self):
        turns = {f"d{number}": [(3, 1.0, 1.0, 1.0)] * 2 for number in range(200)}
        scores = self.read(_records(turns))
        first = selection.measure("random", [scores], seed=1)
        np.testing.assert_array_equal(first, selection.measure("random", [scores], seed=1))
        self.assertLess(abs(np.corrcoef(first, selection.measure("random", [scores], seed=2))[0, 1]), 0.2)
        other = self.read(_records({"d9": [(8, 2.0, 2.0, 2.0)] * 2, "new": [(1, 1.0, 1.0, 1.0)]}))
        np.testing.assert_array_equal(selection.measure("random", [other], seed=1)[:2], first[18:20])
        self.assertBetween(first.mean(), 0.45, 0.55)

    def test_lines_have_every_dialogue_with_the_values(self):
        records = _records()
        records[3]["turns_cut"] = 2
        scores = self.read(records)
        lines = selection.make_lines(scores, selection.choose("ifd", [scores], keep=0.2))
        self.assertEqual([line["id"] for line in lines], ["a", 7, "empty", "b"])
        self.assertEqual(lines[3]["content"], f"{3:016x}")
        self.assertEqual(lines[3]["turns_cut"], 2)
        self.assertEqual(lines[1]["turns"], [{"turn": 0, "message": 1, "weight": 0.0, "value": 1.25}])
        self.assertIsNone(lines[3]["turns"][0]["value"])
        self.assertEqual(sum(turn["weight"] for line in lines for turn in line["turns"]), 1)

    def test_files_that_lack_what_is_needed_are_errors_with_the_remedy(self):
        bare = _records()
        for record in bare:
            for turn in record["turns"]:
                del turn["nll_last"], turn["nll_none"]
        with self.assertRaisesRegex(
            UserError, "ifd needs nll_none, .* turn 0 of dialogue a has not. .*--context=none or"
        ):
            selection.choose("ifd", [self.read(bare)], keep=0.5)
        with self.assertRaisesRegex(UserError, "history_gain needs nll_last.*--context=last or all"):
            selection.choose("history_gain", [self.read(bare)], keep=0.5)
        selection.choose("perplexity", [self.read(bare)], keep=0.5)
        for record, message in (
            ({"id": 1, "turns": []}, "scores.jsonl:2: lacks id, content or turns"),
            ({"id": 1, "content": "", "turns": [{"turn": 0}]}, "scores.jsonl:2: a turn lacks"),
            (bare[0], "scores.jsonl:2: has the id 'a' of an earlier line"),
        ):
            with self.assertRaisesRegex(UserError, message):
                self.read([bare[0], record])
        with self.assertRaisesRegex(UserError, "scores.jsonl: has no scored response"):
            self.read([bare[2]])
        with self.assertRaisesRegex(UserError, "--scores=none.jsonl: is not a file"):
            selection.read_scores("none.jsonl")

    def test_two_files_of_other_data_or_tokens_are_an_error(self):
        def other(change):
            records = _records()
            change(records)
            return [self.read(), self.read(records, "other.jsonl")]

        for change, message in (
            (lambda records: records.pop(), "1 dialogues are in only one of the files, such as 'b'"),
            (lambda records: records[1].update(content="x"), "dialogue 7 differs between the files"),
            (lambda records: records[1]["turns"][0].update(tokens=11), r"dialogue 7 has .*\(1, 10\).*\(1, 11\)"),
            (lambda records: records[0]["turns"].pop(), "dialogue a has the messages"),
        ):
            with self.assertRaisesRegex(UserError, message):
                selection.choose("rho", other(change), keep=0.5)
        with self.assertRaisesRegex(UserError, "--criterion=rho needs 2 files in --scores; got 1"):
            selection.choose("rho", [self.read()], keep=0.5)
        with self.assertRaisesRegex(UserError, "--criterion=ifd needs 1 file in --scores; got 2"):
            selection.choose("ifd", [self.read(), self.read()], keep=0.5)

    def test_keeping_nothing_is_an_error_with_the_range(self):
        with self.assertRaisesRegex(UserError, "length keeps no response: values are 1 to 10. Change --threshold"):
            selection.choose("length", [self.read()], threshold=11.0)


if __name__ == "__main__":
    absltest.main()
