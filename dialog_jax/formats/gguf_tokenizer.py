"""The tokenizer in a GGUF file: byte-level BPE, or the BPE of sentencepiece, with the tokens of its tokenizer.json.

Built here because transformers' reader ignores `tokenizer.ggml.pre`, so that SmolLM's digits are not split.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tokenizers
import transformers

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file

# Types of tokens in GGUF.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}
_SPLITS = ("gpt-2", "smollm", *_DIGITS)

_SPACE = "▁"  # what sentencepiece writes for a space
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class _Fields:
    """The fields of a file's tokenizer."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._reader = gguf_file.open_gguf(path)

    def get(self, name: str, kind: type = str, many: bool = False) -> Any:
        return gguf_file.contents(self._path, self._reader, f"tokenizer.{name}", kind, many=many)


class _Vocabulary(NamedTuple):
    tokens: list[str]
    kinds: list[int]

    def list_added(self) -> list[tokenizers.AddedToken]:
        return [
            tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self.kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]


def load(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer of a GGUF file, with its chat template if it has one.

    Raises:
      UserError: the tokenizer is of another kind, or its lists do not belong together.
    """
    fields = _Fields(path)
    makers = {"gpt2": _make_byte_level, "llama": _make_sentencepiece}
    kind = fields.get("ggml.model")
    if kind not in makers:
        raise UserError(
            f"{path.name}: its tokenizer is of the kind {kind!r}; only byte-level BPE ('gpt2') and the BPE of "
            "sentencepiece ('llama') are read from GGUF. Use the model's Hugging Face directory."
        )
    vocabulary = _read_vocabulary(path, fields)
    tokens = vocabulary.tokens
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    numbers = {name: fields.get(f"ggml.{key}_token_id", int) for key, name in names.items()}
    if any(number is not None and not 0 <= number < len(tokens) for number in numbers.values()):
        raise UserError(f"{path.name}: {numbers} go beyond its {len(tokens):,} tokens. Download it again.")
    special = {name: tokens[number] for name, number in numbers.items() if number is not None}
    tokenizer = makers[kind](path, fields, vocabulary, special)
    tokenizer.add_tokens(vocabulary.list_added())
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _read_vocabulary(path: pathlib.Path, fields: _Fields) -> _Vocabulary:
    tokens, kinds = fields.get("ggml.tokens", many=True), fields.get("ggml.token_type", int, many=True)
    if tokens is None:
        raise UserError(f"{path.name}: has no list of tokens. Use the model's Hugging Face directory.")
    if kinds is not None and len(kinds) != len(tokens):
        raise UserError(f"{path.name}: has {len(tokens):,} tokens and {len(kinds):,} types of them. Download it again.")
    kinds = kinds or [_NORMAL] * len(tokens)
    if fields.get("ggml.model") == "llama":
        # llama.cpp stores runs of spaces as they are in a text, and all other tokens as sentencepiece writes them.
        tokens = [
            token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
            for token, kind in zip(tokens, kinds, strict=True)
        ]
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{path.name}: has a token twice. Download it again.")
    return _Vocabulary(tokens, kinds)


def _make_byte_level(
    path: pathlib.Path, fields: _Fields, vocabulary: _Vocabulary, special: dict[str, str]
) -> tokenizers.Tokenizer:
    merges, kind = fields.get("ggml.merges", many=True), fields.get("ggml.pre")
    if merges is None:
        raise UserError(f"{path.name}: has no list of merges. Use the model's Hugging Face directory.")
    known = set(vocabulary.tokens)
    for merge in merges:
        if merge.count(" ") != 1 or not known.issuperset((*merge.split(" "), merge.replace(" ", ""))):
            raise UserError(
                f"{path.name}: has the merge {merge!r}, which does not join two tokens to a third. Download it again."
            )
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: number for number, token in enumerate(vocabulary.tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
            # In Llama 3 a word that is in the vocabulary is one token, even if merges would not lead to it.
            ignore_merges=kind == "llama-bpe",
        )
    )
    if kind == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = _make_pre_tokenizer(kind, path.name)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _make_pre_tokenizer(kind: str | None, file: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer of a kind. Source: the tokenizer.json of GPT-2, SmolLM2, Qwen2 and Llama 3."""
    split = tokenizers.pre_tokenizers
    if kind == "gpt-2":
        return split.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        return split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
    if kind in _DIGITS:
        pattern = tokenizers.Regex("|".join((_CONTRACTIONS, _WORDS, _DIGITS[kind], _REST)))
        return split.Sequence(
            [split.Split(pattern, "isolated"), split.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    raise UserError(
        f"{file}: its pre-tokenizer is {kind!r}; supported in GGUF are {', '.join(_SPLITS)}. "
        "Use the model's Hugging Face directory."
    )


def _make_sentencepiece(
    path: pathlib.Path, fields: _Fields, vocabulary: _Vocabulary, special: dict[str, str]
) -> tokenizers.Tokenizer:
    """Returns the BPE of sentencepiece: the neighbors whose union has the highest score become one, again and again.

    Characters that are no token become bytes. Source: the tokenizer.json of Gemma 3, and `Converter` of transformers,
    which makes such files.
    """
    scores = fields.get("ggml.scores", float, many=True)
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise UserError(
            f"{path.name}: has {len(vocabulary.tokens):,} tokens and {len(scores or ()):,} scores of them. "
            "Download it again."
        )
    if fields.get("ggml.add_space_prefix", bool) is not False or fields.get("ggml.remove_extra_whitespaces", bool):
        raise UserError(
            f"{path.name}: its tokenizer adds or removes spaces, which is not supported in GGUF. Use the model's "
            "Hugging Face directory."
        )
    if "unk_token" not in special or not _BYTES.issubset(vocabulary.tokens):
        raise UserError(f"{path.name}: has no unknown token, or not one for each byte. Download it again.")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: number for number, token in enumerate(vocabulary.tokens)},
            merges=list(_list_merges(vocabulary, scores)),
            unk_token=special["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", _SPACE)
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if "bos_token" in special and fields.get("ggml.add_bos_token", bool) is not False:
        first = special["bos_token"]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first} $B",
            special_tokens=[(first, vocabulary.tokens.index(first))],
        )
    return tokenizer


def _list_merges(vocabulary: _Vocabulary, scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of tokens that join to a third, from the highest score of that; user-defined tokens come first.

    scores: ab -1, bc -2, abc -3        (a, b), (b, c), (ab, c), (a, bc)
    """
    tokens, kinds = vocabulary
    numbers = [number for number, kind in enumerate(kinds) if kind in (_NORMAL, _USER_DEFINED)]
    joinable = {tokens[number] for number in numbers}
    numbers.sort(key=lambda number: (kinds[number] == _NORMAL, -scores[number]))
    for number in numbers:
        token = tokens[number]
        for end in range(len(token) - 1, 0, -1):
            if token[:end] in joinable and token[end:] in joinable:
                yield token[:end], token[end:]
