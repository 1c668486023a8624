"""Measures training with google-tunix's PeftTrainer; needs its own environment.

    python tunix_peer.py --model=DIR --inputs=DIR --out=FILE.json

Uses tunix's Llama 3 class with the shape of SmolLM2, its weight loader, and its default loss with a mask of response
tokens. Rows are dialogues padded to `max_length`, since PeftTrainer does not pack. In tunix 0.1.7 the class ignores
`rope_theta` in its config and uses 1,000,000; it is patched here, since otherwise the model would be a different one.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params
from tunix.sft import hooks, peft_trainer, utils

IGNORED = -100


class _Clock(hooks.TrainingHooks):
    """Records the time and the loss of each update."""

    def __init__(self):
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self.ends.append(time.perf_counter())
        self.losses.append(float(train_loss))
        print(f"step {train_step}: loss {train_loss:.4f}", flush=True)

    def _ignore(self, *args):
        pass

    on_train_start = on_train_end = on_train_step_start = on_eval_step_start = on_eval_step_end = _ignore


def read_rows(path: pathlib.Path, max_length: int) -> list[peft_trainer.TrainingInput]:
    """Returns a [1, max_length] row per dialogue, truncated or padded with token 0; `input_mask` is 1 on targets."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            one = json.loads(line)
            tokens = np.zeros((1, max_length), np.int32)
            mask = np.zeros((1, max_length), np.int32)
            length = min(max_length, len(one["input_ids"]))
            tokens[0, :length] = one["input_ids"][:length]
            mask[0, :length] = np.asarray(one["labels"][:length]) != IGNORED
            if mask[0, 1:].any():
                rows.append(peft_trainer.TrainingInput(input_tokens=tokens, input_mask=mask))
    return rows


def model_input(row: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
    """Returns the arguments of PeftTrainer's default loss. Padding comes last, so no real token attends to it."""
    real = row.input_tokens != 0
    return {
        "input_tokens": row.input_tokens,
        "input_mask": row.input_mask,
        "positions": utils.build_positions_from_mask(real),
        "attention_mask": utils.make_causal_attn_mask(real),
    }


def load(directory: str) -> llama.Llama3:
    """Returns the model in float32, from config.json and safetensors."""
    published = json.loads((pathlib.Path(directory) / "config.json").read_text(encoding="utf-8"))
    theta = published.get("rope_parameters", published)["rope_theta"]
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    config = llama.ModelConfig(
        num_layers=published["num_hidden_layers"],
        vocab_size=published["vocab_size"],
        embed_dim=published["hidden_size"],
        hidden_dim=published["intermediate_size"],
        num_heads=published["num_attention_heads"],
        head_dim=published["head_dim"],
        num_kv_heads=published["num_key_value_heads"],
        rope_theta=theta,
        norm_eps=published["rms_norm_eps"],
        weight_tying=published["tie_word_embeddings"],
    )
    return params.create_model_from_safe_tensors(directory, config, dtype=jnp.float32)


def compared_loss(trainer: peft_trainer.PeftTrainer, rows: list[peft_trainer.TrainingInput]) -> dict[str, float]:
    """Returns the loss of the compared dialogues in nats per target, computed by the trainer's loss row by row."""
    loss = nnx.jit(lambda model, row: trainer.loss_fn(model, **model_input(row)))
    counts = [int(row.input_mask[:, 1:].sum()) for row in rows]
    total = sum(float(loss(trainer.model, row)) * count for row, count in zip(rows, counts, strict=True))
    return {"compared_loss": total / sum(counts), "compared_targets": sum(counts)}


def sum_by_step(numbers: list[int], rows: int) -> list[int]:
    """Returns the sums of consecutive groups of `rows` numbers."""
    return [sum(numbers[start : start + rows]) for start in range(0, len(numbers), rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2, help="Rows per step, one per micro-batch.")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compare", action="store_true", help="Compute only the loss of the compared dialogues.")
    options = parser.parse_args()
    compiling: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    inputs = pathlib.Path(options.inputs)
    steps = options.warmup + options.steps
    schedule = optax.cosine_decay_schedule(2e-5, steps, alpha=0.1)
    trainer = peft_trainer.PeftTrainer(
        load(options.model),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.0)),
        peft_trainer.TrainingConfig(
            eval_every_n_steps=1_000_000,
            max_steps=steps,
            gradient_accumulation_steps=options.rows,
        ),
    ).with_gen_model_input_fn(model_input)
    out = pathlib.Path(options.out)
    if options.compare:
        rows = read_rows(inputs / "compared_tokens.jsonl", options.max_length)
        out.write_text(json.dumps(compared_loss(trainer, rows)), encoding="utf-8")
        return
    rows = read_rows(inputs / "spread_tokens.jsonl", options.max_length)[: steps * options.rows]
    clock = _Clock()
    trainer.with_training_hooks(clock)
    compiling.clear()
    trainer.train(rows)
    real = sum_by_step([int((row.input_tokens != 0).sum()) for row in rows], options.rows)
    response = sum_by_step([int(row.input_mask[:, 1:].sum()) for row in rows], options.rows)
    ends = clock.ends
    out.write_text(
        json.dumps(
            {
                "seconds": [after - before for before, after in itertools.pairwise(ends[options.warmup - 1 :])],
                "real_tokens": real[options.warmup :],
                "response_tokens": response[options.warmup :],
                "first_loss": clock.losses[0],
                "compile_seconds": sum(compiling),
                "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "versions": {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")},
            },
            indent=1,
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
