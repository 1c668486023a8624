"""How well does Llama-3.1-8B-Instruct learn to answer as UltraChat does, from about 260 million of its tokens?

Command:   dialog_jax train --config=experiments/llama_8b.py --output_dir=runs/llama_8b
           Before: dialog_jax plan --config=experiments/llama_8b.py --devices=8 --kind=h100
Hardware:  planned for one node of 8 H100 of 80 GB.
Time:      not run yet.
Result:    not run yet.

The published shape of the model is in dialog_jax/planning/shapes; weights and dialogues are on the Hugging Face Hub.
"""

import ml_collections

from dialog_jax.training import config
from dialog_jax.training.config import DataConfig, MeshConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig


def get_config() -> ml_collections.ConfigDict:
    """Llama-3.1-8B-Instruct on UltraChat: 64 rows of 8,192 tokens per step, parameters divided over 8 devices."""
    return config.to_config_dict(
        TrainConfig(
            model="meta-llama/Llama-3.1-8B-Instruct",
            data=DataConfig(
                train="HuggingFaceH4/ultrachat_200k",
                train_split="train_sft",
                validation="HuggingFaceH4/ultrachat_200k",
                validation_split="test_sft",
                max_length=8192,
            ),
            optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=50),
            mesh=MeshConfig(data=1, fsdp=8),
            rows=8,
            gradient_accumulation=8,
            steps=500,
            compute_dtype="bfloat16",
            remat="full",
            evaluate_every=100,
            evaluate_rows=256,
            checkpoint_every=200,
        )
    )
