"""Weights from a file: they multiply those of the data, and what was not scored as it is now is an error."""

import json
import pathlib

from absl.testing import absltest, parameterized

from dialog_jax.dialogues import holdout, parsing, weight_file
from dialog_jax.errors import UserError

_RECORDS = (
    {
        "id": "a",
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!", "weight": 0.5},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Ciao.", "train": False},
            {"role": "user", "content": "Really?"},
            {"role": "assistant", "content": "Yes."},
        ],
    },
    {"prompt": "2 + 2", "completion": "4"},
)


def _parse(records=_RECORDS):
    return list(parsing.parse_records(records, source="data"))


def _line(dialogue, weights, **changes):
    turns = [
        {"turn": number, "message": message, "weight": weight, "value": None}
        for number, (message, weight) in enumerate(weights.items())
    ]
    return {"id": dialogue.id, "content": holdout.format_hash(dialogue), "turns": turns, **changes}


class WeightFileTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.file = pathlib.Path(self.create_tempdir().full_path) / "weights.jsonl"

    def apply(self, lines, records=_RECORDS):
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return list(weight_file.read_file(self.file).apply(_parse(records)))

    def weights(self, dialogues):
        return [[message.weight for message in dialogue.messages] for dialogue in dialogues]

    def test_what_is_written_is_read(self):
        lines = [_line(dialogue, {1: 0.5}) for dialogue in _parse()]
        weight_file.write_file(self.file, lines)
        written = weight_file.read_file(self.file)
        self.assertEqual(written.entries["a"], (lines[0]["content"], {1: 0.5}, 0))
        self.assertLen(written.digest, 64)

    def test_weights_multiply_those_of_the_data(self):
        first, second = _parse()
        dialogues = self.apply([_line(second, {1: 0.0}), _line(first, {1: 0.25, 5: 2.0})])
        self.assertEqual(self.weights(dialogues), [[1, 0.125, 1, 0, 1, 2], [1, 0]])
        self.assertEqual([dialogue.id for dialogue in dialogues], ["a", 1])
        self.assertEqual([dialogue.where for dialogue in dialogues], ["data[0]", "data[1]"])

    def test_responses_that_were_too_long_to_be_scored_have_weight_0(self):
        first, second = _parse()
        dialogues = self.apply([_line(first, {1: 1.0}, turns_cut=1), _line(second, {1: 1.0})])
        self.assertEqual(self.weights(dialogues), [[1, 0.5, 1, 0, 1, 0], [1, 1]])

    def test_a_dialogue_without_a_line_is_an_error_of_its_own(self):
        first, _ = _parse()
        dialogue, error = self.apply([_line(first, {1: 1.0, 5: 1.0})])
        self.assertEqual(dialogue.id, "a")
        self.assertIsInstance(error, UserError)
        self.assertRegex(
            str(error), r"dialogue 1 \(data\[1\]\): weights.jsonl has no line with this id. Score the data"
        )

    @parameterized.named_parameters(
        ("other text", lambda a, b: ([a, {**b, "content": "0" * 16}], None), r"dialogue 1 .*has changed since"),
        ("other message", lambda a, b: ([a, {**b, "turns": [{**b["turns"][0], "message": 0}]}], None), "no response"),
        (
            "response without weight",
            lambda a, b: ([{**a, "turns": a["turns"][:1]}, b], None),
            "1 of its responses have",
        ),
        (
            "fewer cut",
            lambda a, b: ([{**a, "turns_cut": 1}, b], None),
            "0 of its responses .* of which 1 were too long",
        ),
        ("line without dialogue", lambda a, b: ([a, b, {**b, "id": "c"}], None), "1 lines .* such as that of 'c'"),
        ("same id", lambda a, b: ([a, b], [*_RECORDS, _RECORDS[0]]), r"dialogue a \(data\[2\]\): an earlier dialogue"),
        ("same line", lambda a, b: ([a, b, b], None), "jsonl:3: has the id 1 of an earlier line"),
        (
            "no weight",
            lambda a, b: ([a, {**b, "turns": [{"message": 1}]}], None),
            "jsonl:2: is not a line of a weight file",
        ),
        (
            "negative",
            lambda a, b: ([a, {**b, "turns": [{"message": 1, "weight": -1}]}], None),
            "jsonl:2: has an invalid id",
        ),
        ("no object", lambda a, b: ([a, 3], None), "jsonl:2: is not a line of a weight file"),
    )
    def test_what_does_not_match_is_an_error_with_its_place(self, make, message):
        first, second = _parse()
        lines, records = make(_line(first, {1: 1.0, 5: 1.0}), _line(second, {1: 1.0}))
        with self.assertRaisesRegex(UserError, message):
            self.apply(lines, records or _RECORDS)

    def test_order_and_weights_of_the_data_are_no_change(self):
        first, second = _parse()
        lines = [_line(first, {1: 1.0, 5: 1.0}), _line(second, {1: 1.0})]
        heavier = [_RECORDS[1] | {"id": 1}, {**_RECORDS[0], "weight": 3.0}]
        self.assertEqual(self.weights(self.apply(lines, heavier)), [[1, 1], [3, 1.5, 3, 0, 3, 3]])

    def test_a_missing_or_broken_file_is_an_error(self):
        with self.assertRaisesRegex(
            UserError, "data.weights=none.jsonl: is not a file. Make it with dialog_jax select"
        ):
            weight_file.read_file("none.jsonl")
        self.file.write_text(json.dumps({"id": 0})[:-1] + "\n")
        with self.assertRaisesRegex(UserError, "weights.jsonl:1: not JSON"):
            weight_file.read_file(self.file)


if __name__ == "__main__":
    absltest.main()
