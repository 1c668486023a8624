"""Axolotl's fields of adapters and of quantized bases: rules as those of `axolotl_fields`."""

from collections.abc import Callable
from typing import Any

from dialog_jax.drafting.axolotl_values import (
    Fields,
    NotCarriedError,
    Rule,
    boolean,
    integer,
    is_new_adapter,
    mapping,
    number,
)
from dialog_jax.drafting.config_text import Entry

_DEFAULT_RANK = 8  # PEFT's


def _to_adapter(field: str, convert: Callable[[Any], Any]) -> Rule:
    def apply(value: Any, fields: Fields) -> list[Entry]:
        _check_adapter(fields)
        return [Entry(field, convert(value))]

    return apply


def _check_adapter(fields: Fields) -> None:
    if fields.get("lora_model_dir"):
        raise NotCarriedError("the adapter in lora_model_dir has its own")
    if not is_new_adapter(fields):
        raise NotCarriedError("no effect without adapter: lora or qlora")


def _read_adapter(value: Any, fields: Fields) -> list[Entry]:
    if value not in ("lora", "qlora"):
        raise NotCarriedError(f"{value!r} is not supported; lora and qlora are")
    rank = [] if fields.get("lora_r") or fields.get("lora_model_dir") else [Entry("lora.rank", _DEFAULT_RANK)]
    return [*rank, *([Entry("frozen_dtype", "nf4")] if value == "qlora" and not fields.get("load_in_4bit") else [])]


def _quantize(kind: str) -> Rule:
    def apply(value: Any, fields: Fields) -> list[Entry]:
        if not boolean(value):
            return []
        if fields.get("adapter") not in ("lora", "qlora"):
            raise NotCarriedError("without adapter: lora or qlora all weights are trained, in float32")
        if kind == "int8" and (fields.get("load_in_4bit") or fields.get("adapter") == "qlora"):
            raise NotCarriedError("the base is loaded in 4 bits")
        return [Entry("frozen_dtype", kind)]

    return apply


def _read_targets(value: Any, fields: Fields) -> list[Entry]:
    _check_adapter(fields)
    if fields.get("lora_target_linear"):
        raise NotCarriedError("lora_target_linear adapts these and all others")
    if isinstance(value, str) and value != "all-linear":
        raise NotCarriedError("a regular expression; list names")
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise NotCarriedError(f"{value!r} is not a list of names")
    return [Entry("lora.targets", tuple(names))]


def _read_linear(value: Any, fields: Fields) -> list[Entry]:
    if not boolean(value) and is_new_adapter(fields) and not fields.get("lora_target_modules"):
        raise NotCarriedError("all linear layers are adapted; set lora.targets")
    return []


RULES: dict[str, Rule] = {
    "adapter": _read_adapter,
    "lora_r": _to_adapter("lora.rank", integer),
    "lora_alpha": _to_adapter("lora.alpha", number),
    "lora_dropout": _to_adapter("lora.dropout", number),
    "lora_target_modules": _read_targets,
    "lora_target_linear": _read_linear,
    "lora_rank_pattern": _to_adapter("lora.rank_pattern", mapping),
    "lora_alpha_pattern": _to_adapter("lora.alpha_pattern", mapping),
    "peft_use_rslora": _to_adapter("lora.rslora", boolean),
    "loraplus_lr_ratio": _to_adapter("lora.learning_rate_ratio", number),
    "load_in_4bit": _quantize("nf4"),
    "load_in_8bit": _quantize("int8"),
}
