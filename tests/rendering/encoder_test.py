"""Tokens taken from a text that begins the same, against the tokens of the text encoded as a whole."""

import json

import hypothesis
import numpy as np
import tokenizers
import transformers
from absl.testing import absltest, parameterized
from hypothesis import strategies

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.rendering import encoder as encoder_lib
from dialog_jax.rendering.chat_template import ResponseFrame
from dialog_jax.rendering.sequences import Renderer
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
    frame = ResponseFrame(prefill="", lead="", after="", following="")
    return encoder_lib.Encoder(tokenizer, frame, SpecialTokenEscaper(tokenizer, allow_special_tokens=True))


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


class ContinuationTest(parameterized.TestCase):
    """A response that continues ordinary text, as `[/INST]` is for these tokenizers, without a space between them."""

    # fmt: off
    _LEADING = (
        "(laughs) Here", "Hello", "you", "3 x", "12", " space", "  two", "\n", "\n\nline", "\ttab", "é", "ŋ", "你好",
        "🙂", "<b>", "[INST]", "]", "](", "_", ".", "...", "'s", "-", "\u2028", "\u0301", "\x00", "x", "", "—", "</",
        "▁", "\r",
    )
    # fmt: on

    def make_tokenizer(self, scheme):
        tokenizer = make_legacy_tokenizer()
        backend = tokenizer.backend_tokenizer
        if scheme != "prepend":
            backend.normalizer = None
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ '(INST) ' + m.content + ' (/INST)' if m.role == 'user' else "
            "m.content + eos_token }}{% endfor %}"
        )
        model = json.loads(backend.to_str())
        # A token that crosses from the prompt to the response, for many a first character.
        vocabulary, merges = model["model"]["vocab"], model["model"]["merges"]
        for first in ("(", "H", "3", "▁", "\n", "é", "<", ".", "[", "]", "x", "_", "-", "'"):
            vocabulary[f"){first}"] = len(vocabulary)
            merges.insert(0, [")", first])
        crossing = tokenizers.Tokenizer.from_str(json.dumps(model))
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=crossing, bos_token="<s>", eos_token="</s>", chat_template=tokenizer.chat_template
        )

    @parameterized.product(scheme=["prepend", "first", "always"], response=_LEADING)
    def test_a_response_with_any_first_character_continues_its_prompt(self, scheme, response):
        tokenizer = self.make_tokenizer(scheme)
        backend = tokenizer.backend_tokenizer
        prompt = backend.encode("<s>(INST) Hi (/INST)", add_special_tokens=False).ids
        messages = Message(role="user", content="Hi"), Message(role="assistant", content=response)
        ((sequence,),) = Renderer(tokenizer).render([Dialogue(id=0, messages=messages)])
        self.assertEqual(sequence.tokens[: sequence.start].tolist(), prompt)
        text = f"<s>(INST) Hi (/INST){response}</s>"
        crossing = backend.encode(text, add_special_tokens=False).ids
        decoded = backend.decode(sequence.tokens.tolist(), skip_special_tokens=False)
        self.assertEqual(decoded, backend.decode(crossing, skip_special_tokens=False))
        if "▁" not in response:
            self.assertEqual(decoded.replace("<s> ", "<s>"), text)
        self.assertEqual(int(sequence.tokens[-1]), tokenizer.eos_token_id)
        if crossing[: len(prompt)] != prompt:
            # As the model writes it: no piece has a space that the text does not have.
            pieces = [backend.id_to_token(token) for token in sequence.tokens[sequence.start : -1].tolist()]
            if all(not piece.startswith("<0x") for piece in pieces):
                self.assertEqual("".join(pieces).replace("▁", " "), response.replace("▁", " "))

    def test_tokens_of_a_continuation(self):
        tokenizer = self.make_tokenizer("prepend")
        messages = Message(role="user", content="Hi"), Message(role="assistant", content="(a) </s> Hi")
        ((sequence,),) = Renderer(tokenizer).render([Dialogue(id=0, messages=messages)])
        pieces = tokenizer.convert_ids_to_tokens(sequence.tokens[sequence.start :].tolist())
        self.assertEqual("".join(pieces), "(a)▁</s>▁Hi</s>")  # the first </s> is spelled by the message
        self.assertEqual(pieces.count("</s>"), 1)


if __name__ == "__main__":
    absltest.main()
