"""Fine-tunes a chat model on dialogues of your own: a file to copy, with the fields that are worth a thought.

Command:   dialog_jax audit --config=experiments/finetune.py        # what training would see, and what is wrong with it
           dialog_jax train --config=experiments/finetune.py --output_dir=runs/mine
           dialog_jax export --run=runs/mine --out=runs/mine/model
           dialog_jax chat --config.model=runs/mine/model
Hardware:  any. In float32, 16 bytes per parameter for weights, gradients and moments, and activations of `rows` rows.

A field that is left out has its default; `dialog_jax train --help` lists all of them. A flag overrides the file:
--config.optimizer.learning_rate=1e-5. `dialog_jax init` writes such a file after a look at your model and data.
"""

import ml_collections

from dialog_jax.training import config
from dialog_jax.training.config import DataConfig, TrainConfig
from dialog_jax.training.optimizer_config import OptimizerConfig
from dialog_jax.trees.objectives import ObjectiveConfig


def get_config() -> ml_collections.ConfigDict:
    """One epoch over my.jsonl, 5% of which is held out; 8 rows of 1,024 tokens per update."""
    return config.to_config_dict(
        TrainConfig(
            # A directory, a .gguf file or a name on the Hugging Face Hub, of a family in docs/models.md.
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            data=DataConfig(
                train="my.jsonl",
                # A file of held-out dialogues, or nothing to hold out a share of my.jsonl.
                validation="",
                validation_share=0.05,
                # Tokens per row. `dialog_jax audit` shows how many dialogues fit rows of several lengths.
                max_length=1024,
                # Variables of the chat template, such as {"enable_thinking": False} for Qwen3.
                chat_template_kwargs={},
            ),
            # `conditional` trains on every assistant message; see docs/objectives.md for the others and for weights.
            objective=ObjectiveConfig(name="conditional"),
            # 1e-5 to 1e-4 for small models, 1e-6 to 1e-5 for models of billions of parameters.
            optimizer=OptimizerConfig(learning_rate=2e-5),
            # An update takes rows * gradient_accumulation rows. Raise `rows` as far as memory allows; on several
            # devices it must be a multiple of their number.
            rows=1,
            gradient_accumulation=8,
            epochs=1.0,
            # In updates. A checkpoint holds weights and moments, 12 bytes per parameter.
            evaluate_every=50,
            checkpoint_every=50,
        )
    )
