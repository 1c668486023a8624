"""Published checkpoints to parameters and back.

In: a Hugging Face model directory (config.json and safetensors), a GGUF file, or a hub name. Out: a `DecoderConfig` and
the nested dict of parameters; and the same the other way, as a directory that Hugging Face transformers and vLLM open.
One table of names, used both ways. Knows nothing of tokenizers but how to have one saved.
"""

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import gguf
import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from dialog_jax.model import attention, decoder

_SHARD_BYTES = 5 * 10**9

Path = tuple[str, ...]
Sharding = Callable[[Path, tuple[int, ...]], jax.sharding.Sharding]


class _Name(NamedTuple):
    published: str  # Hugging Face's name; {} is the layer
    gguf: str
    transposed: bool = False  # published matrices are [out, in], ours [in, out]


_NAMES: dict[str, _Name] = {
    "embedding": _Name("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": _Name("model.norm.weight", "output_norm.weight"),
    "lm_head": _Name("lm_head.weight", "output.weight"),
    "layers/attention_norm": _Name("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "layers/attention/w_query": _Name("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", True),
    "layers/attention/w_key": _Name("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", True),
    "layers/attention/w_value": _Name("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", True),
    "layers/attention/w_output": _Name("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", True),
    "layers/attention/b_query": _Name("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    "layers/attention/b_key": _Name("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    "layers/attention/b_value": _Name("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    "layers/attention/b_output": _Name("model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
    "layers/attention/query_norm": _Name("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    "layers/attention/key_norm": _Name("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    "layers/feed_forward_norm": _Name("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "layers/feed_forward/w_gate": _Name("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", True),
    "layers/feed_forward/w_up": _Name("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", True),
    "layers/feed_forward/w_down": _Name("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", True),
}

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# What each family's configuration class in transformers assumes where config.json is silent.
_DEFAULT_BIAS = {"llama": False, "qwen2": True, "qwen3": False}


def resolve(name_or_path: str | os.PathLike[str]) -> pathlib.Path:
    """A local directory or .gguf file as it is; otherwise the local copy of a Hugging Face Hub model, fetched at need.

    Raises:
      ValueError: if it is neither.
    """
    path = pathlib.Path(name_or_path).expanduser()
    if path.exists():
        return path
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(name_or_path), allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(
            f"model {str(name_or_path)!r} is no local directory or .gguf file, and could not be had from the Hugging "
            f"Face Hub ({type(error).__name__}: {str(error).partition(chr(10))[0]}). Check the spelling; without "
            "network access, give the path of a downloaded model."
        ) from error


def load_config(path: str | os.PathLike[str]) -> decoder.DecoderConfig:
    """The shape of the model in a Hugging Face directory or a .gguf file.

    Raises:
      ValueError: for a missing or broken config.json, an unknown model type, or a setting that we do not support.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return _gguf_config(path)
    file = path / "config.json"
    fields = _read_json(file)

    def need(name):
        if fields.get(name) is None:
            raise ValueError(f"{file}: {name} is missing; is this the config.json of a {family} model?")
        return fields[name]

    family = fields.get("model_type")
    if family not in decoder.FAMILIES:
        raise ValueError(f"{file}: model_type is {family!r}; supported are {', '.join(decoder.FAMILIES)}")
    _refuse_unsupported(file, fields)
    theta, scaling = _rope(file, fields)
    bias = True if family == "qwen2" else bool(fields.get("attention_bias", _DEFAULT_BIAS[family]))
    heads = need("num_attention_heads")
    default_head_dim = 128 if family == "qwen3" else need("hidden_size") // heads
    try:
        return decoder.DecoderConfig(
            family=family,
            vocab_size=need("vocab_size"),
            width=need("hidden_size"),
            layers=need("num_hidden_layers"),
            heads=heads,
            kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or default_head_dim,
            feed_forward=need("intermediate_size"),
            max_length=need("max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_epsilon=fields.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=bias,
            output_bias=bias and family != "qwen2",
            qk_norm=family == "qwen3",
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; a model is a directory with config.json, or a .gguf file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}. Download or save the model again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}, not an object; download or save the model again")
    return fields


def _refuse_unsupported(file: pathlib.Path, fields: Mapping[str, Any]) -> None:
    sliding = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    partial = (fields.get("rope_parameters") or {}).get("partial_rotary_factor", fields.get("partial_rotary_factor", 1))
    other_layers = sorted(set(fields.get("layer_types") or []) - {"full_attention"})
    bias = fields.get("attention_bias", True)
    checks = [
        ("hidden_act", fields.get("hidden_act", "silu"), "silu"),
        ("mlp_bias", fields.get("mlp_bias") or False, False),
        ("attention_bias", bias if fields["model_type"] == "qwen2" else True, True),
        ("attention_dropout", fields.get("attention_dropout") or 0, 0),
        ("quantization_config", fields.get("quantization_config"), None),
        ("sliding_window", sliding, None),
        ("use_sliding_window", fields.get("use_sliding_window") or False, False),
        ("layer_types", other_layers, []),
        ("partial_rotary_factor", partial, 1),
    ]
    for name, got, needed in checks:
        if got != needed:
            raise ValueError(f"{file}: {name} is {got!r}, which is not supported (only {needed!r} is)")


def _rope(file: pathlib.Path, fields: Mapping[str, Any]) -> tuple[float, attention.Llama3Scaling | None]:
    # Since transformers 5 all is in rope_parameters; before, rope_theta stood alone and rope_scaling held the rest.
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f"{file}: rope_type is {kind!r}, which is not supported (only 'default' and 'llama3' are)")
    try:
        return float(theta), attention.Llama3Scaling(
            factor=float(rope["factor"]),
            low_frequency_factor=float(rope["low_freq_factor"]),
            high_frequency_factor=float(rope["high_freq_factor"]),
            original_max_length=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ValueError(f"{file}: rope scaling of type llama3 lacks {error.args[0]}") from None


def _open_gguf(path: pathlib.Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}. Download it again.") from error


def _gguf_config(path: pathlib.Path) -> decoder.DecoderConfig:
    reader = _open_gguf(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    family = fields["general.architecture"].contents() if "general.architecture" in fields else None
    if family not in decoder.FAMILIES:
        raise ValueError(f"{path}: general.architecture is {family!r}; supported are {', '.join(decoder.FAMILIES)}")

    def get(name, default=None):
        if (field := fields.get(f"{family}.{name}")) is not None:
            return field.contents()
        if default is None:
            raise ValueError(f"{path}: {family}.{name} is missing")
        return default

    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // heads)
    for name, got, needed in [
        ("rope.scaling.type", get("rope.scaling.type", "none"), "none"),
        ("rope.dimension_count", get("rope.dimension_count", head_dim), head_dim),
        ("attention.value_length", get("attention.value_length", head_dim), head_dim),
        ("expert_count", get("expert_count", 0), 0),
    ]:
        if got != needed:
            raise ValueError(f"{path}: {family}.{name} is {got!r}, which is not supported (only {needed!r} is)")
    if "rope_freqs.weight" in shapes:
        raise ValueError(
            f"{path}: scaled RoPE (rope_freqs.weight) is read from safetensors only; use that form of the model"
        )
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path}: tensor token_embd.weight is missing; download the file again")
    return decoder.DecoderConfig(
        family=family,
        vocab_size=shapes["token_embd.weight"][0],
        width=width,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        feed_forward=get("feed_forward_length"),
        max_length=get("context_length"),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        # Written by others as the float32 nearest to a short decimal; read back as that decimal.
        norm_epsilon=float(np.format_float_scientific(np.float32(get("attention.layer_norm_rms_epsilon")))),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
    )


class _Tensors(NamedTuple):
    """The tensors of a model, read when asked for."""

    where: pathlib.Path  # for errors
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, pathlib.Path]
    read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def _open_safetensors(directory: pathlib.Path) -> Iterator[_Tensors]:
    index = directory / "model.safetensors.index.json"
    listed: Mapping[str, str] = {}
    if index.exists():
        listed = _read_json(index).get("weight_map") or {}
        shards = sorted(set(listed.values()))
        for shard in shards:
            if pathlib.PurePath(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
                raise ValueError(f"{index}: {shard!r} is not a file name; shards must lie beside the index")
    else:
        shards = ["model.safetensors"]
    if not shards:
        raise ValueError(f"{index} lists no tensors; download or save the model again")
    with contextlib.ExitStack() as stack:
        handles, files, shapes = {}, {}, {}
        for shard in shards:
            file = directory / shard
            if not file.exists():
                raise ValueError(f"{file} does not exist; weights are read from safetensors (or a .gguf file) only")
            try:
                handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    handles[name], files[name] = handle, file
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(f"{file} is not a whole safetensors file: {error}. Download it again.") from error
        for name in listed.keys() - shapes.keys():
            raise ValueError(f"{directory / listed[name]}: tensor {name} of {index.name} is missing; download it again")
        yield _Tensors(directory, shapes, files, lambda name: handles[name].get_tensor(name))


@contextlib.contextmanager
def _open_gguf_tensors(path: pathlib.Path, config: decoder.DecoderConfig) -> Iterator[_Tensors]:
    tensors = {tensor.name: tensor for tensor in _open_gguf(path).tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    # llama.cpp pairs components (2i, 2i + 1) in llama's rotary dimensions, Hugging Face (i, i + H/2); qwen's stay.
    interleaved = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias") if config.family == "llama" else ()

    def read(name):
        array = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).reshape(shapes[name])
        if name.endswith(interleaved):
            pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    yield _Tensors(path, shapes, dict.fromkeys(shapes, path), read)


def load_parameters(
    path: str | os.PathLike[str],
    config: decoder.DecoderConfig,
    *,
    sharding: Sharding | None = None,
    dtype: jax.typing.DTypeLike = np.float32,
) -> dict:
    """The parameters in a Hugging Face directory or a .gguf file, read one stacked parameter at a time.

    Args:
      sharding: (path of the parameter, its shape) to where it goes; None is JAX's default device.

    Raises:
      ValueError: for a missing, unexpected or misshapen tensor, or a truncated file.
    """
    path = pathlib.Path(path)
    from_gguf = path.suffix == ".gguf"
    with _open_gguf_tensors(path, config) if from_gguf else _open_safetensors(path) as tensors:
        flat = _flatten(decoder.abstract_parameters(config))
        published = {key: _published(key, config, from_gguf) for key in flat}
        _check(tensors, config, flat, published)
        return _unflatten({key: _load(tensors, key, flat[key].shape, published[key], sharding, dtype) for key in flat})


def _flatten(parameters: Mapping[str, Any]) -> dict[str, Any]:
    flat, _ = jax.tree.flatten_with_path(parameters)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in flat}


def _unflatten(flat: Mapping[str, Any]) -> dict:
    parameters: dict = {}
    for key, leaf in flat.items():
        *parents, last = key.split("/")
        node = parameters
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return parameters


def _published(key: str, config: decoder.DecoderConfig, from_gguf: bool = False) -> list[str]:
    """The published names of one parameter: one a layer where it is stacked, else one."""
    name = _NAMES[key].gguf if from_gguf else _NAMES[key].published
    return [name.format(layer) for layer in range(config.layers)] if "{}" in name else [name]


def _check(tensors: _Tensors, config: decoder.DecoderConfig, flat: Mapping, published: Mapping[str, list[str]]) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for key, names in published.items():
        shape = flat[key].shape[1:] if key.startswith("layers/") else flat[key].shape
        expected.update(dict.fromkeys(names, shape[::-1] if _NAMES[key].transposed else shape))
    # A copy of a tied output matrix, and the rotary buffers that old releases of transformers wrote, carry nothing new.
    known = expected.keys() | ({"lm_head.weight"} if config.tie_embeddings else set())
    unexpected = sorted(name for name in tensors.shapes.keys() - known if not name.endswith("rotary_emb.inv_freq"))
    missing = sorted(expected.keys() - tensors.shapes.keys())
    if missing:
        raise ValueError(
            f"{tensors.where}: tensor {missing[0]} is missing ({len(missing)} missing in all). The file is incomplete, "
            "or its config.json belongs to another model; download or save it again."
        )
    if unexpected:
        raise ValueError(
            f"{tensors.files[unexpected[0]]}: tensor {unexpected[0]} is not part of a {config.family} model of this "
            f"config ({len(unexpected)} unexpected in all); check config.json (layers, biases, tie_word_embeddings)"
        )
    for name, needed in expected.items():
        if (got := tensors.shapes[name]) != needed:
            raise ValueError(
                f"{tensors.files[name]}: tensor {name} has shape {list(got)}, but its config needs {list(needed)}; "
                "config.json and weights belong to different models"
            )


def _load(tensors: _Tensors, key: str, shape, names: list[str], sharding: Sharding | None, dtype) -> jax.Array:
    whole = np.empty(shape, dtype)
    slots = whole if key.startswith("layers/") else whole[None]
    for slot, name in zip(slots, names, strict=True):
        array = tensors.read(name)
        if not np.issubdtype(array.dtype, np.floating) and array.dtype != ml_dtypes.bfloat16:
            raise ValueError(
                f"{tensors.files[name]}: tensor {name} is {array.dtype}; float32, float16 or bfloat16 is needed. "
                "Quantised safetensors are not supported."
            )
        slot[...] = array.T if _NAMES[key].transposed else array
    if sharding is None:
        return jax.device_put(whole)
    placement = sharding(tuple(key.split("/")), shape)
    return jax.make_array_from_callback(shape, placement, lambda index: whole[index])


def save_pretrained(
    directory: str | os.PathLike[str],
    config: decoder.DecoderConfig,
    parameters: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a directory that Hugging Face transformers and vLLM open: float32 weights, config, tokenizer if given.

    All of it appears at once, by a rename: what is left of an interrupted save is a directory named `.NAME.partial`.
    An earlier model in `directory` is replaced.

    Raises:
      ValueError: if `directory` holds something other than a model, or parameters and config do not fit.
    """
    directory = pathlib.Path(os.path.abspath(directory))
    if directory.exists() and not (directory / "config.json").exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} holds something other than a model; give a new directory")
    flat, needed = _flatten(parameters), _flatten(decoder.abstract_parameters(config))
    for key in sorted(flat.keys() | needed.keys()):
        got = tuple(flat[key].shape) if key in flat else None
        if key not in needed or got != needed[key].shape:
            raise ValueError(
                f"parameter {key} has shape {got}, but its config needs {needed[key].shape if key in needed else None}"
            )
    partial, replaced = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("partial", "replaced"))
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_weights(partial, config, flat, shard_bytes)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
    _write_json(partial / "config.json", _published_config(config) | ids)
    _write_json(partial / "generation_config.json", {name: value for name, value in ids.items() if value is not None})
    for file in partial.glob("*.safetensors"):
        shutil.copymode(partial / "config.json", file)  # the writer leaves them readable by their owner only
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_json(file: pathlib.Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _published_config(config: decoder.DecoderConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    fields = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        # Both spellings: transformers 5 reads the first line, releases before it and vLLM the others.
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "torch_dtype": "float32",
    }
    if config.family == "llama":
        fields["mlp_bias"] = False
    if config.family == "qwen2":
        # Qwen2 in transformers derives head_dim; any other would not load there.
        if config.head_dim * config.heads != config.width:
            raise ValueError(
                f"qwen2 needs width = heads * head_dim, got {config.width}, {config.heads}, {config.head_dim}"
            )
    else:
        fields["attention_bias"] = config.qkv_bias
    if config.family != "llama":
        fields["use_sliding_window"] = False
    return fields


def _save_weights(
    directory: pathlib.Path, config: decoder.DecoderConfig, flat: Mapping[str, Any], shard_bytes: int
) -> None:
    plan = [(name, key, layer) for key in flat for layer, name in enumerate(_published(key, config))]
    sizes = {key: 4 * math.prod(leaf.shape) // len(_published(key, config)) for key, leaf in flat.items()}
    shards: list[list[tuple[str, str, int]]] = [[]]
    filled = 0
    for entry in sorted(plan):
        if shards[-1] and filled + sizes[entry[1]] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += sizes[entry[1]]
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, entries in zip(files, shards, strict=True):
        arrays = {name: _published_array(flat[key], key, layer) for name, key, layer in entries}
        safetensors.numpy.save_file(arrays, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, entries in zip(files, shards, strict=True) for name, _, _ in entries}
        total = sum(sizes[key] for _, key, _ in plan)
        _write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _published_array(leaf: Any, key: str, layer: int) -> np.ndarray:
    array = np.asarray(leaf[layer] if key.startswith("layers/") else leaf).astype(np.float32)
    return np.ascontiguousarray(array.T if _NAMES[key].transposed else array)
