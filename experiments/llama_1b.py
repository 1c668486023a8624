"""How well does Llama-3.2-1B-Instruct learn to answer as UltraChat does, from about 260 million of its tokens?

Command:   dialog_jax train --config=experiments/llama_1b.py --output_dir=runs/llama_1b
           Before: dialog_jax plan --config=experiments/llama_1b.py --devices=1 --kind=h100
Hardware:  planned for one H100 of 80 GB.
Time:      not run yet.
Result:    not run yet.

The published shape of the model is in dialog_jax/planning/shapes; weights and dialogues are on the Hugging Face Hub.
"""

import ml_collections

from dialog_jax.training import config
from dialog_jax.training.config import DataConfig, MeshConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig


def get_config() -> ml_collections.ConfigDict:
    """Llama-3.2-1B-Instruct on UltraChat: 64 rows of 4,096 tokens per step on one device."""
    return config.to_config_dict(
        TrainConfig(
            model="meta-llama/Llama-3.2-1B-Instruct",
            data=DataConfig(
                train="HuggingFaceH4/ultrachat_200k",
                train_split="train_sft",
                validation="HuggingFaceH4/ultrachat_200k",
                validation_split="test_sft",
                max_length=4096,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=50),
            mesh=MeshConfig(),
            rows=4,
            gradient_accumulation=16,
            steps=1000,
            compute_dtype="bfloat16",
            remat="full",
            evaluate_every=100,
            evaluate_rows=256,
            checkpoint_every=200,
        )
    )
