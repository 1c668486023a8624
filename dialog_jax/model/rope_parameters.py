"""RoPE in config.json: the field `rope_parameters` of transformers 5 to `Rotary` and back, and `rope_scaling` of 4."""

from collections.abc import Mapping
from typing import Any

from dialog_jax.errors import UserError
from dialog_jax.model.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rotary,
    Scaling,
    YarnScaling,
)


def parse(parameters: Mapping[str, Any], fields: Mapping[str, Any]) -> Rotary:
    """Returns the RoPE that the fields of one kind describe.

    Args:
      fields: all of config.json, for the lengths.

    Raises:
      UserError: its type is not supported, or a field is missing.
    """
    kind = parameters.get("rope_type") or "default"
    original = parameters.get("original_max_position_embeddings") or fields["max_position_embeddings"]
    fraction = float(parameters.get("partial_rotary_factor") or 1.0)
    scaling: Scaling | None = None
    try:
        if kind == "linear":
            scaling = LinearScaling(factor=float(parameters["factor"]))
        elif kind == "dynamic":
            scaling = DynamicScaling(factor=float(parameters["factor"]))
        elif kind == "llama3":
            scaling = Llama3Scaling(
                factor=float(parameters["factor"]),
                low_frequency_factor=float(parameters["low_freq_factor"]),
                high_frequency_factor=float(parameters["high_freq_factor"]),
                original_max_length=int(original),
            )
        elif kind == "yarn":
            names = ("attention_factor", "mscale", "mscale_all_dim")
            optional = {name: float(value) for name in names if (value := parameters.get(name)) is not None}
            scaling = YarnScaling(
                factor=float(parameters["factor"]),
                original_max_length=int(original),
                beta_fast=float(parameters.get("beta_fast") or 32),
                beta_slow=float(parameters.get("beta_slow") or 1),
                truncate=parameters.get("truncate") is not False,
                **optional,
            )
        elif kind == "longrope":
            longest = fields["max_position_embeddings"]
            original = fields.get("original_max_position_embeddings") or original
            factor = parameters.get("attention_factor")
            scaling = LongRopeScaling(
                short_factors=tuple(map(float, parameters["short_factor"])),
                long_factors=tuple(map(float, parameters["long_factor"])),
                factor=float(parameters.get("factor") or longest / original),
                original_max_length=int(original),
                attention_factor=None if factor is None else float(factor),
            )
        elif kind == "proportional":
            scaling = ProportionalScaling(fraction=fraction, factor=float(parameters.get("factor") or 1.0))
            fraction = 1.0
        elif kind != "default":
            raise UserError(f"rope_type is {kind!r}, which is not supported")
    except KeyError as error:
        raise UserError(f"rope scaling of type {kind} lacks {error.args[0]}") from None
    growth = float(parameters.get("llama_4_scaling_beta") or 0.0)
    return Rotary(
        theta=float(parameters["rope_theta"]),
        scaling=scaling,
        fraction=fraction,
        query_growth=growth,
    )


def describe(rotary: Rotary) -> dict[str, Any]:
    """Returns the fields of one kind, without `rope_theta`."""
    scaling = rotary.scaling
    described: dict[str, Any] = {"rope_type": "default"}
    if isinstance(scaling, LinearScaling | DynamicScaling):
        described = {"rope_type": "linear" if isinstance(scaling, LinearScaling) else "dynamic"}
        described["factor"] = scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        described = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    elif isinstance(scaling, YarnScaling):
        described = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(scaling, name) is not None:
                described[name] = getattr(scaling, name)
    elif isinstance(scaling, LongRopeScaling):
        described = {
            "rope_type": "longrope",
            "factor": scaling.factor,
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "original_max_position_embeddings": scaling.original_max_length,
        }
        if scaling.attention_factor is not None:
            described["attention_factor"] = scaling.attention_factor
    elif isinstance(scaling, ProportionalScaling):
        described = {"rope_type": "proportional", "partial_rotary_factor": scaling.fraction}
        if scaling.factor != 1.0:
            described["factor"] = scaling.factor
    if rotary.fraction != 1.0:
        described["partial_rotary_factor"] = rotary.fraction
    if rotary.query_growth:
        described["llama_4_scaling_beta"] = rotary.query_growth
    return described


def describe_scaling(kind: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the field `rope_scaling` of transformers 4, in which that of phi3 has these three fields and no other.

    None where there is no scaling, or only in transformers 5, which would read the field instead of `rope_parameters`.
    """
    if kind["rope_type"] == "proportional":
        return None
    if kind["rope_type"] == "longrope":
        return {"type": "longrope"} | {name: kind[name] for name in ("short_factor", "long_factor")}
    scaling = {name: value for name, value in kind.items() if name not in ("rope_theta", "partial_rotary_factor")}
    return scaling if len(scaling) > 1 else None
