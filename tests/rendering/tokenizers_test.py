"""GGUF tokenizers against byte-level BPE written out in Python; templates and errors."""

import contextlib
import itertools
import json
import pathlib
import pickle
import tempfile
from unittest import mock

import gguf
import hypothesis
import regex
import tokenizers as hf_tokenizers
import transformers
from absl.testing import absltest, parameterized
from hypothesis import strategies
from transformers.utils import hub

from dialog_jax.dialogues import parsing
from dialog_jax.formats import tokenizer_files
from dialog_jax.rendering import tokenizers

_ASSETS = pathlib.Path(__file__).parents[2] / "assets"
_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_ADDED = ("<think>",)
# In order of rank. "1 2" and "3 Ġ" can only ever apply where digits are not split from each other.
_MERGES = (
    "h e", "Ġ t", "l l", "Ġt he", "o n", "1 2", "12 3", "he ll", "Ġ Ġ", "' t", "Ċ Ċ", "Ã ©", "Ġ 1", "hell o", "d on",
)  # fmt: skip
_SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_TEXTS = (
    "the hello don't",
    "  two  spaces \t\n\n\nand lines\r\n",
    "café, naïve, 東京, 🙂👍🏽, ﬁ",
    "In 2024: 123,456.789 and x1y22z333",
    "I'M here, they'LL see 'tis",
    "",
    " ",
)

# fmt: off
_SHORT_TEXTS = (
    ("smollm",    "the123 hello", ["t", "he", "1", "2", "3", "Ġ", "hello"]),
    ("gpt-2",     "the123 hello", ["t", "he", "123", "Ġ", "hello"]),
    ("qwen2",     "the123 hello", ["t", "he", "1", "2", "3", "Ġ", "hello"]),
    ("llama-bpe", "the1234",      ["t", "he", "123", "4"]),
    # "Ġ 1" ranks below "1 2", and neither applies across digits that stand alone.
    ("smollm",    " the 12",      ["Ġthe", "Ġ", "1", "2"]),
    ("gpt-2",     " the 12",      ["Ġthe", "Ġ", "12"]),
    ("smollm",    "don't\n\n\né", ["don", "'t", "ĊĊ", "Ċ", "Ã©"]),
)
# fmt: on


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where Latin-1 prints it, otherwise the next from U+0100 on."""
    symbols, spare = [], 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(spare))
            spare += 1
    return symbols


_VOCABULARY = [*_SPECIAL, *_byte_symbols(), *(merge.replace(" ", "") for merge in _MERGES), *_ADDED]


def _slow_tokens(text: str, kind: str) -> list[str]:
    """Byte-level BPE, one merge at a time."""
    pieces = regex.split(r"(\p{N})", text) if kind == "smollm" else [text]
    words = [word for piece in pieces for word in regex.findall(_SPLITS.get(kind, _SPLITS["gpt-2"]), piece)]
    result = []
    for word in words:
        symbols = [_byte_symbols()[byte] for byte in word.encode()]
        while True:
            pairs = [f"{left} {right}" for left, right in itertools.pairwise(symbols)]
            known = [pair for pair in pairs if pair in _MERGES]
            if not known:
                break
            at = pairs.index(min(known, key=_MERGES.index))
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        result.extend(symbols)
    return result


class _Files(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def gguf(self, kind: str | None = "smollm", *, model: str = "gpt2", template: str | None = _TEMPLATE):
        path = self.directory / f"{kind}-{model}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model(model)
        if kind is not None:
            writer.add_tokenizer_pre(kind)
        writer.add_token_list(_VOCABULARY)
        kinds = [3 if token in _SPECIAL else 4 if token in _ADDED else 1 for token in _VOCABULARY]
        writer.add_token_types(kinds)
        writer.add_token_merges(list(_MERGES))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        if template is not None:
            writer.add_chat_template(template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    def assert_error(self, call, *parts: str):
        with self.assertRaises(ValueError) as caught:
            call()
        for part in parts:
            self.assertIn(part, str(caught.exception))
        self.assertNotIn(str(self.directory), str(caught.exception))


class GgufTest(_Files):
    @parameterized.parameters(*_SHORT_TEXTS)
    def test_tokens_of_a_short_text(self, kind, text, expected):
        tokenizer = tokenizers.load_tokenizer(self.gguf(kind))
        self.assertEqual(tokenizer.tokenize(text), expected)
        self.assertEqual(tokenizer.encode(text), [_VOCABULARY.index(token) for token in expected])

    @parameterized.parameters("smollm", "gpt-2", "qwen2", "llama-bpe")
    def test_tokens_equal_slow_bpe_and_decode_to_the_text(self, kind):
        tokenizer = tokenizers.load_tokenizer(self.gguf(kind))

        @hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
        @hypothesis.given(strategies.text(alphabet="he ltno'TD123\n\té東🙂٣", max_size=30))
        def check(text):
            self.assertEqual(tokenizer.tokenize(text), _slow_tokens(text, kind))
            self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)

        check()
        for text in _TEXTS:
            self.assertEqual(tokenizer.tokenize(text), _slow_tokens(text, kind))
            self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)

    def test_special_tokens_are_single_ids_and_only_control_tokens_are_special(self):
        tokenizer = tokenizers.load_tokenizer(str(self.gguf()))
        self.assertEqual(tokenizer.encode("<|im_start|>he<|im_end|>"), [1, _VOCABULARY.index("he"), 2])
        self.assertEqual(tokenizer.encode("<think>"), [_VOCABULARY.index("<think>")])
        self.assertCountEqual(tokenizer.all_special_ids, [0, 1, 2])
        self.assertEqual(tokenizer.decode(tokenizer.encode("<|im_end|><think>"), skip_special_tokens=True), "<think>")
        self.assertLen(tokenizer, len(_VOCABULARY))

    def test_named_tokens_and_template_come_from_the_file_and_no_token_is_put_in_front(self):
        tokenizer = tokenizers.load_tokenizer(self.gguf())
        named = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.assertEqual(named, (0, 1, 2, 2))
        self.assertEqual(tokenizer.chat_template, _TEMPLATE)
        self.assertEqual(tokenizer.encode("he", add_special_tokens=True), [_VOCABULARY.index("he")])

    def test_offsets_point_into_the_text(self):
        tokenizer = tokenizers.load_tokenizer(self.gguf())
        offsets = tokenizer("hello12<|im_end|>", return_offsets_mapping=True)["offset_mapping"]
        self.assertEqual(offsets, [(0, 5), (5, 6), (6, 7), (7, 17)])

    def test_saved_directory_is_read_back_the_same(self):
        tokenizer = tokenizers.load_tokenizer(self.gguf())
        tokenizer.save_pretrained(self.directory / "saved")
        (self.directory / "saved" / "config.json").write_text('{"model_type": "llama"}')
        again = tokenizers.load_tokenizer(self.directory / "saved")
        self.assertEqual(again.chat_template, tokenizer.chat_template)
        self.assertEqual(again.eos_token_id, 2)
        for text in _TEXTS:
            self.assertEqual(again.encode(text), tokenizer.encode(text))

    def test_unknown_splitting_is_named(self):
        self.assert_error(
            lambda: tokenizers.load_tokenizer(self.gguf("tekken")),
            "tekken-gpt2.gguf", "'tekken'", "gpt-2, smollm, qwen2, llama-bpe", "Use",
        )  # fmt: skip
        self.assert_error(lambda: tokenizers.load_tokenizer(self.gguf(None)), "None-gpt2.gguf", "None", "Use")

    def test_tokenizer_of_another_kind_is_named(self):
        self.assert_error(lambda: tokenizers.load_tokenizer(self.gguf(model="bert")), "'bert'", "'gpt2'", "Use")

    def test_file_that_is_missing_or_no_gguf(self):
        self.assert_error(lambda: tokenizers.load_tokenizer(self.directory / "no.gguf"), "no.gguf: no such", "Check")
        (self.directory / "bad.gguf").write_bytes(b"not a model" * 10)
        self.assert_error(lambda: tokenizers.load_tokenizer(self.directory / "bad.gguf"), "bad.gguf is not a", "again")

    def test_file_with_flipped_or_missing_bytes_loads_or_is_an_error_that_names_it(self):
        path = self.gguf()
        content = path.read_bytes()
        place = strategies.integers(0, len(content) - 1)
        numbers = strategies.sampled_from([2**63 - 1, 2**64 - 1, 2**60, 2**32, 10**9, 0])
        byte = strategies.tuples(place, strategies.binary(min_size=1, max_size=1))
        number = strategies.tuples(place, numbers.map(lambda n: n.to_bytes(8, "little")))

        @hypothesis.given(strategies.lists(byte | number, max_size=3), place | strategies.none())
        @hypothesis.settings(max_examples=150, deadline=10_000, derandomize=True)
        def holds(written, kept):
            damaged = bytearray(content)
            for at, what in written:
                damaged[at : at + len(what)] = what
            path.write_bytes(damaged[:kept])
            try:
                tokenizers.load_tokenizer(path)
            except ValueError as error:
                self.assertIn(path.name, str(error))

        holds()


class TemplateTest(_Files):
    def test_own_template_text_or_file(self):
        path = self.gguf()
        template = "{{ messages[0].content }}!"
        (self.directory / "template.jinja").write_text("\n" + template)
        by_text = tokenizers.load_tokenizer(path, chat_template=template)
        by_file = tokenizers.load_tokenizer(path, chat_template=str(self.directory / "template.jinja"))
        messages = [{"role": "user", "content": "Hi"}]
        self.assertEqual(by_text.apply_chat_template(messages, tokenize=False), "Hi!")
        self.assertEqual(by_file.apply_chat_template(messages, tokenize=False), "\nHi!")

    def test_byte_order_mark_of_a_template_file_is_no_part_of_prompts(self):
        file = self.directory / "template.jinja"
        file.write_text(_TEMPLATE, encoding="utf-8-sig")
        self.assertEqual(tokenizers.load_tokenizer(self.gguf(), chat_template=str(file)).chat_template, _TEMPLATE)
        tokenizers.load_tokenizer(self.gguf()).save_pretrained(self.directory / "model")
        (self.directory / "model" / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8-sig")
        self.assertEqual(tokenizers.load_tokenizer(self.directory / "model").chat_template, _TEMPLATE)

    @parameterized.parameters("utf-16", "latin-1")
    def test_template_file_in_another_encoding_is_named(self, encoding):
        file = self.directory / "template.jinja"
        file.write_text("\u00e9" + _TEMPLATE, encoding=encoding)
        self.assert_error(
            lambda: tokenizers.load_tokenizer(self.gguf(), chat_template=str(file)), "template.jinja: not UTF-8", "Save"
        )

    def test_no_template_is_an_error_unless_one_is_given(self):
        path = self.gguf(template=None)
        self.assert_error(lambda: tokenizers.load_tokenizer(path), "smollm-gpt2.gguf", "no chat template", "Give one")
        self.assertEqual(tokenizers.load_tokenizer(path, chat_template=_TEMPLATE).chat_template, _TEMPLATE)

    def test_template_file_that_is_missing(self):
        path = self.gguf()
        self.assert_error(
            lambda: tokenizers.load_tokenizer(path, chat_template="gone.jinja"), "gone.jinja", "nor a file", "Check"
        )

    def test_template_that_refuses_a_dialogue_is_accepted(self):
        template = "{{ raise_exception('not this one') }}"
        self.assertEqual(tokenizers.load_tokenizer(self.gguf(), chat_template=template).chat_template, template)


class DirectoryTest(_Files):
    def test_directory_without_tokenizer(self):
        (self.directory / "model").mkdir()
        self.assert_error(
            lambda: tokenizers.load_tokenizer(self.directory / "model"), "model: no tokenizer", "tokenizer.json"
        )

    @parameterized.named_parameters(
        ("lacks_a_merged_token", lambda value: value["model"]["vocab"].pop("hello"), "Token `hello` out of vocabulary"),
        ("lacks_merges", lambda value: value["model"].pop("merges"), "Missing vocab/merges"),
        ("lacks_the_model", lambda value: value.pop("model"), "Model missing"),
        ("lacks_added_tokens", lambda value: value.pop("added_tokens"), "added_tokens"),
        ("has_an_id_that_is_text", lambda value: value["model"]["vocab"].update(x="1"), "invalid type: string"),
        ("has_an_unknown_pre_tokenizer", lambda value: value.update(pre_tokenizer={"type": "New"}), "PreTokenizer"),
    )
    def test_damaged_tokenizer_file_is_an_error_with_file_reason_and_remedy(self, damage, reason):
        tokenizers.load_tokenizer(self.gguf("gpt-2")).save_pretrained(self.directory / "model")
        file = self.directory / "model" / "tokenizer.json"
        tokenizers.load_tokenizer(file.parent)
        value = json.loads(file.read_text())
        damage(value)
        file.write_text(json.dumps(value))
        self.assert_error(
            lambda: tokenizers.load_tokenizer(file.parent), "model/tokenizer.json: ", reason, "download it again"
        )

    @parameterized.parameters(
        ({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "unk_token": "<unk>"}, "`<unk>` not found"),
        ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}, "Missing [UNK]"),
        (
            {
                "type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 9,
            },
            "Missing [UNK]",
        ),
        ({"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}, "`unk_id` is missing"),
        ({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 1}, "merges": ["a b"]}, "same id"),
    )  # fmt: skip
    def test_tokenizer_file_that_cannot_tokenize_every_text_is_an_error_with_file_and_reason(self, model, reason):
        tokenizers.load_tokenizer(self.gguf("gpt-2")).save_pretrained(self.directory / "model")
        file = self.directory / "model" / "tokenizer.json"
        value = {**json.loads(file.read_text()), "pre_tokenizer": None, "decoder": None, "added_tokens": []}
        file.write_text(json.dumps({**value, "model": model}))
        self.assert_error(lambda: tokenizers.load_tokenizer(file.parent), "model/tokenizer.json: ", reason, "download")

    @parameterized.parameters("b", "\u00b6", "\u00de", "\u00f4")  # bytes of 1, 2 and 4
    def test_tokenizer_file_that_lacks_a_byte_and_its_unknown_token_is_an_error(self, symbol):
        tokenizers.load_tokenizer(self.gguf("gpt-2")).save_pretrained(self.directory / "model")
        file = self.directory / "model" / "tokenizer.json"
        value = json.loads(file.read_text())
        value["model"]["unk_token"] = "<unk>"
        file.write_text(json.dumps(value))
        tokenizers.load_tokenizer(file.parent)  # never needs it
        del value["model"]["vocab"][symbol]
        file.write_text(json.dumps(value))
        self.assert_error(lambda: tokenizers.load_tokenizer(file.parent), "model/tokenizer.json: ", "`<unk>` not found")

    def test_other_errors_of_the_library_keep_their_traceback(self):
        broken = mock.Mock(spec=hf_tokenizers.Tokenizer)
        broken.encode_batch.side_effect = RuntimeError("a bug")
        with self.assertRaisesRegex(RuntimeError, "a bug"):
            tokenizer_files.find_failure(broken)

    @parameterized.parameters(b"", b'{"version": "1.0", "mod', b"[]", b"version https://git-lfs", b"\xff\xfe{\0}\0")
    def test_tokenizer_file_that_is_no_json_object_is_an_error_with_file_and_remedy(self, content):
        (self.directory / "model").mkdir()
        (self.directory / "model" / "tokenizer.json").write_bytes(content)
        self.assert_error(
            lambda: tokenizers.load_tokenizer(self.directory / "model"),
            "model/tokenizer.json: not",
            "download it again",
        )

    def test_slow_tokenizer_is_an_error(self):
        slow = transformers.ByT5Tokenizer()
        with _on_hub(slow, None):
            self.assert_error(
                lambda: tokenizers.load_tokenizer("owner/name"), "ByT5Tokenizer", "fast", "tokenizer.json"
            )

    def test_code_of_the_model_is_never_run(self):
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE()), chat_template=_TEMPLATE
        )
        with _on_hub(fast, None) as load:
            tokenizers.load_tokenizer("owner/name")
        load.assert_called_once_with("owner/name", trust_remote_code=False)


@contextlib.contextmanager
def _on_hub(tokenizer, file):
    """transformers and the Hub's cache as they answer for a model with a tokenizer and a tokenizer.json."""
    with (
        mock.patch.object(transformers.AutoTokenizer, "from_pretrained", return_value=tokenizer) as load,
        mock.patch.object(hub, "cached_file", return_value=None if file is None else str(file)),
    ):
        yield load


class PublishedFileTest(_Files):
    """A directory whose tokenizer.json and whose class of tokenizers differ; the file splits as Llama 3 does."""

    def publish(self, model_type="qwen2", tokenizer_class="Qwen2Tokenizer", change=lambda value: None, **settings):
        directory = self.directory / "published"
        directory.mkdir()
        value = json.loads(tokenizers.load_tokenizer(self.gguf("llama-bpe")).backend_tokenizer.to_str())
        change(value)
        text = json.dumps(value, indent=1, ensure_ascii=True) + "  \r\n"  # not as the library would write it
        (directory / "tokenizer.json").write_bytes(text.encode())
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
        fields = {"tokenizer_class": tokenizer_class, "eos_token": "<|im_end|>", "chat_template": _TEMPLATE, **settings}
        (directory / "tokenizer_config.json").write_text(json.dumps(fields))
        return directory

    @parameterized.parameters(
        ("qwen2", "Qwen2Tokenizer"),
        ("qwen2", "PreTrainedTokenizerFast"),
        ("qwen3", "Qwen2TokenizerFast"),
        ("llama", "LlamaTokenizerFast"),
        ("llama", "GPT2Tokenizer"),
        ("llama", "PreTrainedTokenizerFast"),
    )
    def test_tokens_are_those_of_the_file_whatever_the_class(self, model_type, tokenizer_class):
        tokenizer = tokenizers.load_tokenizer(self.publish(model_type, tokenizer_class))
        for text in (*_TEXTS, "the123 1234567 hello"):
            self.assertEqual(tokenizer.tokenize(text), _slow_tokens(text, "llama-bpe"))
        self.assertEqual(tokenizer.backend_tokenizer.encode("12312", add_special_tokens=False).tokens, ["123", "12"])
        self.assertEqual(tokenizer.eos_token_id, 2)
        self.assertEqual(tokenizer.chat_template, _TEMPLATE)

    @parameterized.named_parameters(
        ("normalizer", {"normalizer": {"type": "Lowercase"}}, "THE", ["t", "he"]),
        (
            "prefix_space",
            {
                "pre_tokenizer": {
                    "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
                }
            },
            "the",
            ["Ġthe"],
        ),
        ("post_processor", {"post_processor": None}, "the", ["t", "he"]),
    )  # fmt: skip
    def test_every_part_of_the_file_applies(self, part, text, expected):
        tokenizer = tokenizers.load_tokenizer(self.publish(change=lambda value: value.update(part), add_bos_token=True))
        self.assertEqual(tokenizer.backend_tokenizer.encode(text).tokens, expected)

    def test_flags_of_an_added_token_are_those_of_the_file(self):
        settings = {"added_tokens_decoder": {"1": {"content": "<|im_start|>", "rstrip": True, "special": True}}}
        tokenizer = tokenizers.load_tokenizer(self.publish(**settings))
        self.assertEqual(tokenizer.tokenize("<|im_start|> he"), ["<|im_start|>", "Ġ", "he"])

    def test_stored_truncation_and_padding_are_switched_off(self):
        def change(value):
            value["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
            value["padding"] = {
                "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<|endoftext|>",
            }  # fmt: skip

        tokenizer = tokenizers.load_tokenizer(self.publish(change=change))
        text = "hello" * 3
        self.assertEqual(tokenizer.backend_tokenizer.encode(text).tokens, _slow_tokens(text, "llama-bpe"))
        self.assertEqual(tokenizer.backend_tokenizer.encode("he").tokens, ["he"])
        many = tokenizer.backend_tokenizer.encode_batch(["he", text])
        self.assertEqual([encoding.tokens for encoding in many], [["he"], _slow_tokens(text, "llama-bpe")])

    def test_stored_dropout_is_switched_off(self):
        tokenizer = tokenizers.load_tokenizer(self.publish(change=lambda value: value["model"].update(dropout=0.9)))
        for one in (tokenizer, tokenizer_files.reopen_tokenizer(tokenizer)):
            for _ in range(20):
                tokens = one.backend_tokenizer.encode("hello the", add_special_tokens=False).tokens
                self.assertEqual(tokens, ["hello", "Ġthe"])
        sentence = tokenizer_files.list_departures(tokenizer)["stored_settings"]
        self.assertEqual(sentence, "tokenizer.json stores dropout of 0.9 of the merges")

    def test_special_tokens_that_only_the_settings_name_are_added_after_those_of_the_file(self):
        directory = self.publish(additional_special_tokens=["<|tool|>"])
        tokenizer = tokenizers.load_tokenizer(directory)
        self.assertEqual(tokenizer.tokenize("he<|tool|>he"), ["he", "<|tool|>", "he"])
        self.assertEqual(tokenizer.convert_tokens_to_ids("<|tool|>"), len(_VOCABULARY))
        tokenizer_files.save_tokenizer(tokenizer, self.directory / "saved")
        again = tokenizers.load_tokenizer(self.directory / "saved")
        self.assertEqual(again.tokenize("he<|tool|>he"), ["he", "<|tool|>", "he"])
        self.assertEqual(again.convert_tokens_to_ids("<|tool|>"), len(_VOCABULARY))

    @parameterized.parameters(
        ("tokenizer_config.json", {"pad_token": "[PAD]"}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|tool|>"]}),
        ("special_tokens_map.json", {"pad_token": {"content": "[PAD]", "lstrip": False}}),
    )
    def test_tokens_that_only_the_settings_name_leave_the_bytes_of_the_file(self, file, fields):
        directory = self.publish()
        settings = json.loads((directory / file).read_text()) if (directory / file).exists() else {}
        (directory / file).write_text(json.dumps({**settings, **fields}))
        tokenizer = tokenizers.load_tokenizer(directory)
        tokenizer_files.save_tokenizer(tokenizer, self.directory / "saved")
        saved = (self.directory / "saved" / "tokenizer.json").read_bytes()
        self.assertEqual(saved, (directory / "tokenizer.json").read_bytes())
        again = tokenizers.load_tokenizer(self.directory / "saved")
        self.assertEqual(again.get_vocab(), tokenizer.get_vocab())
        self.assertEqual(again.special_tokens_map, tokenizer.special_tokens_map)
        again.add_tokens(["<|new|>"])
        tokenizer_files.save_tokenizer(again, self.directory / "extended")
        self.assertIn(b"<|new|>", (self.directory / "extended" / "tokenizer.json").read_bytes())

    def test_settings_of_another_shape_are_an_error_with_the_file(self):
        directory = self.publish(eos_token=5)
        self.assert_error(
            lambda: tokenizers.load_tokenizer(directory), "published/tokenizer_config.json: eos_token is 5; needed text"
        )

    def test_stop_tokens_are_those_of_the_files_of_tokenizer_and_model(self):
        directory, model = self.publish(), self.directory / "other"
        model.mkdir()
        self.assertEmpty(tokenizers.read_stop_tokens(tokenizers.load_tokenizer(directory)))
        (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
        (model / "config.json").write_text('{"model_type": "x", "eos_token_id": 3, "text_config": {"eos_token_id": 4}}')
        self.assertEqual(tokenizers.read_stop_tokens(tokenizers.load_tokenizer(directory)), {1, 2})
        both = pickle.loads(pickle.dumps(tokenizers.load_tokenizer(directory, model=model)))
        self.assertEqual(tokenizers.read_stop_tokens(both), {1, 2, 3, 4})

    def test_hub_names_load_the_same_tokens(self):
        directory = self.publish()
        by_class = transformers.AutoTokenizer.from_pretrained(directory)
        self.assertNotEqual(by_class.tokenize("123"), ["123"])  # otherwise nothing is tested
        with _on_hub(by_class, directory / "tokenizer.json"):
            self.assertEqual(tokenizers.load_tokenizer("owner/name").tokenize("123"), ["123"])

    def test_saved_files_have_the_bytes_of_the_published_one_and_names_that_transformers_4_reads(self):
        directory = self.publish(additional_special_tokens=["<think>", "<|im_start|>"], pad_token="<|endoftext|>")
        first, second = self.directory / "first", self.directory / "second"
        tokenizer_files.save_tokenizer(tokenizers.load_tokenizer(directory), first)
        tokenizer_files.save_tokenizer(tokenizers.load_tokenizer(first), second)
        for saved in (first, second):
            self.assertEqual((saved / "tokenizer.json").read_bytes(), (directory / "tokenizer.json").read_bytes())
            fields = json.loads((saved / "tokenizer_config.json").read_text())
            self.assertEqual(fields["tokenizer_class"], "PreTrainedTokenizerFast")
            self.assertEqual(fields["additional_special_tokens"], ["<think>", "<|im_start|>"])
            self.assertNotIn("extra_special_tokens", fields)
            again = transformers.AutoTokenizer.from_pretrained(saved)
            self.assertEqual(again.tokenize("123"), ["123"])
            self.assertEqual((again.pad_token, again.eos_token), ("<|endoftext|>", "<|im_end|>"))
            self.assertEqual(again.extra_special_tokens, ["<think>", "<|im_start|>"])

    def test_pickled_tokenizer_saves_the_same_bytes(self):
        directory = self.publish()
        tokenizer = pickle.loads(pickle.dumps(tokenizers.load_tokenizer(directory)))
        tokenizer_files.save_tokenizer(tokenizer, self.directory / "saved")
        saved = self.directory / "saved" / "tokenizer.json"
        self.assertEqual(saved.read_bytes(), (directory / "tokenizer.json").read_bytes())

    def test_reopened_tokenizer_shares_no_state(self):
        tokenizer = tokenizers.load_tokenizer(self.publish())
        tokenizer.backend_tokenizer.enable_truncation(1)
        tokenizer.backend_tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.Digits(individual_digits=True)
        reopened = tokenizer_files.reopen_tokenizer(tokenizer)
        self.assertEqual(reopened("123he")["input_ids"], reopened.convert_tokens_to_ids(["123", "he"]))
        self.assertLen(tokenizer.backend_tokenizer.encode("123he").ids, 1)


class SmolLM2Test(parameterized.TestCase):
    """Reads assets/, which `python scripts/prepare_demo.py` makes; scripts/test.sh runs it first."""

    def test_real_tokenizer_on_real_dialogues(self):
        tokenizer = tokenizers.load_tokenizer(_ASSETS / "smollm2-135m-instruct")
        self.assertLen(tokenizer, 49152)
        self.assertEqual(tokenizer.encode("<|endoftext|><|im_start|><|im_end|>"), [0, 1, 2])
        self.assertEqual(tokenizer.tokenize("in 2018"), ["in", "Ġ", "2", "0", "1", "8"])
        for dialogue in itertools.islice(parsing.read_dialogues(_ASSETS / "chitchat" / "validation.jsonl"), 50):
            for message in dialogue.messages:
                ids = tokenizer.encode(message.content)
                self.assertEqual(tokenizer.decode(ids), message.content)
                self.assertTrue(all(len(token) == 1 for token in tokenizer.convert_ids_to_tokens(ids) if "1" in token))


if __name__ == "__main__":
    absltest.main()
