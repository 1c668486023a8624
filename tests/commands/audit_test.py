"""dialog_jax audit: what it prints, writes and returns."""

import errno
import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest

from tests.commands import running
from tests.rendering import chat_templates

_GOOD = [{"id": f"d{i}", "prompt": f"{i}?", "completion": "Hello!"} for i in range(3)]
_THINKS = {
    "id": "thinks",
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nI greet.\n</think>\n\nHello!"},
        {"role": "user", "content": "And you?"},
        {"role": "assistant", "content": "fine"},
    ],
}


class AuditTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.out = self.directory / "sub" / "audit.json"

    def audit(self, records, *flags, family="chatml"):
        """(standard output, standard error and exit code, what was written)."""
        chat_templates.train_tokenizer(family).save_pretrained(self.directory / family)
        data = self.directory / "data.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        data.write_text("".join(line + "\n" for line in lines))
        told, error = running.run(
            "audit",
            f"--config.tokenizer={self.directory / family}",
            f"--config.data.train={data}",
            f"--out={self.out}",
            *flags,
        )
        self.assertNotIn("\x1b", told)
        return told, error, json.loads(self.out.read_text()) if self.out.exists() else None

    def test_clean_file_says_so_and_exits_with_0(self):
        told, error, written = self.audit(_GOOD)
        self.assertEndsWith(told, "\nNothing to fix.\n")
        self.assertIn("3 records; 3 dialogues have something to train on", told)
        self.assertIn("<|im_end|> is the last target of 3 of 3 responses", told)
        self.assertIn("rendered as it was generated, in every dialogue", told)
        self.assertEmpty(error)
        self.assertEqual((written["trees"], written["findings"], written["data"]["max_length"]), (3, [], 1024))

    def test_responses_rendered_differently_from_what_is_recorded_are_counted_unless_trained_as_recorded(self):
        told, _, written = self.audit(_GOOD, family="qwen3")
        self.assertRegex(
            told,
            r"as recorded +3 of 3 responses are rendered differently from what is recorded, the first dialogue d0 ",
        )
        self.assertEqual(written["not_verbatim"], 3)
        told, _, written = self.audit(_GOOD, "--config.data.responses=verbatim", family="qwen3")
        self.assertNotIn("as recorded", told)
        self.assertEqual((written["not_verbatim"], written["data"]["responses"]), (0, "verbatim"))
        _, error, _ = self.audit(_GOOD, "--config.data.responses=exact")
        self.assertIn("data.responses is 'exact'; it must be one of rendered, verbatim.", error)

    def test_tokens_beyond_the_embedding_of_the_model_are_an_error_unless_rows_are_added(self):
        model = self.directory / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 500}}))
        told, error, _ = self.audit(_GOOD, f"--config.model={model}")
        self.assertIn(
            "error    the tokenizer has token ids for which the model has no embedding. Training stops.", told
        )
        self.assertIn("token 511 ", told)
        self.assertEqual(error, "[exit code 2]")
        told, error, _ = self.audit(_GOOD, f"--config.model={model}", "--config.resize_embedding")
        self.assertEndsWith(told, "\nNothing to fix.\n")
        (model / "config.json").write_text("{")
        _, error, _ = self.audit(_GOOD, f"--config.model={model}")
        self.assertIn("config.json cannot be read as JSON", error)

    def test_figures_of_the_table_are_those_of_the_file(self):
        told, _, written = self.audit(_GOOD, "--config.data.max_length=2048")
        self.assertIn(f"{written['tokens']:,}, of them {written['targets']:,} targets", told)
        lines = [line.split() for line in told.splitlines()]
        for fill in written["fills"]:
            self.assertIn(
                [f"{fill['max_length']:,}", f"{fill['rows']}", f"{fill['used']:.1%}", "0", "0", "0", "0", "0.00%"],
                lines,
            )
        self.assertEqual([fill["max_length"] for fill in written["fills"]], [512, 2048])
        (role,) = [line for line in told.splitlines() if line.strip().startswith("user messages")]
        self.assertIn(f" {written['roles']['user']} ", role)

    def test_soft_prompt_is_a_part_of_each_row_and_of_nothing_else(self):
        _, _, without = self.audit(_GOOD, "--config.data.max_length=448")
        told, error, written = self.audit(_GOOD, "--config.data.max_length=512", "--config.soft_prompt.tokens=64")
        self.assertEmpty(error)
        self.assertIn("64 tokens of each row", told)
        (fill,), other = written.pop("fills"), without.pop("fills")[0]
        rows = fill["rows"]
        self.assertEqual((fill.pop("max_length"), other.pop("max_length")), (512, 448))
        self.assertAlmostEqual(fill.pop("used") * rows * 512, other.pop("used") * rows * 448 + rows * 64)
        self.assertEqual(fill, other)
        self.assertEqual((written.pop("soft_prompt"), without.pop("soft_prompt")), (64, 0))
        self.assertEqual((written.pop("data")["max_length"], without.pop("data")["max_length"]), (512, 448))
        self.assertEqual(written, without)

    def test_errors_exit_with_2_and_the_rest_is_looked_at(self):
        told, error, written = self.audit([_GOOD[0], '{"prompt": "Hi', {"prompt": "Hi"}, _GOOD[1]])
        self.assertEqual(error, "[exit code 2]")
        self.assertIn("4 records, 2 of them refused; 2 dialogues have something to train on", told)
        self.assertRegex(
            told, r"error    records that are not valid dialogues: 2 of 4\. .*\n {9}data\.jsonl:2: not JSON at "
        )
        self.assertIn("\n         dialogue 2 (data.jsonl:3): has the keys 'prompt'", told)
        self.assertNotIn("Nothing to fix", told)
        self.assertEqual((written["records"], written["trees"]), (4, 2))
        self.assertEqual([finding["kind"] for finding in written["findings"]], ["unreadable"])

    def test_only_bad_records_have_no_tables(self):
        told, error, written = self.audit(['{"prompt": "Hi'])
        self.assertEqual(error, "[exit code 2]")
        self.assertIn("no dialogue has anything to train on. Give assistant messages a weight above 0", told)
        self.assertNotIn("max_length", told)
        self.assertEqual(written["fills"], [])

    def test_warnings_exit_with_0_and_show_three_places(self):
        told, error, written = self.audit([*_GOOD, *([_GOOD[0]] * 5)])
        self.assertEmpty(error)
        self.assertIn("warning  dialogues that are the same as an earlier one: 5 of 8. ", told)
        self.assertEqual(told.count("\n         dialogue d0 (data.jsonl:"), 3)
        self.assertIn("\n         and 2 more\n", told)
        self.assertNotIn("Nothing to fix", told)
        self.assertLen(written["findings"][0]["first"], 5)

    def test_notes_are_nothing_to_fix(self):
        told, _, _ = self.audit([_THINKS], family="qwen3")
        self.assertIn("rendered differently from how it was generated in 1 of 1 dialogues", told)
        self.assertIn("was generated '<think>\\nI greet.", told)
        self.assertIn("the chat template, and history that it renders differently", told)
        self.assertEndsWith(told, "\nNothing to fix.\n")

    def test_flags_reach_template_objective_and_length(self):
        template = "{% for m in messages %}{{ m.role + word + m.content + '<|im_end|>' }}{% endfor %}"
        template += "{% if add_generation_prompt %}{{ 'assistant' + word }}{% endif %}"
        long = {"id": "long", "prompt": "Hi", "completion": "yes " * 20}
        flags = [
            f"--config.data.chat_template={template}",
            '--config.data.chat_template_kwargs={"word": "|"}',
            "--config.data.max_length=20",
        ]
        told, _, written = self.audit(
            [_GOOD[0], long], "--config.objective.name=roles", "--config.objective.roles=('user', 'assistant')", *flags
        )
        tokenizer = chat_templates.train_tokenizer("chatml")
        texts = [("user|0?", "assistant|Hello!"), ("user|Hi", "assistant|" + "yes " * 20)]
        sizes = [len(tokenizer.encode("<|im_end|>".join(pair), add_special_tokens=False)) + 1 for pair in texts]
        self.assertEqual(written["tokens"], sum(sizes))
        self.assertGreater(written["targets"], written["roles"]["responses"])
        self.assertIn("responses left out because they are longer than a row with their history: 1 of 2", told)
        self.assertIn("\n         at max_length = 20, and ", told)
        _, _, written = self.audit([_GOOD[0], long], *flags)
        self.assertEqual(written["targets"], written["roles"]["responses"])

    def test_nothing_that_can_be_read_exits_with_1_and_writes_nothing(self):
        for records, flags, told in (
            ([], (), "holds no dialogue"),
            (_GOOD, ("--config.data.train=nowhere.jsonl",), "no such file"),
            (
                _GOOD,
                ("--config.data.chat_template_kwargs={",),
                "--config.data.chat_template_kwargs is '{'; needed a dict",
            ),
            (_GOOD, ("--config.objective.name=roles", "--config.objective.roles=bot"), "objective.roles"),
        ):
            out, error, written = self.audit(records, *flags)
            self.assertRegex(error, rf"(?s)^dialog_jax audit: .*{told}.*\[exit code 1\]$")
            self.assertEmpty(out)
            self.assertIsNone(written)

    def test_file_that_cannot_be_finished_leaves_what_was_there(self):
        self.out.parent.mkdir()
        self.out.write_text('{"earlier": 1}')
        data, tokenizer = self.directory / "data.jsonl", self.directory / "tokenizer"
        data.write_text(json.dumps(_GOOD[0]))
        chat_templates.train_tokenizer("chatml").save_pretrained(tokenizer)
        with mock.patch.object(pathlib.Path, "replace", side_effect=OSError(errno.ENOSPC, "disk full")):
            _, error = running.run(
                "audit", f"--config.tokenizer={tokenizer}", f"--config.data.train={data}", f"--out={self.out}"
            )
        self.assertRegex(error, r"(?s)dialog_jax audit: .*disk full.*\[exit code 1\]$")
        self.assertEqual(self.out.read_text(), '{"earlier": 1}')
        self.assertLen(list(self.out.parent.iterdir()), 1)


if __name__ == "__main__":
    absltest.main()
