"""Writes a model that a run has trained as a Hugging Face directory, for transformers, vLLM and the commands here.

    dialog_jax export --run=runs/mine --out=runs/mine/model

The directory appears when it is complete: safetensors, config.json, all fields of the base model's
generation_config.json, the tokenizer with its chat template, the base model's licence files, a model card (README.md)
with the facts of the run, and export.json, which identifies the checkpoint. If it exists and was made from the same
checkpoint, nothing is done.
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
    "Type of the weights; by default that of the base model, or float32 if it is quantized.",
)


def main() -> None:
    run, out = entry.required(_RUN, "runs/mine"), entry.required(_OUT, "runs/mine/model")
    print(export.export_model(run, out, step=_STEP.value, dtype=_DTYPE.value or ""))
