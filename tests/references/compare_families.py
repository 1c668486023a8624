"""Prints, for docs/models.md, how far each tiny model's logits and gradients are from those of its reference.

python -m tests.references.compare_families
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from dialog_jax.model import saving, tensor_names
from tests.model import families_test


def main() -> None:
    print("| reference | logits: largest difference | of at most | gradients: largest difference, relative to a norm |")
    print("|---|---:|---:|---:|")
    for name in families_test._NAMES:
        config, parameters, reference = families_test.load(name)
        tokens = reference["tokens"]
        config = config.for_length(tokens.shape[1])

        def loss(parameters, config=config, tokens=tokens):
            logits = families_test.compute_logits(config, parameters, tokens)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])), logits

        gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(parameters)
        with tempfile.TemporaryDirectory() as directory:
            saving.save_pretrained(pathlib.Path(directory) / "gradient", config, gradient)
            published = safetensors.numpy.load_file(pathlib.Path(directory) / "gradient" / "model.safetensors")
        compared = [key.removeprefix("gradient/") for key in reference if key.startswith("gradient/")]
        names = tensor_names.standardize_names(compared)
        errors = []
        for tensor in compared:
            values, needed = published[names[tensor]].reshape(-1), reference[f"gradient/{tensor}"]
            norm = float(reference[f"norm/{tensor}"])
            if norm:
                errors.append(np.abs(values[:: max(1, -(-values.size // 64))] - needed).max() / norm)
        apart, size = np.abs(logits - reference["logits"]).max(), np.abs(reference["logits"]).max()
        print(f"| `tiny_{name}` | {apart:.1e} | {size:.1f} | {max(errors):.1e} |", flush=True)


if __name__ == "__main__":
    main()
