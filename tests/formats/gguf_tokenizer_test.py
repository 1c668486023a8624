"""GGUF tokenizers of sentencepiece against its algorithm written out in Python. Byte-level BPE: rendering."""

import itertools
import pathlib
import re
import tempfile

import gguf
import hypothesis
from absl.testing import absltest, parameterized
from hypothesis import strategies

from dialog_jax.formats import gguf_tokenizer

_CONTROL = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_USER_DEFINED = ("\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# From the highest score. The characters are tokens, but for "q" and all that are not ASCII, save one.
_MERGED = (
    "he", "▁t", "ll", "▁the", "on", "12", "<b", "123", "ell", "hell", "hello", "▁h", "t>", "tt", "ttt", "é▁",
)  # fmt: skip
_CHARACTERS = tuple("▁heltonb123<>é'")
_VOCABULARY = (*_CONTROL, "<unk>", *_USER_DEFINED, *_BYTES, *_MERGED, *_CHARACTERS)
_SCORES = {token: -float(rank) for rank, token in enumerate((*_MERGED, *_CHARACTERS))}
# Type of a token in GGUF.
_KINDS = {"<unk>": 2} | dict.fromkeys(_CONTROL, 3) | dict.fromkeys(_USER_DEFINED, 4) | dict.fromkeys(_BYTES, 6)

# fmt: off
_SHORT_TEXTS = (
    ("the hello",       ["t", "he", "▁", "hello"]),
    (" the",            ["▁the"]),
    ("a   the",         ["<0x61>", "▁▁▁", "t", "he"]),
    ("<b>123</b>",      ["<b>", "123", "<", "<0x2F>", "b", ">"]),
    ("on\n\n\n東",      ["on", "\n\n", "\n", "<0xE6>", "<0x9D>", "<0xB1>"]),
)
# fmt: on


def _slow_tokens(text):
    """sentencepiece: user-defined tokens first, the longest; then neighbors with the best union, the leftmost first."""
    text = text.replace(" ", "▁")
    longest_first = sorted(_USER_DEFINED, key=len, reverse=True)
    tokens = []
    for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
        symbols = [part] if part in _USER_DEFINED else list(part)
        while known := [pair for pair in map("".join, itertools.pairwise(symbols)) if pair in _SCORES]:
            best = max(known, key=_SCORES.get)
            at = next(at for at in range(len(symbols)) if symbols[at] + symbols[at + 1] == best)
            symbols[at : at + 2] = [best]
        for symbol in symbols:
            is_token = symbol in _SCORES or symbol in _USER_DEFINED
            tokens += [symbol] if is_token else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return tokens


class SentencepieceTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / "model.gguf"

    def write(self, tokens=_VOCABULARY, scores=None, prefix=False, first=True):
        writer = gguf.GGUFWriter(self.path, "gemma3")
        writer.add_tokenizer_model("llama")
        # As llama.cpp's converter does: runs of spaces as in a text, and low scores for all that is not learned.
        writer.add_token_list([token.replace("▁", " ") if token in _USER_DEFINED else token for token in tokens])
        writer.add_token_types([_KINDS.get(token, 1) for token in tokens])
        writer.add_token_scores([_SCORES.get(token, -1000.0) for token in tokens] if scores is None else scores)
        for name in ("pad", "eos", "bos", "unk"):
            getattr(writer, f"add_{name}_token_id")(_VOCABULARY.index(f"<{name}>"))
        writer.add_add_space_prefix(prefix)
        writer.add_add_bos_token(first)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return self.path

    @parameterized.parameters(*_SHORT_TEXTS)
    def test_tokens_of_a_short_text(self, text, expected):
        tokenizer = gguf_tokenizer.load(self.write())
        self.assertEqual(tokenizer.tokenize(text), expected)
        self.assertEqual(tokenizer.encode(text, add_special_tokens=False), list(map(_VOCABULARY.index, expected)))
        self.assertEqual(_slow_tokens(text), expected)

    def test_tokens_equal_slow_algorithm_and_decode_to_the_text(self):
        tokenizer = gguf_tokenizer.load(self.write())

        @hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
        @hypothesis.given(strategies.text(alphabet="he ltno'123\nqé東🙂<b>", max_size=30))
        def check(text):
            hypothesis.assume(" " * 5 not in text)  # longer than the longest token of spaces
            self.assertEqual(tokenizer.tokenize(text), _slow_tokens(text))
            self.assertEqual(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)), text)

        check()

    def test_special_tokens_are_single_ids_and_the_first_is_put_in_front(self):
        tokenizer = gguf_tokenizer.load(self.write())
        turn = ["<start_of_turn>", "on", "<end_of_turn>"]
        self.assertEqual(tokenizer.tokenize("".join(turn)), turn)
        self.assertEqual(tokenizer.encode("on"), [2, _VOCABULARY.index("on")])
        self.assertCountEqual(tokenizer.all_special_ids, [0, 1, 2, 5])
        self.assertEqual(gguf_tokenizer.load(self.write(first=False)).encode("on"), [_VOCABULARY.index("on")])

    def test_offsets_point_into_the_text(self):
        tokenizer = gguf_tokenizer.load(self.write())
        offsets = tokenizer("é the東\n", return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        self.assertEqual(offsets, [(0, 1), (1, 5), (5, 6), (5, 6), (5, 6), (6, 7)])

    def test_file_without_a_byte_or_with_other_scores_or_spaces_is_an_error_that_names_it(self):
        for file, message in (
            (dict(scores=[0.0, 1.0]), "scores"),
            (dict(tokens=[token.replace("<0x41>", "A") for token in _VOCABULARY]), "each byte"),
            (dict(tokens=[token.replace("<0x41>", "▁") for token in _VOCABULARY]), "a token twice"),
            (dict(prefix=True), "adds or removes spaces"),
        ):
            with self.assertRaisesRegex(ValueError, f"^model.gguf: .*{message}"):
                gguf_tokenizer.load(self.write(**file))


if __name__ == "__main__":
    absltest.main()
