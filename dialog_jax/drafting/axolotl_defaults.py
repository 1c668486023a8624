"""Axolotl's defaults that differ from ours, for fields that a file leaves out."""

from typing import Any

from dialog_jax.drafting.axolotl_values import Fields, is_new_adapter

_DEFAULTS: dict[str, Any] = {
    "val_set_size": 0,
    "sequence_len": 512,
    "excess_length_strategy": "drop",
    "sample_packing": False,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "lr_scheduler": "cosine",  # to 0
    "adam_beta2": 0.999,
    "save_total_limit": 4,
}
_ADAPTER_DEFAULTS: dict[str, Any] = {"lora_alpha": 8, "lora_target_linear": False}


def find_defaults(fields: Fields) -> dict[str, Any]:
    """Returns the defaults of fields that are absent and that would have an effect.

    Source: `schemas/config.py`, `schemas/training.py` and `core/builders/base.py` of Axolotl; PEFT for `lora_alpha`.
    """
    defaults = {**_DEFAULTS, **(_ADAPTER_DEFAULTS if is_new_adapter(fields) else {})}
    unread = set(fields)
    if "test_datasets" in fields:
        unread.add("val_set_size")
    if "batch_size" in fields:  # it determines them
        unread.add("gradient_accumulation_steps")
    if fields.get("optimizer") == "adafactor":
        unread.add("adam_beta2")
    if fields.get("lora_target_modules"):
        unread.add("lora_target_linear")
    return {name: value for name, value in defaults.items() if name not in unread}
