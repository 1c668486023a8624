"""Trains a model on dialogues as a config says; started again with the same flags, it goes on where it stopped.

    python scripts/train.py --config=experiments/quickstart.py --output_dir=runs/mine \\
        --config.data.train=my.jsonl --config.optimizer.learning_rate=1e-5

Every field of `dialog_jax.training.config.TrainConfig` is a flag: `--config.` and its path. What the run writes is
listed at the top of `dialog_jax/training/run_directory.py`.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from dialog_jax.training import config, loop

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as experiments/quickstart.py.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory of the run; made if missing.")
flags.mark_flags_as_required(["config", "output_dir"])


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
    result = loop.run(config.from_config_dict(_CONFIG.value), _OUTPUT_DIR.value)
    print(f"held-out loss {result.first['loss']:.4f} before, {result.last['loss']:.4f} after {result.step:,} steps")


if __name__ == "__main__":
    app.run(main)
