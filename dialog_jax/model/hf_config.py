"""The structure of a published model: config.json to `DecoderConfig`, and back. For GGUF see `model.gguf_config`.

Missing fields have the defaults of transformers' configuration class. A setting that changes the computation and is not
supported is an error that names it.
"""

import copy
import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dialog_jax.errors import UserError
from dialog_jax.model import rope_parameters
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.model.families import FAMILIES
from dialog_jax.model.family import FULL, Family, Fields
from dialog_jax.model.rotary import LongRopeScaling, Rotary

# A whole config.json has them; a text_config is often saved without.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Fields that are read of every family, in the spelling of transformers 5.
READ = frozenset(
    {
        *_SIZES,
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("hidden_act", "hidden_activation", "rope_parameters", "original_max_position_embeddings"),
    }
)
# Fields that change the computation of some family: the values with which they change nothing.
NEEDED: dict[str, tuple] = {
    "mlp_bias": (False, None),
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": (None, [FULL]),
    "partial_rotary_factor": (1, None),
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def is_wrapper(fields: Fields) -> bool:
    """Returns whether config.json describes a model, for instance of images and text, that contains a decoder."""
    return isinstance(fields.get("text_config"), Mapping)


def wrap_json(outer: Fields, decoder: Fields) -> dict[str, Any]:
    """Returns the fields of a wrapper's config.json around those of its decoder, as `to_json` gives them."""
    dtypes = {name: decoder[name] for name in ("dtype", "torch_dtype") if name in outer}
    text = {name: value for name, value in decoder.items() if name != "architectures"}
    tied = {"tie_word_embeddings": decoder["tie_word_embeddings"]}
    return {**outer, **tied, **dtypes, "text_config": {**outer["text_config"], **text}}


def from_json(file: pathlib.Path, fields: Fields) -> DecoderConfig:
    """Returns the structure that the `fields` of config.json describe; errors name `file`.

    Raises:
      UserError: the family is unknown, a field is missing, or a setting is not supported.
    """
    fields, family = _unwrap(file, fields)
    record = FAMILIES[family]
    _refuse_unsupported(file, record, fields)
    full = _fill_defaults(file, family, fields)
    _refuse_unsupported(file, record, full)  # defaults too
    try:
        heads = full["num_attention_heads"]
        return DecoderConfig(
            family=family,
            vocab_size=full["vocab_size"],
            width=full["hidden_size"],
            layers=full["num_hidden_layers"],
            heads=heads,
            kv_heads=full.get("num_key_value_heads") or heads,
            head_dim=full.get("head_dim") or full["hidden_size"] // heads,
            max_length=full["max_position_embeddings"],
            norm_epsilon=full["rms_norm_eps"],
            tie_embeddings=bool(full.get("tie_word_embeddings")),
            **(
                {"feed_forward": full["intermediate_size"], "activation": _read_activation(full)}
                | _read_rotary(record, full)
                | record.read(full)
            ),
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: {error}") from error


def _unwrap(file: pathlib.Path, fields: Fields) -> tuple[Fields, str]:
    """Returns (the fields of the decoder: those of `text_config`, if there is one; its family)."""
    outer = fields.get("model_type")
    if not is_wrapper(fields):
        if outer not in FAMILIES:
            raise UserError(f"{file}: model_type is {outer!r}; supported are {', '.join(FAMILIES)}")
        for name in (*_SIZES, "max_position_embeddings"):
            if fields.get(name) is None:
                raise UserError(f"{file}: {name} is missing; is this the config.json of a {outer} model?")
        return fields, outer
    text = fields["text_config"]
    family = text.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{file}: model_type is {outer!r} with a text_config of model_type {family!r}; supported there are "
            f"{', '.join(FAMILIES)}"
        )
    tied = {}
    if "tie_word_embeddings" in text or "tie_word_embeddings" in fields:
        tied["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or fields.get("tie_word_embeddings"))
    return {"quantization_config": fields.get("quantization_config"), **text, **tied}, family


def _fill_defaults(file: pathlib.Path, family: str, fields: Fields) -> Fields:
    """Returns the fields as transformers 5 spells them, with its defaults where `fields` has none."""
    given = {name: _decode_floats(value) for name, value in fields.items() if name != "quantization_config"}
    logger = logging.getLogger("transformers")  # warns of what is checked here, and of token ids that are not read
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return CONFIG_MAPPING[family].from_dict(given).to_dict()
    except (ArithmeticError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: transformers does not read it: {type(error).__name__}: {reason}") from error
    finally:
        logger.setLevel(level)


def _decode_floats(value: Any) -> Any:
    """Returns a copy of a field, which transformers changes, with the float for its {"__float__": "Infinity"}."""
    if isinstance(value, Mapping) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return [_decode_floats(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


def _refuse_unsupported(file: pathlib.Path, family: Family, fields: Fields) -> None:
    rope = fields.get("rope_parameters") or {}
    if "partial_rotary_factor" in rope:
        fields = {"partial_rotary_factor": rope["partial_rotary_factor"], **fields}
    for name, values in {**NEEDED, **family.needed}.items():
        if name in family.fields or name not in fields:
            continue
        got = fields[name]
        if name == "quantization_config" and _is_decoded(family, got):
            continue
        if isinstance(got, list | tuple):
            got = sorted(set(got))
        if got not in values:
            raise UserError(f"{file}: {name} is {fields[name]!r}, which is not supported (only {values[0]!r} is)")
    for name in ("hidden_act", "hidden_activation"):
        if fields.get(name, "silu") not in (None, *_ACTIVATIONS):
            raise UserError(f"{file}: {name} is {fields[name]!r}, which is not supported")


def _is_decoded(family: Family, quantization: Any) -> bool:
    return isinstance(quantization, Mapping) and quantization.get("quant_method") in family.quant_methods


def _read_activation(fields: Fields) -> str:
    return _ACTIVATIONS[fields.get("hidden_activation") or fields["hidden_act"]]


def _read_rotary(family: Family, fields: Fields) -> dict[str, Any]:
    """Returns the kinds of RoPE, and that of each layer if the family has several."""
    parameters = fields["rope_parameters"]
    # transformers reads `truncate` of all kinds at the top.
    parts = [parameters[kind] | {"truncate": parameters.get("truncate")} for kind in family.rope_kinds]
    kinds: tuple[Rotary | None, ...] = tuple(rope_parameters.parse(part, fields) for part in parts or [parameters])
    indices = family.layer_rotary(fields) if family.layer_rotary else ()
    if len(kinds) in indices:
        kinds = (*kinds, None)
    if len(set(indices)) == 1:
        return {"rotary": (kinds[indices[0]],)}
    return {"rotary": kinds, "layer_rotary": indices}


def to_json(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """Returns the fields of config.json, with weights of `dtype`, as Hugging Face transformers and vLLM read them.

    Raises:
      UserError: no model of this family has such a structure.
    """
    family = FAMILIES[config.family]
    kinds = [rope_parameters.describe(kind) | {"rope_theta": kind.theta} for kind in config.rotary if kind is not None]
    kinds = kinds or [{"rope_type": "default", "rope_theta": 10000.0}]  # of a model without RoPE
    kinds *= 1 if len(kinds) > 1 else max(1, len(family.rope_kinds))  # layers of one type only
    fields = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        # Both spellings: transformers 5 reads rope_parameters, earlier releases and vLLM the others.
        "rope_parameters": dict(zip(family.rope_kinds, kinds, strict=True)) if family.rope_kinds else kinds[0],
        "rope_theta": kinds[-1]["rope_theta"],
        **{"hidden_act": config.activation, **family.write(config)},
    }
    if scaling := rope_parameters.describe_scaling(kinds[-1]):
        fields["rope_scaling"] = scaling
    if "partial_rotary_factor" in kinds[-1] and not family.rope_kinds:
        fields["partial_rotary_factor"] = kinds[-1]["partial_rotary_factor"]
    for kind in config.rotary:
        if kind is not None and isinstance(kind.scaling, LongRopeScaling):
            fields["original_max_position_embeddings"] = kind.scaling.original_max_length
    again, config = from_json(pathlib.Path("config.json"), fields), config.for_length(1)
    if again != config:
        names = [
            field.name
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(again, field.name)
        ]
        raise UserError(
            f"no {config.family} model has "
            + ", ".join(f"{name} = {getattr(config, name)!r} (but {getattr(again, name)!r})" for name in names)
        )
    return fields
