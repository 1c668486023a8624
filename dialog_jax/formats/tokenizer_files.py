"""Tokenizers as their tokenizer.json defines them, and their files, written so that others read the same tokens.

transformers 5 replaces parts of some tokenizers by those of a Python class with the same name, and writes another
tokenizer.json than it has read. Here the file decides: it is read as it is and saved byte for byte.
"""

import contextlib
import copy
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
import transformers

# Attributes of a tokenizer: the content of its file, what was done otherwise than transformers does, and the added
# tokens that it had once it was loaded.
_CONTENT, _DEPARTURES, _ADDED = "published_tokenizer_json", "departures_from_transformers", "published_added_tokens"
# Texts on which tokenizers of different kinds differ: digits, white space, contractions, composed characters, scripts.
_PROBES = (
    "In 2024: 123,456.789 and x1y22z333",
    "  two  spaces \t\n\n\nand lines\r\n",
    "I'M here, they'LL see 'tis THE the",
    "caf\u00e9 cafe\u0301 \ufb01 \uff21 \u6771\u4eac \u043c\u0438\u0440 \U0001f642\U0001f44d\U0001f3fd",
)
# Every byte that UTF-8 has, and with them characters that no vocabulary of characters has.
_FIRST_OF_EACH_LEAD = (
    *range(0xC0, 0x800, 0x40),
    0x800,
    *range(0x1000, 0x10000, 0x1000),
    *range(0x10000, 0x110000, 0x30000),
)
_ALL_BYTES = "".join(map(chr, (*range(0xC0), *_FIRST_OF_EACH_LEAD)))
# Under this name transformers reads tokenizer.json as it is; release 4 does not know the name that release 5 writes.
_CLASS_NAME = "PreTrainedTokenizerFast"


def find_tokenizer(model: str | os.PathLike[str], adapter: str | os.PathLike[str] = "") -> str:
    """Returns where the tokenizer of a model is: with its adapter, in the directory of a run, or with the model itself.

    Args:
      model: a model's directory, file or name, or the directory of a run.
      adapter: the directory of an adapter for it; empty for none.
    """
    if adapter and (pathlib.Path(adapter).expanduser() / "tokenizer.json").is_file():
        return str(adapter)
    is_run = model and (pathlib.Path(model).expanduser() / "model.json").is_file()
    return os.path.join(model, "tokenizer") if is_run else str(model)


def apply_file(tokenizer: transformers.PreTrainedTokenizerFast, content: str, backend: tokenizers.Tokenizer) -> None:
    """Makes `tokenizer` tokenize as its tokenizer.json says.

    Special tokens that only tokenizer_config.json names are added to those of the file. Truncation, padding and
    dropout that the file stores are settings of whoever saved it, and are switched off.

    Args:
      content: the text of the file.
      backend: the tokenizer that the text describes.
    """
    departures = {}
    if settings := _switch_off_settings(backend):
        departures["stored_settings"] = f"tokenizer.json stores {' and '.join(settings)}"
    _switch_off_settings(tokenizer.backend_tokenizer)
    failure = find_failure(tokenizer.backend_tokenizer)
    if failure:
        departures["replaced_tokenizer"] = f"transformers' class {type(tokenizer).__name__} cannot tokenize: {failure}"
    for text in () if failure else _PROBES:
        first, second = (
            one.encode(text, add_special_tokens=False).tokens for one in (backend, tokenizer.backend_tokenizer)
        )
        if first != second and "replaced_tokenizer" not in departures:
            departures["replaced_tokenizer"] = (
                f"{text!r} has {len(first):,} tokens by tokenizer.json and {len(second):,} others by transformers' "
                f"class {type(tokenizer).__name__}"
            )
    for token in _find_tokens_beyond_file(tokenizer, backend):
        backend.add_tokens([token])
    backend.encode_special_tokens = tokenizer.split_special_tokens
    setattr(tokenizer, "_tokenizer", backend)  # noqa: B010  (transformers has no public way)
    setattr(tokenizer, _CONTENT, content)
    setattr(tokenizer, _DEPARTURES, departures)
    setattr(tokenizer, _ADDED, _list_added(backend))


def read_backend(text: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer that the text of a tokenizer.json describes.

    Raises:
      ValueError: it describes none.
    """
    with _library_errors():
        return tokenizers.Tokenizer.from_str(text)


def find_failure(backend: tokenizers.Tokenizer) -> str:
    """Returns why a tokenizer cannot encode any text, such as a missing unknown token; empty if it can."""
    try:
        with _library_errors():
            backend.encode_batch([*_PROBES, _ALL_BYTES], add_special_tokens=False)
    except ValueError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Turns what tokenizers raises for the content of a file into a ValueError: it is a plain Exception there."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ValueError(str(error)) from error


def _switch_off_settings(backend: tokenizers.Tokenizer) -> list[str]:
    """Makes a tokenizer return all tokens of a text and only these, each time the same; returns what it did instead."""
    settings = []
    if backend.truncation:
        settings.append(f"truncation after {backend.truncation['max_length']:,} tokens")
        backend.no_truncation()
    if backend.padding:
        settings.append("padding")
        backend.no_padding()
    if dropout := getattr(backend.model, "dropout", None):
        settings.append(f"dropout of {dropout:g} of the merges")
        backend.model.dropout = None
    return settings


def list_departures(tokenizer: transformers.PreTrainedTokenizerFast) -> Mapping[str, str]:
    """Returns where `tokenizer` does something else than transformers would, by kind: a sentence for each.

    The kinds are `stored_settings` (truncation, padding and dropout of the file are off) and `replaced_tokenizer`
    (transformers tokenizes by a class, and not as the file says).
    """
    return getattr(tokenizer, _DEPARTURES, {})


def reopen_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer with the tokens of the published tokenizer.json, read again, for comparison with `tokenizer`.

    The two share no state: a call of transformers' tokenizer resets truncation and padding, so that a comparison of
    one with itself would never find them.
    """
    content = getattr(tokenizer, _CONTENT, None)
    backend = tokenizers.Tokenizer.from_str(content or tokenizer.backend_tokenizer.to_str())
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    for token in _find_tokens_beyond_file(tokenizer, backend):
        backend.add_tokens([token])
    reopened = copy.copy(tokenizer)
    setattr(reopened, "_tokenizer", backend)  # noqa: B010
    return reopened


def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast, directory: pathlib.Path) -> None:
    """Writes a tokenizer and its chat template as files that transformers 4 and 5 read.

    tokenizer.json has the bytes of the file it was loaded from, unless tokens were added since. Tokens that only
    tokenizer_config.json names are added again whenever the files are loaded.
    """
    tokenizer.save_pretrained(str(directory))
    content = getattr(tokenizer, _CONTENT, None)
    if content is not None and _list_added(tokenizer.backend_tokenizer) == getattr(tokenizer, _ADDED):
        (directory / "tokenizer.json").write_bytes(content.encode())
    settings = directory / "tokenizer_config.json"
    fields: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = _CLASS_NAME
    # Release 4 has the list under another name, which release 5 reads, too, and expects an object under this one.
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    settings.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _list_added(backend: tokenizers.Tokenizer) -> dict[int, str]:
    """Returns the added tokens by id."""
    return {number: token.content for number, token in backend.get_added_tokens_decoder().items()}


def _find_tokens_beyond_file(
    tokenizer: transformers.PreTrainedTokenizerFast, backend: tokenizers.Tokenizer
) -> list[tokenizers.AddedToken]:
    """Returns the added tokens of `tokenizer` that are not among those of `backend`, by id."""
    in_file = {token.content for token in backend.get_added_tokens_decoder().values()}
    return [token for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.content not in in_file]
