"""Axolotl's fields and ours, as tables: what is carried over, how, and why the others are not.

In: a value and the fields beside it. Out: entries of a config, or `NotCarriedError` with a reason. docs/coming_from.md
has the same for readers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dialog_jax.dialogues.schemas import ROLE_NAMES
from dialog_jax.drafting.config_text import Entry

Fields = Mapping[str, Any]
Rule = Callable[[Any, Fields], list[Entry]]
_DEFAULT_RANK = 8  # PEFT's
_B2 = "AdamW's b2 is 0.99 here unless it is set, and 0.999 there."


class NotCarriedError(Exception):
    """A value has no counterpart here; the text says why."""


def _to(field: str, convert: Callable[[Any], Any], comment: str = "") -> Rule:
    return lambda value, fields: [Entry(field, convert(value), comment)]


def _to_adapter(field: str, convert: Callable[[Any], Any]) -> Rule:
    def apply(value: Any, fields: Fields) -> list[Entry]:
        _check_adapter(fields)
        return [Entry(field, convert(value))]

    return apply


def _check_adapter(fields: Fields) -> None:
    if fields.get("lora_model_dir"):
        raise NotCarriedError("the adapter in lora_model_dir has its own")
    if fields.get("adapter") not in ("lora", "qlora"):
        raise NotCarriedError("no effect without adapter: lora or qlora")


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise NotCarriedError(f"{value!r} is no text")
    return value


def number(value: Any) -> float:
    """Returns a number; YAML reads 2e-5 as a text."""
    try:
        converted = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        converted = math.nan
    if not math.isfinite(converted):
        raise NotCarriedError(f"{value!r} is no number")
    return converted


def integer(value: Any) -> int:
    converted = number(value)
    if converted != int(converted):
        raise NotCarriedError(f"{value!r} is no whole number")
    return int(converted)


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise NotCarriedError(f"{value!r} is no mapping")
    return dict(value)


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise NotCarriedError(f"{value!r} is neither true nor false")
    return value


def _only(*defaults: Any, reason: str) -> Rule:
    """Returns the rule of a field whose values `defaults` say what is done here anyway."""

    def apply(value: Any, fields: Fields) -> list[Entry]:
        if value not in defaults:
            raise NotCarriedError(reason)
        return []

    return apply


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
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise NotCarriedError(f"{value!r} is no list of names")
    return [Entry("lora.targets", tuple(names))]


def _read_validation_share(value: Any, fields: Fields) -> list[Entry]:
    share = number(value)
    if fields.get("test_datasets"):
        raise NotCarriedError("test_datasets names the held-out data")
    if not 0 < share < 1:
        what = "a number of records; here it is a share" if share else "5 % are held out here without test_datasets"
        raise NotCarriedError(what)
    return [Entry("data.validation_share", share)]


def _read_template(value: Any, fields: Fields) -> list[Entry]:
    if value == "tokenizer_default" or (value == "jinja" and fields.get("chat_template_jinja")):
        return []
    raise NotCarriedError("the tokenizer's own template is used; for another, set data.chat_template to a Jinja file")


def _read_schedule(value: Any, fields: Fields) -> list[Entry]:
    if value in ("cosine", "linear"):
        comment = "Falls to this share of the peak; there to 0, here by default to 0.1."
        fraction = number(fields.get("cosine_min_lr_ratio") or 0) if value == "cosine" else 0.0
        return [Entry("optimizer.schedule", value), Entry("optimizer.final_fraction", fraction, comment)]
    if value in ("constant", "constant_with_warmup"):
        warmup = [Entry("optimizer.warmup_steps", 0)] if value == "constant" else []
        return [Entry("optimizer.schedule", "constant"), *warmup]
    raise NotCarriedError("there is no such schedule; cosine is used. Others: linear, constant, warmup_stable_decay")


def _read_min_ratio(value: Any, fields: Fields) -> list[Entry]:
    number(value)
    if fields.get("lr_scheduler") != "cosine":
        raise NotCarriedError("no effect without lr_scheduler: cosine")
    return []  # read with the schedule


def _read_warmup(value: Any, fields: Fields) -> list[Entry]:
    if fields.get("lr_scheduler") == "constant":
        raise NotCarriedError("lr_scheduler: constant has no warm-up")
    return [Entry("optimizer.warmup_steps", integer(value))]


def _read_warmup_ratio(value: Any, fields: Fields) -> list[Entry]:
    if fields.get("warmup_steps") or not fields.get("max_steps"):
        raise NotCarriedError("a share of the updates; here optimizer.warmup_steps is their number, 3 % if left out")
    return _read_warmup(round(number(value) * integer(fields["max_steps"])), fields)


def _read_optimizer(value: Any, fields: Fields) -> list[Entry]:
    if value in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla"):
        return [Entry("optimizer.name", "adamw", "" if "adam_beta2" in fields else _B2)]
    if value in ("adafactor", "muon"):
        return [Entry("optimizer.name", value)]
    if isinstance(value, str) and "adamw" in value:
        remedy = 'AdamW with float32 moments is used; moments_dtype="bfloat16" halves them'
        raise NotCarriedError(f"moments of few bits, or in pages, are not supported: {remedy}. {_B2}")
    raise NotCarriedError("there is no such optimizer; adamw is used. Others: adafactor, muon")


def _read_bf16(value: Any, fields: Fields) -> list[Entry]:
    if value == "auto":
        return []
    return [Entry("compute_dtype", "bfloat16")] if boolean(value) else _read_no_bf16(fields)


def _read_no_bf16(fields: Fields) -> list[Entry]:
    return [] if fields.get("fp16") else [Entry("compute_dtype", "float32")]


def _read_checkpointing(value: Any, fields: Fields) -> list[Entry]:
    if not isinstance(value, bool):
        raise NotCarriedError("nothing is offloaded; remat says what the backward pass recomputes")
    return [Entry("remat", "full" if value else "none")]


def _find_checkpoints(fields: Fields) -> int | None:
    """Returns save_steps if it is a multiple of eval_steps, as checkpoint_every must be of evaluate_every."""
    saves, evaluations = integer(fields.get("save_steps", 0)), integer(fields["eval_steps"])
    return saves if evaluations > 0 and saves > 0 and not saves % evaluations else None


def _read_evaluation(value: Any, fields: Fields) -> list[Entry]:
    every = integer(value)
    return [Entry("evaluate_every", every), Entry("checkpoint_every", _find_checkpoints(fields) or every)]


def _read_saves(value: Any, fields: Fields) -> list[Entry]:
    every = integer(value)
    if "eval_steps" not in fields:
        comment = "There is an evaluation before each checkpoint, since the best is kept."
        return [Entry("evaluate_every", every, comment), Entry("checkpoint_every", every)]
    if _find_checkpoints(fields) is None:
        raise NotCarriedError("no multiple of eval_steps, as checkpoint_every must be of evaluate_every")
    return []  # read with eval_steps


def _read_wandb(value: Any, fields: Fields) -> list[Entry]:
    others = ("trackio",) if fields.get("use_trackio") is True else ()
    return [Entry("trackers", ("tensorboard", "wandb", *others))] if boolean(value) else []


def _read_trackio(value: Any, fields: Fields) -> list[Entry]:
    if not boolean(value) or fields.get("use_wandb") is True:  # read with it
        return []
    return [Entry("trackers", ("tensorboard", "trackio"))]


def read_roles_to_train(value: Any, fields: Fields) -> list[Entry]:
    roles = [ROLE_NAMES.get(str(role)) for role in value] if isinstance(value, list) else []
    if set(roles) == {"assistant"}:
        return []
    if not roles or None in roles:
        raise NotCarriedError(f"{value!r} are no roles; assistant messages are trained on")
    return [Entry("objective.name", "roles"), Entry("objective.roles", tuple(dict.fromkeys(roles)))]


RULES: dict[str, Rule] = {
    "base_model": _to("model", text),
    "tokenizer_config": _to("tokenizer", text),
    "lora_model_dir": _to("adapter", text),
    "adapter": _read_adapter,
    "lora_r": _to_adapter("lora.rank", integer),
    "lora_alpha": _to_adapter("lora.alpha", number),
    "lora_dropout": _to_adapter("lora.dropout", number),
    "lora_target_modules": _read_targets,
    "lora_target_linear": _only(True, False, reason="neither true nor false"),  # true is the default here
    "peft_use_rslora": _to_adapter("lora.rslora", boolean),
    "loraplus_lr_ratio": _to_adapter("lora.learning_rate_ratio", number),
    "load_in_4bit": _quantize("nf4"),
    "load_in_8bit": _quantize("int8"),
    "val_set_size": _read_validation_share,
    "sequence_len": _to("data.max_length", integer),
    "chat_template": _read_template,
    "chat_template_jinja": _to("data.chat_template", text),
    "chat_template_kwargs": _to("data.chat_template_kwargs", mapping),
    "dataset_prepared_path": _to("data.cache_dir", text),
    "dataset_num_proc": _to("data.workers", integer),
    "dataset_processes": _to("data.workers", integer),
    "train_on_inputs": _only(False, reason='another objective, which trains prompts too; objective.name="joint" is it'),
    "train_on_eos": _only("turn", reason="the end of each trained response is trained, and no other"),
    "roles_to_train": read_roles_to_train,
    "label_smoothing_factor": _to("loss.label_smoothing", number),
    "micro_batch_size": _to(
        "rows",
        integer,
        "Over all devices, and there per device: multiply it by their number.",
    ),
    "gradient_accumulation_steps": _to("gradient_accumulation", integer),
    "num_epochs": _to("epochs", number),
    "max_steps": _to("steps", integer),
    "learning_rate": _to("optimizer.learning_rate", number),
    "lr_scheduler": _read_schedule,
    "cosine_min_lr_ratio": _read_min_ratio,
    "warmup_steps": _read_warmup,
    "warmup_ratio": _read_warmup_ratio,
    "optimizer": _read_optimizer,
    "weight_decay": _to("optimizer.weight_decay", number),
    "max_grad_norm": _to("optimizer.clip_norm", number),
    "adam_beta1": _to("optimizer.b1", number),
    "adam_beta2": _to("optimizer.b2", number),
    "adam_epsilon": _to("optimizer.epsilon", number),
    "bf16": _read_bf16,
    "fp16": _only(False, reason="float16 is not supported; compute_dtype is bfloat16 on accelerators"),
    "gradient_checkpointing": _read_checkpointing,
    "eval_steps": _read_evaluation,
    "save_steps": _read_saves,
    "save_total_limit": _to("keep_checkpoints", integer),
    "use_tensorboard": _only(True, False, reason="neither true nor false"),
    "use_wandb": _read_wandb,
    "use_trackio": _read_trackio,
    "seed": _to("seed", integer),
}
