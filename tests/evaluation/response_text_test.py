"""Responses found in texts alone, for the K passes, against those of the one pass, for templates of many families."""

import itertools

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.evaluation import k_passes
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.written import ResponseLost
from tests.rendering import responses_test

_CONTENTS = (
    "Hi", " Hi ", "Hello you.\n", "", "<think>\nEasy.\n</think>\n\n2", "<think>a</think>b", "a</think>b", "<|im_end|>",
    "[/INST] so", "12", "naïve 🙂", "\n",
)  # fmt: skip


def make_dialogue(rng, system):
    call = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
    messages = [Message(role="system", content="Be brief.")] if system else []
    for _ in range(3):
        fields = {}
        if rng.random() < 0.2:
            fields["reasoning_content"] = "I look."
        messages.append(Message(role="user", content=str(rng.choice(_CONTENTS))))
        if rng.random() < 0.2:
            called = {"tool_calls": [call], **fields}
            messages.append(Message(role="assistant", content="I call.", fields=called))
            messages.append(Message(role="tool", content="at noon"))
        messages.append(Message(role="assistant", content=str(rng.choice(_CONTENTS)), fields=fields))
    return Dialogue(id=0, messages=tuple(messages))


def outcome(function):
    try:
        return [(one.tokens.tolist(), one.start) for one in function()]
    except ResponseLost:
        raise
    except UserError:
        return None


class AgreementTest(parameterized.TestCase):
    @parameterized.parameters(*itertools.product(responses_test.TEMPLATES, ("rendered", "verbatim")))
    @pytest.mark.quick_every(7)
    def test_one_pass_and_k_passes_have_the_same_tokens(self, family, kind):
        tokenizer = responses_test.make_tokenizer(family)
        renderer = Renderer(tokenizer, responses=kind)
        rng = np.random.default_rng(0)
        compared = 0
        for number in range(12):
            dialogue = make_dialogue(rng, system=number % 2 == 1)
            try:
                one_pass = outcome(lambda dialogue=dialogue: renderer.render([dialogue])[0])
            except ResponseLost:  # K passes do not look for what a template leaves out
                continue
            passes = outcome(lambda dialogue=dialogue: k_passes.make_passes(dialogue, tokenizer, responses=kind))
            self.assertEqual(one_pass, passes, dialogue)
            compared += one_pass is not None
        if kind == "verbatim" or family not in ("deepseek_r1", "qwq"):  # their prompts end inside the response
            self.assertGreater(compared, 0)


if __name__ == "__main__":
    absltest.main()
