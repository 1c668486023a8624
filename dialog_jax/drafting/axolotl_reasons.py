"""Why fields of Axolotl have no counterpart here, by their names."""

from typing import Any

PACKED = "does not apply: rows are always packed, without mixing dialogues"
KERNEL = "does not apply: attention=auto selects the kernel, and XLA fuses the rest"
_MESH = "set mesh.fsdp or mesh.tensor, see docs/many_machines.md"
_TRACKER = "set trackers; its library reads the project from WANDB_PROJECT or TRACKIO_PROJECT"
_NO_TRACKER = "not supported; trackers are tensorboard, wandb and trackio"
_LOADING = "does not apply: config.json and tokenizer.json say it, and no code of a model is run"
_TOKENS = "change the tokenizer, and set resize_embedding for new tokens; padding is never trained"
_TORCH = "does not apply: PyTorch only"
RESUMES = "does not apply: the same command resumes"
_UNKNOWN = "not recognized"
_SCHEDULED = "does not apply: evaluations and checkpoints are scheduled by updates"
_UPDATES = "the updates of an epoch are not known here: set evaluate_every and checkpoint_every"

# By a field's name, or by its beginning where that ends in an underscore.
REASONS: dict[str, str] = {
    **dict.fromkeys(("eval_sample_packing", "pad_to_sequence_len", "group_by_length"), PACKED),
    **dict.fromkeys(("sample_packing_", "multipack_", "batch_flattening"), PACKED),
    **dict.fromkeys(("flash_attention", "xformers_attention", "sdp_attention", "attn_implementation"), KERNEL),
    **dict.fromkeys(("attention", "flash_", "s2_attention", "flex_attention", "liger_"), KERNEL),
    **dict.fromkeys(("cut_cross_entropy", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), KERNEL),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_", "tensor_parallel_size", "dp_shard_size"), _MESH),
    **dict.fromkeys(("wandb_", "trackio_"), _TRACKER),
    **dict.fromkeys(("mlflow_", "comet_", "use_mlflow", "use_comet"), _NO_TRACKER),
    **dict.fromkeys(("model_type", "tokenizer_", "trust_remote_code", "is_llama_derived_model"), _LOADING),
    **dict.fromkeys(("special_tokens", "tokens", "added_tokens_overrides", "resize_token_embeddings_to_32x"), _TOKENS),
    **dict.fromkeys(("tf32", "torch_", "ddp_", "dataloader_", "local_rank", "low_cpu_mem_usage"), _TORCH),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "lora_fan_in_fan_out", "xla_"), _TORCH),
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), _UPDATES),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "save_strategy"), _SCHEDULED),
    **dict.fromkeys(("auto_resume_from_checkpoints",), RESUMES),
    **dict.fromkeys(("hub_", "push_dataset_to_hub"), "dialog_jax export writes the model"),
    **dict.fromkeys(("gptq", "neftune_noise_alpha", "peft_use_dora", "relora_", "lisa_", "loftq_"), "not supported"),
    **dict.fromkeys(("lora_modules_to_save", "pretraining_dataset", "streaming"), "not supported"),
    "context_parallel_size": "not supported; mesh.tensor divides the work of a row",
    "output_dir": "not a field here: it is --output_dir of dialog_jax train",
    "early_stopping_patience": "not supported; the checkpoint with the lowest held-out loss is kept",
    "loss_watchdog_": "see max_bad_steps",
    "logging_steps": "does not apply: every update is logged",
    "unfrozen_parameters": "patterns of other names: set train_only or freeze",
    "strict": "does not apply: a field that is not known is always an error here",
    "shuffle_merged_datasets": "does not apply: data is always shuffled",
    "eot_tokens": "does not apply: the chat template ends a turn, and what it ends it with is trained",
    "eval_table_size": "not supported",
    "eval_max_new_tokens": "not supported",
    "eval_batch_size": "does not apply: evaluations have rows of the same size as training",
    "remove_unused_columns": "does not apply: other keys of a record are ignored, and audit names them",
}

# Fields of which a value that means off is not what happens here.
_ALWAYS_ON = ("shuffle_merged_datasets", "evals_per_epoch", "saves_per_epoch")


def is_off(name: str, value: Any) -> bool:
    """Returns whether a known field without a rule turns off something that does not happen here either."""
    off = value in (False, "", [], {}) or (name.endswith("_size") and value == 1)
    return off and name not in _ALWAYS_ON and find_reason(name) != _UNKNOWN


def find_reason(name: str) -> str:
    """Returns why a field without a rule is not carried over."""
    if name in REASONS:
        return REASONS[name]
    beginnings = (beginning for beginning in REASONS if beginning.endswith("_") and name.startswith(beginning))
    return REASONS[longest] if (longest := max(beginnings, key=len, default="")) else _UNKNOWN
