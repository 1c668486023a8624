"""scripts/benchmark_peers: what is shared, what is counted and what is told; needs no peer."""

import json
import pathlib
import sys
import tempfile

from absl.testing import absltest

from dialog_jax.data import dataset
from dialog_jax.data.dialogues import read_dialogues
from dialog_jax.data.objectives import ObjectiveConfig
from dialog_jax.data.rendering import Renderer
from dialog_jax.data.tokenizers import load_tokenizer
from tests.data import chat_templates
from tests.scripts import running

sys.path.insert(0, str(running.SCRIPTS / "benchmark_peers"))

import contestants
import shared_inputs
import summary

_TALKS = [
    ["Hi", "Hello! How are you?", "fine, thank you", "yes", "And you?", "I am fine."],
    ["What is this?", "I am fine."],
    ["And you?", "yes\nyes", "What is this?"],  # ends with words that nobody is trained on
    ["Hi " * 60, "no"],
]
_COMPARED = {"compared_loss": 2.5, "compared_targets": 40}


def records():
    roles = ("user", "assistant")
    return [{"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(talk)]} for talk in _TALKS]


def a_round(contestant, real, **more):
    figures = {"real_tokens_per_second": real, "response_tokens_per_second": real / 4, "seconds_a_step": 400 / real}
    losses = {"first_loss": 3.0, "compared_loss": 2.5001, "compared_targets": 40}
    return {"contestant": contestant, "peak_memory_gb": 4.0, **figures, **losses, **more}


class SharedInputsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        chat_templates.train_tokenizer("chatml").save_pretrained(self.directory / "model")
        self.data = self.directory / "data.jsonl"
        self.data.write_text("".join(json.dumps(one) + "\n" for one in records()))

    def write(self, **changes):
        options = {"model": str(self.directory / "model"), "data": str(self.data), "dialogues": 4, "max_length": 100}
        return shared_inputs.write(self.directory / "inputs", **(options | changes))

    def read(self, name):
        return [json.loads(line) for line in (self.directory / "inputs" / name).read_text().splitlines()]

    def test_targets_are_those_of_our_trees(self):
        written = self.write()
        renderer = Renderer(load_tokenizer(str(self.directory / "model")))
        trees = dataset.prepare(
            list(read_dialogues(str(self.data))), renderer, objective=ObjectiveConfig(), max_length=4096
        )
        ours = [one.tokens[one.weight > 0].tolist() for one in map(trees.tree, range(4))]
        labels = [one["labels"][1:] for one in self.read("tokens.jsonl")]
        peers = [[label for label in row if label != shared_inputs.IGNORED] for row in labels]
        self.assertEqual(peers, ours)
        self.assertEqual(written["targets"], sum(map(len, ours)))

    def test_what_is_compared_fits_a_row(self):
        written = self.write()
        sizes = [len(one["input_ids"]) for one in self.read("tokens.jsonl")]
        self.assertGreater(sizes[3], 100)
        self.assertEqual([len(one["input_ids"]) for one in self.read("compared_tokens.jsonl")], sizes[:3])
        self.assertEqual(self.read("compared.jsonl"), records()[:3])
        self.assertEqual((written["compared_dialogues"], written["longer_than_max_length"]), (3, 1))
        self.assertEqual(written["tokens"], sum(sizes))

    def test_too_few_dialogues_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "has 4 dialogues, 5 are needed"):
            self.write(dialogues=5)

    def test_a_template_that_strips_history_is_an_error(self):
        chat_templates.train_tokenizer("qwen3").save_pretrained(self.directory / "model")
        roles, texts = ("user", "assistant") * 2, ("Hi", "<think>\na b\n</think>\n\nyes", "And you?", "yes")
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        self.data.write_text(json.dumps({"messages": messages}))
        with self.assertRaisesRegex(ValueError, "message 1"):
            self.write(dialogues=1)


class FiguresTest(absltest.TestCase):
    def test_medians_are_over_the_rates_of_steps(self):
        written = {"seconds": [10.0, 20.0, 40.0], "real_tokens": [100, 400, 600], "response_tokens": [10, 80, 60]}
        found = contestants.figures(written | {"peak_memory_gb": 1.0})
        self.assertEqual(found["seconds_a_step"], 20.0)
        self.assertEqual(found["real_tokens_per_second"], 15.0)  # of 10, 20, 15
        self.assertEqual(found["response_tokens_per_second"], 1.5)  # of 1, 4, 1.5
        self.assertEqual(found["peak_memory_gb"], 1.0)

    def test_a_step_without_its_tokens_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "2 seconds, 1 real_tokens"):
            contestants.figures({"seconds": [1.0, 2.0], "real_tokens": [5], "response_tokens": [1, 2]})

    def test_what_ours_wrote_is_kept(self):
        self.assertEqual(contestants.figures({"real_tokens_per_second": 9.0}), {"real_tokens_per_second": 9.0})

    def test_a_contestant_that_ends_badly_has_failed(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        settings = contestants.Settings(model=directory, inputs=directory, max_length=8, rows=1, warmup=1, steps=1)
        found = contestants.measure(
            "tunix", settings, pathlib.Path("/bin/false"), directory / "a.json", compare=True, seconds=20
        )
        self.assertEqual(found, {"failed": "ended with 1; see a.log"})


class SummaryTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.labels = {name: one.label for name, one in contestants.CONTESTANTS.items()}
        rounds = [
            a_round("ours", 150.0, compile_seconds=30.0, peak_memory_gb=3.0),
            a_round("trl_packed", 90.0),
            a_round("tunix", 50.0, failed="not done after 9 s"),
            a_round("ours", 170.0, compile_seconds=2.0, peak_memory_gb=3.2),
            a_round("ours", 250.0, compile_seconds=2.0, peak_memory_gb=3.1),
            a_round("trl_packed", 110.0, first_loss=9.0),
        ]
        for one in rounds:
            if one["contestant"] == "ours":
                del one["compared_loss"], one["compared_targets"]
        self.found = summary.summarise(rounds, _COMPARED)

    def test_medians_and_spread_are_over_rounds(self):
        ours, peer = self.found["ours"], self.found["trl_packed"]
        self.assertEqual((ours["real_tokens_per_second"], ours["spread"]), (170.0, [150.0, 250.0]))
        self.assertEqual((peer["real_tokens_per_second"], peer["spread"]), (100.0, [90.0, 110.0]))
        self.assertEqual(ours["response_tokens_per_second"], 42.5)
        self.assertEqual((ours["rounds"], peer["rounds"]), (3, 2))
        self.assertEqual((ours["peak_memory_gb"], ours["compile_seconds"]), (3.2, 30.0))
        self.assertEqual((ours["compared_loss"], peer["compared_loss"], peer["first_loss"]), (2.5, 2.5001, 3.0))
        self.assertEqual(self.found["tunix"], {"failed": "not done after 9 s"})

    def test_table_has_the_fastest_first_and_names_what_is_missing(self):
        lines = summary.table(self.found, self.labels, {"Other": "no network"}).splitlines()
        self.assertEqual(
            lines[2], f"| {self.labels['ours']} | 170.0 | 150.0 to 250.0 | 42.5 | 2.4 | 3.20 | 30.0 | 3.0000 | 2.5000 |"
        )
        self.assertTrue(lines[3].startswith("| TRL, packed (bfd), malloc tuned | 100.0 | 90.0 to 110.0 |"))
        self.assertEqual(lines[-2:], ["* google-tunix, padded: not done after 9 s", "* Other: no network"])

    def test_verdict_compares_with_the_fastest_peer(self):
        text = summary.verdict(self.found, self.labels)
        self.assertIn("1.70 times the real tokens a second of the fastest peer (TRL, packed (bfd), malloc tuned)", text)
        self.assertIn("0.80 times its memory", text)
        self.assertIn("40 targets of the same dialogues are within 1.0e-04 nats", text)
        self.assertIn("nothing is compared", summary.verdict({"ours": self.found["ours"]}, self.labels))

    def test_run_writes_table_plot_and_everything(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        seen = {
            "command": "python run.py",
            "date": "2026-01-02",
            "machine": "2 cores",
            "python": "3.11",
            "minutes": 3.0,
            "inputs": dict.fromkeys(
                ("dialogues", "tokens", "targets", "longer_than_max_length", "compared_dialogues", "compared_targets"),
                4,
            ),
            "compared": _COMPARED,
            "versions": {"trl": ["torch==2.13.0", "six==1"]},
            "rounds": [a_round("ours", 150.0), a_round("trl_packed", 100.0)],
        }
        with running.loaded("benchmark_peers/run") as script:
            text = script.write(seen, directory)
            self.assertEqual(script.orders(["a", "b", "c"], 4), [list("abc"), list("bca"), list("cab"), list("abc")])
        self.assertIn("trl: torch 2.13.0  \n", text)
        self.assertEqual((directory / "peers.md").read_text(), text)
        self.assertEqual(json.loads((directory / "peers.json").read_text())["rounds"], seen["rounds"])
        self.assertEqual((directory / "peers.png").read_bytes()[:4], b"\x89PNG")


if __name__ == "__main__":
    absltest.main()
