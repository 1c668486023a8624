"""Axolotl's fields and ours, as tables: what is carried over and how, and Axolotl's defaults.

In: a value and the fields beside it. Out: entries of a config, or `NotCarriedError` with a reason. docs/coming_from.md
has the same for readers.
"""

from typing import Any

from dialog_jax.dialogues.schemas import ROLE_NAMES, ROLES
from dialog_jax.drafting import axolotl_adapters, axolotl_reasons
from dialog_jax.drafting.axolotl_values import (
    Fields,
    NotCarriedError,
    Rule,
    boolean,
    integer,
    is_new_adapter,
    mapping,
    number,
    only,
    text,
    to,
)
from dialog_jax.drafting.config_text import Entry

PER_DEVICE = "Rows over all devices. Axolotl's micro_batch_size is per device: multiply by the number of devices."
_FINAL = "Final learning rate as a fraction of the peak."
_ALL_MESSAGES = f'another objective, all messages: objective.name="roles" with objective.roles={ROLES}'
_TRUNCATE = {"drop": "drop", "raise": "error"}
_FUSED = ("cut_cross_entropy", "liger", "kernels")  # in names of plugins


def _read_weight_decay(value: Any, fields: Fields) -> list[Entry]:
    decay = number(value)
    if decay and (is_new_adapter(fields) or fields.get("lora_model_dir")):
        raise NotCarriedError("adapters do not decay here")
    return [Entry("optimizer.weight_decay", decay)]


def _read_excess(value: Any, fields: Fields) -> list[Entry]:
    if value not in _TRUNCATE:
        raise NotCarriedError('not cut off at the end here; data.truncate="split" keeps the most recent turns')
    return [Entry("data.truncate", _TRUNCATE[value])]


def _read_packing(value: Any, fields: Fields) -> list[Entry]:
    if boolean(value):
        raise NotCarriedError(axolotl_reasons.PACKED)
    raise NotCarriedError(
        "dialogues were not packed there, so an update has more of them here: lower rows or gradient_accumulation"
    )


def _read_other(name: str, fields: Fields) -> int | None:
    """Returns the value of another field; None if it is absent, or listed because it is not an integer."""
    try:
        return integer(fields[name])
    except (KeyError, NotCarriedError):
        return None


def _read_batch_size(value: Any, fields: Fields) -> list[Entry]:
    size, rows = integer(value), _read_other("micro_batch_size", fields)
    if "gradient_accumulation_steps" in fields:
        raise NotCarriedError("micro_batch_size and gradient_accumulation_steps determine it")
    if not rows or rows < 1 or size % rows:
        raise NotCarriedError("not a multiple of micro_batch_size: set gradient_accumulation")
    return [Entry("gradient_accumulation", size // rows)]


def _read_plugins(value: Any, fields: Fields) -> list[Entry]:
    if not value:
        return []
    names = [str(name) for name in value] if isinstance(value, list) else [str(value)]
    others = [name for name in names if not any(part in name.lower() for part in _FUSED)]
    raise NotCarriedError(f"not supported: {', '.join(others)}" if others else axolotl_reasons.KERNEL)


def _read_resume(value: Any, fields: Fields) -> list[Entry]:
    if not value:
        return []
    if isinstance(value, str):
        raise NotCarriedError("not supported: a run resumes from its own checkpoints")
    raise NotCarriedError(axolotl_reasons.RESUMES)


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
        fraction = number(fields.get("cosine_min_lr_ratio") or 0) if value == "cosine" else 0.0
        return [Entry("optimizer.schedule", value), Entry("optimizer.final_fraction", fraction, _FINAL)]
    if value in ("constant", "constant_with_warmup"):
        warmup = [Entry("optimizer.warmup_steps", 0)] if value == "constant" else []
        return [Entry("optimizer.schedule", "constant"), *warmup]
    raise NotCarriedError(
        "schedule not supported; cosine is used instead. Others: linear, constant, warmup_stable_decay"
    )


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
        return [Entry("optimizer.name", "adamw")]
    if value in ("adafactor", "muon"):
        return [Entry("optimizer.name", value)]
    if isinstance(value, str) and "adamw" in value:
        remedy = 'AdamW with float32 moments is used; moments_dtype="bfloat16" halves them'
        raise NotCarriedError(f"8-bit and paged optimizers are not supported: {remedy}")
    raise NotCarriedError("optimizer not supported; adamw is used instead. Others: adafactor, muon")


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


def _read_evaluation(value: Any, fields: Fields) -> list[Entry]:
    every, saves = integer(value), _read_other("save_steps", fields)
    is_multiple = every > 0 and saves is not None and saves > 0 and not saves % every
    return [Entry("evaluate_every", every), Entry("checkpoint_every", saves if is_multiple else every)]


def _read_saves(value: Any, fields: Fields) -> list[Entry]:
    every, evaluations = integer(value), _read_other("eval_steps", fields)
    if evaluations is None:
        comment = "There is an evaluation before each checkpoint, since the best is kept."
        return [Entry("evaluate_every", every, comment), Entry("checkpoint_every", every)]
    if evaluations <= 0 or every <= 0 or every % evaluations:
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
        raise NotCarriedError(f"{value!r} is not a list of roles; assistant messages are trained on")
    return [Entry("objective.name", "roles"), Entry("objective.roles", tuple(dict.fromkeys(roles)))]


RULES: dict[str, Rule] = {
    "base_model": to("model", text),
    "tokenizer_config": to("tokenizer", text),
    "lora_model_dir": to("adapter", text),
    **axolotl_adapters.RULES,
    "val_set_size": _read_validation_share,
    "sequence_len": to("data.max_length", integer),
    "excess_length_strategy": _read_excess,
    "sample_packing": _read_packing,
    "chat_template": _read_template,
    "chat_template_jinja": to("data.chat_template", text),
    "chat_template_kwargs": to("data.chat_template_kwargs", mapping),
    "dataset_prepared_path": to("data.cache_dir", text),
    "dataset_num_proc": to("data.workers", integer),
    "dataset_processes": to("data.workers", integer),
    "train_on_inputs": only(False, reason=_ALL_MESSAGES),
    "train_on_eos": only("turn", reason="the end of each trained response is trained, and no other"),
    "roles_to_train": read_roles_to_train,
    "label_smoothing_factor": to("loss.label_smoothing", number),
    "micro_batch_size": to("rows", integer, PER_DEVICE),
    "batch_size": _read_batch_size,
    "gradient_accumulation_steps": to("gradient_accumulation", integer),
    "num_epochs": to("epochs", number),
    "max_steps": to("steps", integer),
    "learning_rate": to("optimizer.learning_rate", number),
    "lr_scheduler": _read_schedule,
    "cosine_min_lr_ratio": _read_min_ratio,
    "warmup_steps": _read_warmup,
    "warmup_ratio": _read_warmup_ratio,
    "optimizer": _read_optimizer,
    "weight_decay": _read_weight_decay,
    "max_grad_norm": to("optimizer.clip_norm", number),
    "adam_beta1": to("optimizer.b1", number),
    "adam_beta2": to("optimizer.b2", number),
    "adam_epsilon": to("optimizer.epsilon", number),
    "bf16": _read_bf16,
    "fp16": only(False, reason="float16 is not supported; compute_dtype is bfloat16 on accelerators"),
    "gradient_checkpointing": _read_checkpointing,
    "eval_steps": _read_evaluation,
    "save_steps": _read_saves,
    "save_total_limit": to("keep_checkpoints", integer),
    "use_tensorboard": only(True, False, reason="neither true nor false"),
    "use_wandb": _read_wandb,
    "use_trackio": _read_trackio,
    "plugins": _read_plugins,
    "resume_from_checkpoint": _read_resume,
    "seed": to("seed", integer),
}

# Axolotl's defaults that differ from ours.
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
    if "batch_size" in fields:  # it determines the number of micro-batches
        unread.add("gradient_accumulation_steps")
    if fields.get("optimizer") == "adafactor":
        unread.add("adam_beta2")
    if fields.get("lora_target_modules"):
        unread.add("lora_target_linear")
    return {name: value for name, value in defaults.items() if name not in unread}
