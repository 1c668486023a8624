"""One pass equals K passes in loss and gradient for every model family, under templates that keep and strip history."""

import dataclasses
import functools
import json
import pathlib

from absl.testing import absltest, parameterized

from dialog_jax.evaluation import agreement
from dialog_jax.model import families, hf_config
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training.trainable import Parameters
from tests.evaluation import agreement_test
from tests.rendering import chat_templates
from tests.training import tiny
from tests.trees import message_trees_test

_REFERENCES = pathlib.Path(__file__).parents[1] / "references"
# Windows and two RoPEs; caps of scores and logits; experts and sinks.
_WITH_MESSAGE_TREE = ("gemma3_text", "gemma2", "gpt_oss")
# What is read of gemma4_unified_text is what is read of gemma4_text.
_FAMILIES = tuple(name for name in families.FAMILIES if name != "gemma4_unified_text")
# See tests/conftest.py: of the quick tier is gemma3_text with qwen3's template.
FULL_PARAMETERS = ("chatml", *(name for name in _FAMILIES if name != "gemma3_text"))


@functools.cache
def _structure(family):
    """The structure of a reference of the family."""
    for file in sorted(_REFERENCES.glob("tiny_*/config.json")):
        fields = json.loads(file.read_text())
        if fields["model_type"] == family:
            return hf_config.from_json(file, fields)
    raise AssertionError(f"no reference is a {family} model")


class FamiliesTest(parameterized.TestCase):
    # The second template strips reasoning from the history, so that trees branch; with the first a message tree does.
    @parameterized.parameters(
        *((family, "chatml") for family in _WITH_MESSAGE_TREE), *((family, "qwen3") for family in _FAMILIES)
    )
    def test_one_pass_equals_k_passes(self, family, template):
        tokenizer = chat_templates.train_tokenizer(template)
        model = dataclasses.replace(_structure(family), vocab_size=len(tokenizer), max_length=2048).for_length(768)
        dialogues = list(agreement_test.dialogues())
        if template == "chatml":
            dialogues.append(message_trees_test.random_tree(0))
        outcome = agreement.compare(
            dialogues, Renderer(tokenizer), model, Parameters(tiny.parameters(model), {}), max_length=768
        )
        self.assertTrue(outcome.passed, {k: v for k, v in outcome.findings.items() if v.beyond})
        self.assertGreater(outcome.responses, 5)


if __name__ == "__main__":
    absltest.main()
