"""A model whose tokenizer has tokens beyond its embedding: refused, or given rows, through training and export."""

import dataclasses
import io
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest
import rich.console
from absl.testing import absltest

from dialog_jax.errors import UserError
from dialog_jax.inference import loading
from dialog_jax.model import saving
from dialog_jax.training import export, run
from tests.rendering import chat_templates
from tests.training import tiny


class ResizeEmbeddingTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.config = tiny.run_config(self.directory)
        tokenizer = chat_templates.train_tokenizer("chatml")
        self.size = len(tokenizer)
        self.model = tiny.config(self.size - 2, tie_embeddings=False)
        self.parameters = tiny.parameters(self.model)
        self.small = self.directory / "small"
        saving.save_pretrained(self.small, self.model, self.parameters, tokenizer=tokenizer)

    def test_tokens_beyond_the_embedding_are_an_error_that_names_the_option(self):
        with self.assertRaisesRegex(
            UserError, f"up to {self.size - 1} .* {self.size - 2} rows.*--config.resize_embedding"
        ):
            loading.load_model(self.small)

    def test_rows_are_added_and_reported(self):
        lines = []
        model = loading.load_model(self.small, resize_embedding=True, report=lines.append)
        self.assertEqual(model.config, dataclasses.replace(self.model, vocab_size=self.size))
        for key in ("embedding", "lm_head"):
            published = np.asarray(self.parameters[key])
            np.testing.assert_array_equal(model.parameters[key][:-2], published)
            np.testing.assert_allclose(model.parameters[key][-2:], np.stack([published.mean(0)] * 2), atol=1e-7)
        (line,) = lines
        self.assertIn(f"embedding: {self.size - 2} rows in small", line)
        self.assertIn("rows added, each the mean of the others: 2", line)

    def test_a_model_that_has_all_rows_is_left_alone(self):
        lines = []
        model = loading.load_model(self.directory / "model", resize_embedding=True, report=lines.append)
        self.assertEqual((model.config.vocab_size, model.added_rows, lines), (self.size, 0, []))

    @pytest.mark.full
    def test_run_on_a_mesh_resumes_and_exports_the_larger_model(self):
        config = dataclasses.replace(self.config, model=str(self.small), resize_embedding=True, steps=2)
        output = io.StringIO()
        console = rich.console.Console(file=output, soft_wrap=True)
        run.run(config, self.directory / "run", console=console)
        run.run(config, self.directory / "run", console=console)
        self.assertIn("rows added, each the mean of the others: 2", output.getvalue())
        self.assertIn("Nothing to do", output.getvalue())
        export.export_model(self.directory / "run", self.directory / "out", step="latest")
        self.assertEqual(json.loads((self.directory / "out" / "config.json").read_text())["vocab_size"], self.size)
        model = loading.load_model(self.directory / "out")
        self.assertEqual(model.parameters["lm_head"].shape, (self.size, self.model.width))
        self.assertTrue(all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.parameters)))


class SoftPromptTest(absltest.TestCase):
    def test_soft_prompt_that_fills_the_context_is_refused(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        model = tiny.config(len(tokenizer), max_length=64)
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        saving.save_pretrained(directory, model, tiny.parameters(model), tokenizer=tokenizer)
        self.assertEqual(loading.open_model(directory, soft_prompt_tokens=62).renderer.virtual_tokens.count, 62)
        with self.assertRaisesRegex(UserError, "the soft prompt has 63 tokens and the model's context is 64, which"):
            loading.open_model(directory, soft_prompt_tokens=63)


if __name__ == "__main__":
    absltest.main()
