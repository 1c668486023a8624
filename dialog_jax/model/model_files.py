"""What the files of a published model say besides its parameters, and where they disagree with its config.json."""

import contextlib
import fnmatch
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import yaml

from dialog_jax.formats import gguf_file
from dialog_jax.model import decoder, hf_config, parameter_trees, tensor_files, tensor_names
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.families import FAMILIES

LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
DOCUMENTS = (*LICENCES, "README.md")


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
    path: pathlib.Path, config: DecoderConfig | None = None
) -> contextlib.AbstractContextManager[tensor_files.Tensors]:
    """Returns a context manager that yields the tensors of a model.

    Args:
      config: needed for a GGUF file.
    """
    if gguf_file.is_gguf(path):
        assert config is not None
        return tensor_files.gguf_tensors(path, config)
    return _open_safetensors(path, config)


@contextlib.contextmanager
def _open_safetensors(path: pathlib.Path, config: DecoderConfig | None) -> Iterator[tensor_files.Tensors]:
    with tensor_files.open_safetensors(path, wrapped=is_wrapped(path)) as tensors:
        if config is None:
            yield tensors
            return
        if "mxfp4" in FAMILIES[config.family].quant_methods:
            tensors = tensors.decode_mxfp4()
        tensors = tensors.leave_out(tensor_names.find_extra_layers(config, tensors.shapes))
        if fused := tensor_names.find_fused(config):
            tensors = tensors.split(fused, _count_rows(config))
        yield tensors.deinterleave(tensor_names.find_interleaved(config))


def _count_rows(config: DecoderConfig) -> dict[str, int]:
    """Returns the rows of each published matrix of all layers, by its name."""
    flat = parameter_trees.flatten(decoder.abstract_parameters(config))
    return {
        name: leaf.shape[-1]
        for key, leaf in flat.items()
        if tensor_names.is_transposed(config, key)
        for name in tensor_names.list_names(config, key)
    }


def is_wrapped(path: pathlib.Path) -> bool:
    """Returns whether a model is a part of one that also reads, for instance, images."""
    file = path / "config.json"
    return file.exists() and hf_config.is_wrapper(tensor_files.read_json(file))


class Weights(NamedTuple):
    """What the files of a model's weights say of them."""

    dtype: str
    """float32, float16 or bfloat16: the type of most of them; float32 if they are quantized."""
    notes: tuple[str, ...]
    """In what they differ from what config.json leads one to expect; for the user."""


def describe_weights(path: pathlib.Path, config: DecoderConfig) -> Weights:
    """Returns what the files say; reads only their headers.

    Raises:
      UserError: a file is missing or broken.
    """
    with open_tensors(path, config) as tensors:
        notes = []
        if tensors.others:
            parts = sorted({_name_part(name) for name in tensors.others})
            notes.append(
                f"holds more than a language model: {len(tensors.others):,} tensors ({', '.join(parts)}) are not read, "
                "and an export has them as they are"
            )
        fields = {} if gguf_file.is_gguf(path) else tensor_files.read_json(path / "config.json")
        if fields.get("quantization_config"):
            notes.append("matrices of experts are published in MXFP4 and decoded; an export has them in its own type")
        published = hf_config.from_json(path / "config.json", fields) if fields else config
        if published.tie_embeddings and not config.tie_embeddings:
            notes.append(
                "config.json ties the embeddings, but lm_head.weight differs from the embedding; they are two "
                "matrices here, as in transformers 5"
            )
        return Weights(tensors.find_dtype(), tuple(notes))


def _name_part(tensor: str) -> str:
    """Returns the part of a model to which a tensor belongs: vision_tower, or model.layers.46."""
    names = tensor.split(".")
    return ".".join(names[:3] if names[:2] == ["model", "layers"] else names[:1])


def stop_tokens(path: pathlib.Path) -> set[int]:
    """Returns the ids at which generation ends, from a model's config.json and generation_config.json."""
    ids: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        if (path / file).is_file():
            fields = tensor_files.read_json(path / file)
            for part in (fields, fields["text_config"] if hf_config.is_wrapper(fields) else {}):
                ids |= list_ids(part.get("eos_token_id"))
    return ids


def list_ids(value: int | list[int] | None) -> set[int]:
    """Returns the ids in a field that holds one, several or none."""
    return set(value) if isinstance(value, list) else set() if value is None else {value}


def read_generation_config(path: pathlib.Path) -> dict[str, Any]:
    """Returns the fields of generation_config.json; empty if there is none."""
    file = path / "generation_config.json"
    return tensor_files.read_json(file) if file.is_file() else {}


def list_licences(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a model's directory that must go wherever the model goes."""
    patterns = [pattern.lower() for pattern in LICENCES]
    files = sorted(path.iterdir()) if path.is_dir() else []
    return [file for file in files if file.is_file() and any(fnmatch.fnmatch(file.name.lower(), p) for p in patterns)]


def read_licence(path: pathlib.Path) -> dict[str, str]:
    """Returns the fields `license`, `license_name` and `license_link` of the model's README.md or GGUF file."""
    names = ("license", "license_name", "license_link")
    fields: dict[str, Any] | None = None
    if gguf_file.is_gguf(path):
        content = gguf_file.open_gguf(path)
        fields = {name: gguf_file.contents(path, content, f"general.{name.replace('_', '.')}", str) for name in names}
    else:
        card = path / "README.md"
        try:
            if card.is_file():
                fields = huggingface_hub.metadata_load(card)
        except (ValueError, yaml.YAMLError):  # no card of the kind that the Hub reads
            pass
    return {name: str(value) for name in names if (value := (fields or {}).get(name))}


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
