"""What the files of a published model say besides its parameters, and where they disagree with its config.json."""

import contextlib
import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from dialog_jax.formats import gguf_file
from dialog_jax.model import decoder, hf_config, tensor_files, tensor_names


def is_untied(path: pathlib.Path) -> bool:
    """Returns whether a file has an unembedding that is not the embedding; then transformers does not tie them either.

    Source: `PreTrainedModel.tie_weights` of transformers 5.
    """
    first, second = tensor_names.EMBEDDING, tensor_names.UNEMBEDDING
    with open_tensors(path) as tensors:
        if not tensors.shapes.keys() >= {first, second}:
            return False
        return not np.array_equal(tensors.read(first), tensors.read(second))


def open_tensors(
    path: pathlib.Path, config: decoder.DecoderConfig | None = None
) -> contextlib.AbstractContextManager[tensor_files.Tensors]:
    """Returns a context manager that yields the tensors of a model.

    Args:
      config: needed for a GGUF file.
    """
    if gguf_file.is_gguf(path):
        assert config is not None
        return tensor_files.gguf_tensors(path, config)
    file = path / "config.json"
    wrapped = file.exists() and hf_config.is_wrapper(tensor_files.read_json(file))
    return tensor_files.open_safetensors(path, wrapped=wrapped)


class Weights(NamedTuple):
    """What the files of a model's weights say of them."""

    dtype: str
    """float32, float16 or bfloat16: the type of most of them; float32 if they are quantized."""
    notes: tuple[str, ...]
    """In what they differ from what config.json leads one to expect; for the user."""


def describe_weights(path: pathlib.Path, config: decoder.DecoderConfig) -> Weights:
    """Returns what the files say; reads only their headers.

    Raises:
      UserError: a file is missing or broken.
    """
    with open_tensors(path, config) as tensors:
        notes = []
        if tensors.others:
            parts = sorted({name.partition(".")[0] for name in tensors.others})
            notes.append(
                f"{path.name} holds more than a language model: {len(tensors.others):,} tensors ({', '.join(parts)}) "
                "are not read, and an export has the language model alone"
            )
        if not gguf_file.is_gguf(path) and not config.tie_embeddings:
            fields = tensor_files.read_json(path / "config.json")
            if hf_config.from_json(path / "config.json", fields).tie_embeddings:
                notes.append(
                    f"{path.name}: config.json ties the embeddings, but lm_head.weight differs from the embedding; "
                    "they are two matrices here, as in transformers 5"
                )
        return Weights(tensors.find_dtype(), tuple(notes))


def stop_tokens(path: pathlib.Path) -> set[int]:
    """Returns the ids at which generation ends, from a model's config.json and generation_config.json."""
    ids: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        if (path / file).is_file():
            fields = tensor_files.read_json(path / file)
            for part in (fields, fields["text_config"] if hf_config.is_wrapper(fields) else {}):
                ends = part.get("eos_token_id")
                ids.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return ids


def fingerprint(path: pathlib.Path) -> str:
    """Returns a hash of a model's config and of its weight files' names, sizes, first and last MiB."""
    digest = hashlib.sha256()
    files = (
        gguf_file.list_files(path) if path.is_file() else [*sorted(path.glob("*.safetensors")), path / "config.json"]
    )
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()
