"""dialog_jax compare shows the history, the human and each model, and nothing of what comes after."""

import json
import pathlib
import tempfile

from absl.testing import absltest

from dialog_jax.model import saving
from tests.commands import running
from tests.rendering import chat_templates
from tests.training import tiny

_MESSAGES = [
    {"role": role, "content": content}
    for role, content in (
        ("user", "Hello"),
        ("assistant", "I am fine"),
        ("user", "And the first question?"),
        ("assistant", "This is the human answer\nof two lines"),
        ("user", "Nothing after it is shown"),
        ("assistant", "Neither is this"),
    )
]


class CompareTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        tokenizer = chat_templates.train_tokenizer("chatml")
        config = tiny.config(len(tokenizer))
        for name, seed in (("before", 0), ("twin", 0), ("after", 1)):
            saving.save_pretrained(
                self.directory / name, config, tiny.parameters(config, seed=seed), tokenizer=tokenizer
            )
        (self.directory / "data.jsonl").write_text(
            json.dumps({"messages": _MESSAGES[:2]}) + "\n" + json.dumps({"id": "second", "messages": _MESSAGES}) + "\n"
        )

    def compare(self, *flags):
        models = ",".join(str(self.directory / name) for name in ("before", "twin", "after"))
        data = f"--config.data.train={self.directory / 'data.jsonl'}"
        return running.run("compare", f"--models={models}", data, "--max_new_tokens=8", *flags)

    def test_base_that_no_model_needs_is_an_error(self):
        _, error = self.compare("--base=some")
        self.assertRegex(error, "--base is some, and none of .*before, .*after needs another model. Leave it out")

    def test_history_human_and_a_reply_of_each_model_are_shown(self):
        told, error = self.compare("--index=1", "--turn=1")
        self.assertEmpty(error)
        lines = told.splitlines()
        self.assertStartsWith(told, "dialogue second (data.jsonl:2), response 1\n")
        for expected in ("user  Hello", "assistant  I am fine", "user  And the first question?"):
            self.assertLen([line for line in lines if line.strip() == expected], 1)
        self.assertIn("human wrote  This is the human answer\n", told)
        self.assertIn("  of two lines\n", told)
        self.assertNotIn("Nothing after", told)
        self.assertNotIn("Neither", told)
        replies = {name: told.partition(f"{name} writes  ")[2] for name in ("before", "twin", "after")}
        first = {name: reply.splitlines()[0] for name, reply in replies.items()}
        self.assertEqual(first["before"], first["twin"])  # the same model and seed
        self.assertNotEqual(first["before"], first["after"])

    def test_dialogue_or_turn_that_is_not_there_is_explained(self):
        _, error = self.compare("--index=2")
        self.assertIn("index 2: data.jsonl has 2 records, counted from 0", error)
        _, error = self.compare("--index=1", "--turn=3")
        self.assertIn("dialogue second (data.jsonl:2) has 3 assistant messages; --turn=3 counts them from 0", error)


if __name__ == "__main__":
    absltest.main()
