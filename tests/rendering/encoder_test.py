"""Tokens taken from a text that begins the same, against the tokens of the text encoded as a whole."""

import hypothesis
import numpy as np
import tokenizers
import transformers
from absl.testing import absltest, parameterized
from hypothesis import strategies

from dialog_jax.rendering import encoder as encoder_lib
from dialog_jax.rendering.special_tokens import SpecialTokenEscaper
from tests.rendering import chat_templates
from tests.rendering.chat_templates import FAMILIES

# Added tokens that change what is around them, or contain one another, with the tokens of the chatml family.
_AWKWARD = (
    tokenizers.AddedToken("<left>", special=True, normalized=False, lstrip=True),
    tokenizers.AddedToken("<right>", special=True, normalized=False, rstrip=True),
    tokenizers.AddedToken("<word>", special=True, normalized=False, single_word=True),
    tokenizers.AddedToken("<normal>", special=True, normalized=True),
    tokenizers.AddedToken("word", special=True, normalized=False),
    tokenizers.AddedToken("<inner>", special=True, normalized=False),
    tokenizers.AddedToken("x<inner>y", special=True, normalized=False),
    tokenizers.AddedToken("<inner>!", special=False, normalized=False),
    tokenizers.AddedToken("<added>", special=False, normalized=False),
)


def make_legacy_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer like that of Llama 2, whose normalizer puts a space in front of all text between added tokens."""
    tokenizer = chat_templates.train_tokenizer.__wrapped__("mistral")
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    normalizers = tokenizers.normalizers
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def make_awkward_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.backend_tokenizer.add_tokens(list(_AWKWARD))
    return tokenizer


def make_encoder(tokenizer):
    return encoder_lib.Encoder(tokenizer, "", SpecialTokenEscaper(tokenizer, allow_special_tokens=True))


def make_tokenizer(name):
    makers = {"legacy": make_legacy_tokenizer, "awkward": make_awkward_tokenizer}
    return makers[name]() if name in makers else chat_templates.train_tokenizer(name)


class TokenizeLikeTest(parameterized.TestCase):
    @parameterized.parameters(*FAMILIES, "legacy", "awkward")
    def test_tokens_equal_those_of_the_text_encoded_as_a_whole(self, name):
        tokenizer = make_tokenizer(name)
        encoder = make_encoder(tokenizer)
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        words = (
            "Hello",
            " ",
            "  ",
            "\n",
            "you are",
            "x",
            "y",
            "!",
            "_",
            "e",
            "\u0301",
            "é🙂",
            "ŋ",
            "<",
            "<inner",
            "3.14",
        )
        pieces = strategies.lists(strategies.sampled_from((*added, *words, *added)), max_size=8).map("".join)

        @hypothesis.given(pieces, strategies.lists(pieces, min_size=2, max_size=4))
        @hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
        def holds(beginning, endings):
            texts = [beginning + ending for ending in endings]
            others = encoder.tokenize(texts[:-1])
            tokenized = encoder.tokenize_like(texts[-1], others)
            encoding = tokenizer.backend_tokenizer.encode(texts[-1], add_special_tokens=False)
            self.assertEqual(tokenized.text, texts[-1])
            self.assertEqual(tokenized.ids.tolist(), encoding.ids)
            offsets = np.array(encoding.offsets).reshape(-1, 2)
            np.testing.assert_array_equal(tokenized.starts, offsets[:, 0])
            np.testing.assert_array_equal(tokenized.ends, offsets[:, 1])

        holds()

    def test_only_the_text_behind_the_last_shared_special_token_is_encoded(self):
        encoder = make_encoder(chat_templates.train_tokenizer("chatml"))
        (other,) = encoder.tokenize(["<|im_start|>Hi<|im_end|><|im_start|>Hello<|im_end|>"])
        encoded = []
        encode = encoder.escaper.encode
        encoder.escaper.encode = lambda texts: encoded.extend(texts) or encode(texts)
        tokenized = encoder.tokenize_like("<|im_start|>Hi<|im_end|><|im_start|>Hell no<|im_end|>", [other])
        self.assertEqual(encoded, ["<|im_start|>Hell no<|im_end|>"])
        self.assertEqual(encoder.decode(tokenized.ids), "<|im_start|>Hi<|im_end|><|im_start|>Hell no<|im_end|>")


if __name__ == "__main__":
    absltest.main()
