"""Writes what a run has trained as a Hugging Face directory, for transformers, PEFT, vLLM and the commands here.

    dialog_jax export --run=runs/mine --out=runs/mine/model
    dialog_jax export --run=runs/mine_lora --out=runs/mine_lora/adapter
    dialog_jax export --run=runs/mine_lora --out=runs/mine_lora/model --merge

The directory appears when it is complete: safetensors, config.json, all fields of the base model's
generation_config.json, the tokenizer with its chat template, the base model's licence files, a model card (README.md)
with the facts of the run, and export.json, which identifies the checkpoint. If it exists and was made from the same
checkpoint, nothing is done.

A run that trained an adapter gives a PEFT directory: adapter_config.json and adapter_model.safetensors in place of
config.json and the weights. With --merge it gives a whole model, the base model with the adapter added; a run with
`freeze` or `train_only` always does. Both need the base model, which must be the one that the run began with.
"""

from absl import flags

from dialog_jax.commands import entry
from dialog_jax.training import export

_RUN = flags.DEFINE_string("run", None, "Directory of a run: the --output_dir of dialog_jax train.")
_OUT = flags.DEFINE_string("out", None, "Directory to write; it must not exist, be empty, or hold this export already.")
_STEP = flags.DEFINE_string("step", "best", "best (by held-out loss), latest, or the number of a checkpointed step.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Type of the weights; by default that of the base model, or float32 if that is quantized; float32 for an adapter.",
)
_MERGE = flags.DEFINE_bool("merge", False, "Add the adapter to the base model and write the sum as a whole model.")
_BASE = flags.DEFINE_string(
    "base", "", "The model that the run began with, if it is not where the run's config.json says."
)
_EMA = flags.DEFINE_bool(
    "ema", False, "Write the exponential moving average of the trained weights (optimizer.ema_decay) in their place."
)


def main() -> None:
    run, out = entry.required(_RUN, "runs/mine"), entry.required(_OUT, "runs/mine/model")
    summary = export.export_model(
        run,
        out,
        step=_STEP.value,
        dtype=_DTYPE.value or "",
        merge=_MERGE.value,
        base=_BASE.value,
        average=_EMA.value,
    )
    print(summary)
