"""Measures training with TRL's SFTTrainer, or with the loss of the Trainer it derives from; needs its own environment.

    python trl_peer.py --model=DIR --inputs=DIR --out=FILE.json --batching=packed

Reads the files written by `shared_inputs.py`, prints a line per step and writes the figures of every measured step as
JSON. Does not import dialog_jax.
"""

import argparse
import itertools
import json
import os
import pathlib
import resource
import time
from typing import Any

import datasets
import peft
import torch
import transformers
import trl

BATCHING = ("packed", "padded")
HEADS = ("trl", "logits")


class _Counted(trl.SFTTrainer):
    """Records the end and the token counts of each step. With `head` "logits", Trainer computes the loss."""

    head = "trl"

    def reset_records(self) -> None:
        self.counts: list[tuple[int, int]] = []
        self.ends: list[float] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
        batches, targets = super().get_batch_samples(*args, **kwargs)
        real = sum(int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in batches)
        self.counts.append((real, sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)))
        return batches, targets

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.head == "trl":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return transformers.Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class _Clock(transformers.TrainerCallback):
    def __init__(self, trainer: _Counted):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.ends.append(time.perf_counter())


def read_tokens(path: pathlib.Path) -> datasets.Dataset:
    """Returns `input_ids` and `labels` of each dialogue."""
    with path.open(encoding="utf-8") as lines:
        return datasets.Dataset.from_list([json.loads(line) for line in lines])


def make_trainer(options: argparse.Namespace) -> _Counted:
    """Returns an SFTTrainer with common settings, in float32, over tokens that already have labels."""
    packed = options.batching == "packed"
    steps = options.warmup + options.steps
    config = trl.SFTConfig(
        output_dir=str(pathlib.Path(options.out).with_suffix(".trainer")),
        max_length=options.max_length,
        packing=packed,
        packing_strategy="bfd",
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.rows // options.batch,
        train_sampling_strategy="random" if packed else "sequential",  # the file is grouped by length
        max_steps=steps,
        learning_rate=3e-4 if options.lora_rank else 2e-5,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        weight_decay=0.0,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=False,
        gradient_checkpointing=False,
        torch_compile=options.compile,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        use_cpu=not torch.cuda.is_available(),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    lora = None
    if options.lora_rank:
        lora = peft.LoraConfig(
            r=options.lora_rank, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
    trainer = _Counted(
        model=model,
        args=config,
        train_dataset=read_tokens(pathlib.Path(options.inputs) / f"{'' if packed else 'spread_'}tokens.jsonl"),
        eval_dataset=read_tokens(pathlib.Path(options.inputs) / "compared_tokens.jsonl"),
        peft_config=lora,
        processing_class=transformers.AutoTokenizer.from_pretrained(options.model, trust_remote_code=False),
    )
    trainer.head = options.head
    trainer.reset_records()
    trainer.add_callback(_Clock(trainer))
    return trainer


def compared_loss(trainer: _Counted) -> dict[str, float]:
    """Returns the loss of the compared dialogues in nats per target, batched and computed as in training."""
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader()]
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    trainer.model.train()
    with torch.no_grad():
        losses = [float(trainer.compute_loss(trainer.model, b, num_items_in_batch=targets)) for b in batches]
    return {"compared_loss": sum(losses), "compared_targets": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--batching", choices=BATCHING, required=True)
    parser.add_argument("--head", choices=HEADS, default="trl", help="TRL's tiled loss, or the model's logits.")
    parser.add_argument("--lora_rank", type=int, default=0, help="Rank of LoRA on all linear layers; 0 trains all.")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=1, help="Rows or dialogues per micro-batch.")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2, help="Rows per step.")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compare", action="store_true", help="Compute only the loss of the compared dialogues.")
    options = parser.parse_args()
    if options.rows % options.batch:
        parser.error(f"--rows={options.rows} is not a multiple of --batch={options.batch}")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    start = time.perf_counter()
    trainer = make_trainer(options)
    prepared = time.perf_counter() - start
    out = pathlib.Path(options.out)
    if options.compare:
        out.write_text(json.dumps(compared_loss(trainer)), encoding="utf-8")
        return
    trainer.train()
    ends, counts = trainer.ends, trainer.counts
    seconds = [after - before for before, after in itertools.pairwise(ends[options.warmup - 1 :])]
    measured = counts[options.warmup : options.warmup + options.steps]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    out.write_text(
        json.dumps(
            {
                "seconds": seconds,
                "real_tokens": [real for real, _ in measured],
                "response_tokens": [response for _, response in measured],
                "first_loss": losses[0],
                "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "prepare_seconds": prepared,
                "threads": torch.get_num_threads(),
                "versions": {p.__name__: p.__version__ for p in (torch, transformers, trl)},
            },
            indent=1,
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
