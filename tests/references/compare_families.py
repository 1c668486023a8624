"""Prints, for docs/models.md, how far each tiny model's logits and gradients are from those of its reference.

python -m tests.references.compare_families
"""

import numpy as np

from tests.model import families_test


def main() -> None:
    print("| reference | logits: largest difference | of at most | gradients: largest difference, relative to a norm |")
    print("|---|---:|---:|---:|")
    for name in families_test._NAMES:
        logits, gradients = families_test.compute_gradient(name)
        _, _, reference = families_test.load(name)
        errors = [
            np.abs(families_test.pick_values(gradient) - reference[f"gradient/{tensor}"]).max() / norm
            for tensor, gradient in gradients.items()
            if (norm := float(reference[f"norm/{tensor}"]))
        ]
        apart, size = np.abs(logits - reference["logits"]).max(), np.abs(reference["logits"]).max()
        print(f"| `tiny_{name}` | {apart:.1e} | {size:.1f} | {max(errors):.1e} |", flush=True)


if __name__ == "__main__":
    main()
