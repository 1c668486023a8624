"""Records that are read one by one, however bad the one before, and refused dialogues between others."""

import json
import pathlib
import tempfile

from absl.testing import absltest

from dialog_jax.audit import inspection
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.parsing import iterate_dialogues, read_dialogues
from dialog_jax.rendering import sequences
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.rendering import chat_templates

_GOOD = {"prompt": "Hi", "completion": "Hello!"}


class EachDialogueTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / "data.jsonl"

    def test_bad_lines_stand_in_their_places_and_the_others_are_read(self):
        lines = [
            b"\xef\xbb\xbf" + json.dumps(_GOOD).encode(),
            b'{"messages": [',
            b"",
            b'{"messages": [{"role": "bot", "content": "Hi"}]}',
            b"\xff\xfe",
            json.dumps({**_GOOD, "prompt": "a\u2028b"}, ensure_ascii=False).encode() + b"\r",
        ]
        self.path.write_bytes(b"\n".join(lines))
        found = list(iterate_dialogues(self.path))
        self.assertEqual([isinstance(one, Dialogue) for one in found], [True, False, False, False, True])
        self.assertEqual([one.where for one in (found[0], found[4])], ["data.jsonl:1", "data.jsonl:6"])
        self.assertEqual([one.id for one in (found[0], found[4])], [0, 4])
        self.assertRegex(str(found[1]), r"^data\.jsonl:2: not JSON")
        self.assertRegex(str(found[2]), r"^dialogue 2 \(data\.jsonl:4\): message 0 has role 'bot'")
        self.assertRegex(str(found[3]), r"^data\.jsonl:5: .*not UTF-8")

    def test_good_files_are_read_as_by_read_dialogues(self):
        records = [_GOOD, {"messages": [{"role": "user", "content": "a\rb"}], "id": "x"}]
        self.path.write_text("\n".join(map(json.dumps, records)))
        array = self.path.with_suffix(".json")
        array.write_text(json.dumps(records))
        for path in (self.path, array):
            self.assertEqual(list(iterate_dialogues(path)), list(read_dialogues(path)))

    def test_file_that_is_not_there_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "no such file"):
            list(iterate_dialogues(self.path))

    def test_empty_file_has_no_records(self):
        self.path.write_text("\n")
        self.assertEmpty(list(iterate_dialogues(self.path)))


class RenderTest(absltest.TestCase):
    def test_refused_dialogues_do_not_take_others_with_them(self):
        renderer = sequences.Renderer(chat_templates.train_tokenizer("gemma"))
        path = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / "data.jsonl"
        unanswered = {"messages": [{"role": "assistant", "content": "Hi"}]}
        path.write_text("\n".join(map(json.dumps, [_GOOD, unanswered, _GOOD])))
        good, refused, again = inspection.render_dialogues(list(read_dialogues(path)), renderer, ObjectiveConfig())
        self.assertRegex(str(refused), r"dialogue 1 \(data\.jsonl:2\)")
        self.assertEqual(good[0].sequences[0].tokens.tolist(), again[0].sequences[0].tokens.tolist())

    def test_dialogue_refused_while_its_sequences_are_read_is_named(self):
        renderer = sequences.Renderer(chat_templates.train_tokenizer("qwen3"))
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
        path = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / "data.jsonl"
        parts = [{"type": "text", "text": "a\n\n", "weight": 0.5}, {"type": "text", "text": "b"}]
        twice = [*messages[:1], {"role": "assistant", "content": [*parts, *parts]}]
        think = [*messages[:1], {"role": "assistant", "content": [{"type": "text", "text": "</think>x", "weight": 0}]}]
        path.write_text("\n".join(json.dumps({"messages": some}) for some in (messages, think, twice)))
        good, refused, fine = inspection.render_dialogues(list(read_dialogues(path)), renderer, ObjectiveConfig())
        self.assertLen(good[0].sequences, 1)
        self.assertRegex(str(refused), r"dialogue 1 \(data\.jsonl:2\): message 1 has parts with weights")
        self.assertLen(fine[0].sequences, 1)


if __name__ == "__main__":
    absltest.main()
