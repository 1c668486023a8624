"""Why fields of Axolotl have no counterpart here, by their names."""

_PACKED = "does not apply: rows are always packed, without mixing dialogues"
_KERNEL = "does not apply: attention=auto selects the kernel, and XLA fuses the rest"
_MESH = "not carried over: set mesh.fsdp or mesh.tensor, see docs/many_machines.md"
_TRACKER = "not carried over: set trackers; its library reads the project from WANDB_PROJECT or TRACKIO_PROJECT"
_NO_TRACKER = "not supported; trackers are tensorboard, wandb and trackio"
_LOADING = "does not apply: config.json and tokenizer.json say it, and no code of a model is run"
_TOKENS = "not carried over: change the tokenizer, and set resize_embedding for new tokens; padding is never trained"
_TORCH = "does not apply: a matter of PyTorch"
_RESUMES = "does not apply: the same command resumes"
_UPDATES = "the updates of an epoch are not known here: set evaluate_every and checkpoint_every"

# By a field's name, or by its beginning where that ends in an underscore.
REASONS: dict[str, str] = {
    **dict.fromkeys(("sample_packing", "eval_sample_packing", "pad_to_sequence_len", "group_by_length"), _PACKED),
    **dict.fromkeys(("sample_packing_", "multipack_", "batch_flattening"), _PACKED),
    **dict.fromkeys(("flash_attention", "xformers_attention", "sdp_attention", "attn_implementation"), _KERNEL),
    **dict.fromkeys(("attention", "flash_", "s2_attention", "flex_attention", "liger_", "plugins"), _KERNEL),
    **dict.fromkeys(("cut_cross_entropy", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), _KERNEL),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_", "tensor_parallel_size", "dp_shard_size"), _MESH),
    **dict.fromkeys(("wandb_", "trackio_"), _TRACKER),
    **dict.fromkeys(("mlflow_", "comet_", "use_mlflow", "use_comet"), _NO_TRACKER),
    **dict.fromkeys(("model_type", "tokenizer_", "trust_remote_code", "is_llama_derived_model"), _LOADING),
    **dict.fromkeys(("special_tokens", "tokens", "added_tokens_overrides", "resize_token_embeddings_to_32x"), _TOKENS),
    **dict.fromkeys(("tf32", "torch_", "ddp_", "dataloader_", "local_rank", "low_cpu_mem_usage"), _TORCH),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "lora_fan_in_fan_out", "xla_"), _TORCH),
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), _UPDATES),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "save_strategy"), "does not apply: both count updates"),
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints"), _RESUMES),
    **dict.fromkeys(("hub_", "push_dataset_to_hub"), "not carried over: dialog_jax export writes the model"),
    **dict.fromkeys(("rl", "neftune_noise_alpha", "peft_use_dora", "relora_", "lisa_", "loftq_"), "not supported"),
    **dict.fromkeys(("lora_modules_to_save", "reward_model", "pretraining_dataset", "streaming"), "not supported"),
    "output_dir": "not a field here: it is --output_dir of dialog_jax train",
    "early_stopping_patience": "not supported; the checkpoint with the lowest held-out loss is kept",
    "loss_watchdog_": "not carried over: see max_bad_steps",
    "logging_steps": "does not apply: every update is logged",
    "unfrozen_parameters": "patterns of other names: set train_only or freeze",
    "strict": "does not apply: a field that is not known is always an error here",
    "shuffle_merged_datasets": "does not apply: data is always shuffled",
    "eval_table_size": "not supported",
    "eval_max_new_tokens": "not supported",
    "eval_batch_size": "does not apply: evaluations have rows of the same size as training",
    "remove_unused_columns": "does not apply: other keys of a record are ignored, and audit names them",
}


def find_reason(name: str) -> str:
    """Returns why a field without a rule is not carried over."""
    if name in REASONS:
        return REASONS[name]
    beginnings = (beginning for beginning in REASONS if beginning.endswith("_") and name.startswith(beginning))
    return REASONS[longest] if (longest := max(beginnings, key=len, default="")) else "unknown to init"
