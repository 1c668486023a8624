"""Loads the fast tokenizer of a model directory, hub name or GGUF file, with its chat template.

Tokens are those of the published tokenizer.json; names of special tokens and chat template are those that transformers
reads. Only fast tokenizers, because rendering needs character offsets. Knows nothing of dialogues.
"""

import hashlib
import json
import pathlib
from typing import Any

import tokenizers
import transformers
from transformers.utils import hub

from dialog_jax.errors import UserError
from dialog_jax.formats import gguf_file, gguf_tokenizer, tokenizer_files, tokenizer_settings

_MODEL = "model_it_is_used_with"  # attribute of a tokenizer: the name or path of a model
_BOM = "\ufeff"  # with which some editors begin a file


class NoChatTemplateError(UserError):
    """The tokenizer has no chat template, and none was given."""


def load_tokenizer(
    name_or_path: str | pathlib.Path, *, chat_template: str = "", model: str | pathlib.Path = ""
) -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer, with a chat template.

    Args:
      name_or_path: a Hugging Face model directory, a hub name, or a `.gguf` file.
      chat_template: the path of a Jinja file, or the Jinja text itself; empty keeps the tokenizer's own.
      model: the model that it is used with, if that is another place; its files say where generation stops, too.

    Raises:
      UserError: there is no such tokenizer, its file is damaged, it is a slow one, its GGUF file is not supported, or
        there is no chat template. Whether the template can be used is checked by `sequences.Renderer`.
    """
    path = pathlib.Path(name_or_path).expanduser()
    if gguf_file.is_gguf(path):
        tokenizer = gguf_tokenizer.load(path)
    else:
        tokenizer = _load_published(str(path) if path.is_dir() else str(name_or_path), path)
    if chat_template:
        tokenizer.chat_template = _read_template(chat_template)
    elif isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: text.removeprefix(_BOM) for name, text in tokenizer.chat_template.items()}
    elif tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.chat_template.removeprefix(_BOM)
    if not tokenizer.chat_template:
        raise NoChatTemplateError(
            f"{path.name}: the tokenizer has no chat template, which says how a dialogue becomes text. "
            "Give one with chat_template (a Jinja file or its text); an instruction-tuned model has its own."
        )
    setattr(tokenizer, _MODEL, str(pathlib.Path(model).expanduser()) if model else "")
    return tokenizer


def fingerprint(tokenizer: transformers.PreTrainedTokenizerFast) -> str:
    """Returns a hash of everything that determines the token ids of a text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def largest_token(tokenizer: transformers.PreTrainedTokenizerFast) -> int:
    """Returns the largest token id."""
    return max(tokenizer.get_vocab().values())


def read_stop_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> frozenset[int]:
    """Returns the ids at which generation stops by the files beside a tokenizer and those of its model; empty if none.

    The files are generation_config.json and config.json.
    """
    ids: set[int] = set()
    for name in {tokenizer.name_or_path, getattr(tokenizer, _MODEL, "")} - {""}:
        for file in () if gguf_file.is_gguf(pathlib.Path(name)) else ("generation_config.json", "config.json"):
            fields = _read_fields(name, file)
            text_config = fields.get("text_config")
            for part in (fields, text_config if isinstance(text_config, dict) else {}):
                stops = part.get("eos_token_id")
                ids.update(stop for stop in (stops if isinstance(stops, list) else [stops]) if isinstance(stop, int))
    return frozenset(ids)


def _read_fields(name: str, file: str) -> dict[str, Any]:
    """Returns the fields of a JSON file of a model; empty if there is none."""
    try:
        value = json.loads(pathlib.Path(str(hub.cached_file(name, file))).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # another part of the program reports what is wrong with it
        return {}
    return value if isinstance(value, dict) else {}


def check_vocabulary(tokenizer: transformers.PreTrainedTokenizerFast, size: int) -> None:
    """Raises UserError if the tokenizer has token ids of `size` or more, for which the model has no embedding."""
    largest = largest_token(tokenizer)
    if largest >= size:
        raise UserError(
            f"the tokenizer has token ids up to {largest:,} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the "
            f"model's embedding has {size:,} rows. Use the tokenizer that belongs to the model, or add rows for new "
            "tokens with --config.resize_embedding."
        )


def _load_published(source: str, path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    try:
        file = path / "tokenizer.json" if path.is_dir() else _download_tokenizer_file(source)
    except OSError as error:
        raise _not_loaded(path, error) from None
    published = _read_tokenizer_file(file)
    tokenizer_settings.check_settings(path if file is None or path.is_dir() else file.parent)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(path, error) from None
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        raise UserError(
            f"{path.name}: got the slow tokenizer {type(tokenizer).__name__}; needed a fast one, which has the "
            "character offsets of tokens. Convert it to a tokenizer.json first."
        )
    if published is not None:
        tokenizer_files.apply_file(tokenizer, *published)
    return tokenizer


def _not_loaded(path: pathlib.Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"{path.name}: no tokenizer could be loaded ({reason}). Give a directory with tokenizer.json and "
        "tokenizer_config.json, a hub name, or a .gguf file; code that comes with a tokenizer is never run."
    )


def _download_tokenizer_file(name: str) -> pathlib.Path | None:
    """Returns the local copy of a Hub model's tokenizer.json; None if the model has none."""
    file = hub.cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    return None if file is None else pathlib.Path(file)


def _read_tokenizer_file(file: pathlib.Path | None) -> tuple[str, tokenizers.Tokenizer] | None:
    """Returns (text, tokenizer) of a tokenizer.json; None if there is none.

    Raises:
      UserError: the file is damaged; transformers would raise anything.
    """
    if file is None or not file.is_file():
        return None
    name = f"{file.parent.name}/{file.name}"
    remedy = "The file is damaged or incomplete: download it again, or save the tokenizer again."
    try:
        text = file.read_bytes().decode()
        value = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{name}: not JSON ({error}). {remedy}") from None
    if not isinstance(value, dict) or not isinstance(value.get("added_tokens"), list):
        raise UserError(f"{name}: not a JSON object with a list of added_tokens. {remedy}")
    try:
        backend = tokenizer_files.read_backend(text)
    except ValueError as error:
        raise UserError(f"{name}: not a tokenizer ({error}). {remedy}") from None
    if failure := tokenizer_files.find_failure(backend):
        raise UserError(f"{name}: it cannot tokenize every text ({failure}). {remedy}")
    vocabulary = value["model"]["vocab"]
    if isinstance(vocabulary, dict) and len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{name}: several tokens of its vocabulary have the same id. {remedy}")
    return text, backend


def _read_template(chat_template: str) -> str:
    if "{" in chat_template or "\n" in chat_template:
        return chat_template
    path = pathlib.Path(chat_template).expanduser()
    if not path.is_file():
        raise UserError(
            f"{path.name}: chat_template is neither Jinja text (it has no brace) nor a file. Check the path."
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name}: not UTF-8 text ({error}). Save it as UTF-8.") from None
