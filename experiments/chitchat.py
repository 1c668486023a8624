"""How well does SmolLM2-135M-Instruct learn to write like the people of ChitChat from all of their dialogues?

Command:   dialog_jax train --config=experiments/chitchat.py --output_dir=runs/chitchat
Hardware:  one GPU of 16 GB or more, or a Colab TPU. 3 epochs read about 11 M tokens.
           On a TPU with several cores, `rows` must be a multiple of the number of cores; 8 works for all sizes.
Time:      not run yet.
Result:    not run yet.
"""

import ml_collections

from dialog_jax.training import config
from dialog_jax.training.config import DataConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig


def get_config() -> ml_collections.ConfigDict:
    """SmolLM2-135M-Instruct on ChitChat: 3 epochs, 32 rows of 2,048 tokens per step, bfloat16."""
    return config.to_config_dict(
        TrainConfig(
            model="assets/smollm2-135m-instruct",
            data=DataConfig(
                train="assets/chitchat/train.jsonl",
                validation="assets/chitchat/validation.jsonl",
                max_length=2048,
            ),
            optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=10),
            rows=8,
            evaluate_rows=0,
            gradient_accumulation=4,
            epochs=3.0,
            compute_dtype="bfloat16",
            remat="full",
            evaluate_every=20,
            checkpoint_every=20,
        )
    )
