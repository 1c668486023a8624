"""Records that are read one by one, however bad the one before, and refused dialogues between others."""

import copy
import json
import pathlib
import tempfile

import transformers
from absl.testing import absltest

from dialog_jax.audit import inspection
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.parsing import iterate_dialogues, read_dialogues
from dialog_jax.rendering import sequences
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
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


class TokenizerTest(absltest.TestCase):
    def publish(self, change):
        """The tokenizer of a directory of the qwen2 family, whose class splits digits; the file does not."""
        directory = pathlib.Path(self.create_tempdir().full_path)
        tokenizer = chat_templates.train_tokenizer("chatml")
        value = json.loads(tokenizer.backend_tokenizer.to_str())
        change(value)
        (directory / "tokenizer.json").write_text(json.dumps(value))
        (directory / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
        settings = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": tokenizer.chat_template}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings | tokenizer.special_tokens_map))
        return load_tokenizer(directory)

    def test_stored_settings_and_a_class_that_replaces_the_file_are_named(self):
        def change(value):
            value["truncation"] = {"direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0}
            value["normalizer"] = {"type": "Lowercase"}

        sentences = inspection.inspect_tokenizer(Renderer(self.publish(change)), None)
        self.assertEqual(sentences.keys(), {"stored_settings", "replaced_tokenizer"})
        self.assertEqual(sentences["stored_settings"], "tokenizer.json stores truncation after 40 tokens")
        self.assertRegex(sentences["replaced_tokenizer"], "tokens by tokenizer.json and .* class Qwen2Tokenizer")

    def test_class_that_does_as_the_file_says_is_not_named(self):
        def change(value):
            qwen2 = json.loads(transformers.Qwen2Tokenizer().backend_tokenizer.to_str())
            value.update({name: qwen2[name] for name in ("normalizer", "pre_tokenizer", "decoder")})

        self.assertEmpty(inspection.inspect_tokenizer(Renderer(self.publish(change)), None))

    def test_clock_and_tokens_beyond_the_embedding_are_named(self):
        tokenizer = copy.copy(chat_templates.train_tokenizer("chatml"))
        renderer = Renderer(tokenizer)
        self.assertEmpty(inspection.inspect_tokenizer(renderer, len(tokenizer)))
        (sentence,) = inspection.inspect_tokenizer(renderer, len(tokenizer) - 1).values()
        self.assertRegex(sentence, rf"token {len(tokenizer) - 1} .*, and {len(tokenizer) - 1} rows")
        tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
        sentences = inspection.inspect_tokenizer(Renderer(tokenizer, template_time="2026-07-01"), len(tokenizer))
        self.assertEqual(sentences, {"clock": "here it is 2026-07-01"})


if __name__ == "__main__":
    absltest.main()
