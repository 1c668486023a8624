"""A run on the decoder of a larger model: the export is the larger model, with its other parts as they were."""

import io
import json
import pathlib
import tempfile

import numpy as np
import pytest
import rich.console
import safetensors.numpy
from absl.testing import absltest

from dialog_jax.errors import UserError
from dialog_jax.model import pretrained
from dialog_jax.model.lora_config import LoraConfig
from dialog_jax.training import export, run
from tests.training import tiny

_PREFIX = "language_model."


def wrap(directory):
    """Makes the model in a directory the decoder of one with a vision tower; returns the tower's tensors."""
    rng = np.random.default_rng(0)
    tower = {
        f"vision_tower.{name}": rng.normal(size=(2, 3)).astype(np.float16) for name in ("patch.weight", "norm.bias")
    }
    file = directory / "model.safetensors"
    own = {f"{_PREFIX}{name}": tensor for name, tensor in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(own | tower, file, metadata={"format": "pt"})
    text = json.loads((directory / "config.json").read_text())
    outer = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 7}
    (directory / "config.json").write_text(json.dumps({**outer, "text_config": text, "dtype": "float32"}))
    (directory / "preprocessor_config.json").write_text('{"size": 8}')
    return tower


class WrapperRunTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def run_training(self, **changes):
        config = tiny.run_config(self.directory, steps=2, **changes)
        tower = wrap(self.directory / "model")
        console = rich.console.Console(file=io.StringIO())
        run.run(config, self.directory / "run", console=console)
        return tower

    def assert_wrapped(self, out, tower):
        """The directory has the base's tensors, of which only the decoder's differ, and its fields."""
        first, second = (
            safetensors.numpy.load_file(place / "model.safetensors") for place in (self.directory / "model", out)
        )
        self.assertEqual(first.keys(), second.keys())
        for name, tensor in tower.items():
            np.testing.assert_array_equal(second[name], tensor)
            self.assertEqual(second[name].dtype, tensor.dtype)
        changed = [name for name in first if name not in tower and not np.array_equal(first[name], second[name])]
        self.assertNotEmpty(changed)
        fields = json.loads((out / "config.json").read_text())
        self.assertEqual((fields["model_type"], fields["image_token_index"]), ("llava", 7))
        self.assertEqual((out / "preprocessor_config.json").read_text(), '{"size": 8}')
        self.assertEqual(pretrained.load_config(out), pretrained.load_config(self.directory / "model"))

    @pytest.mark.full
    def test_export_has_the_other_parts_and_needs_the_base(self):
        tower = self.run_training()
        (self.directory / "model").rename(self.directory / "moved")
        with self.assertRaisesRegex(UserError, "Name it: --base=PATH"):
            export.export_model(self.directory / "run", self.directory / "out")
        (self.directory / "moved").rename(self.directory / "model")
        export.export_model(self.directory / "run", self.directory / "out", base=str(self.directory / "model"))
        self.assert_wrapped(self.directory / "out", tower)

    @pytest.mark.full
    def test_merged_adapter_too(self):
        tower = self.run_training(lora=LoraConfig(rank=2))
        export.export_model(
            self.directory / "run", self.directory / "out", merge=True, base=str(self.directory / "model")
        )
        self.assert_wrapped(self.directory / "out", tower)


if __name__ == "__main__":
    absltest.main()
