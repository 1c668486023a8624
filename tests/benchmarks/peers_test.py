"""scripts/benchmarks/peers: shared inputs, figures and tables; no peer is installed or run."""

import json
import pathlib
import sys
import tempfile

import numpy as np
from absl.testing import absltest

from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from tests.rendering import chat_templates
from tests.scripts import running

sys.path.insert(0, str(running.SCRIPTS / "benchmarks" / "peers"))

import contestants
import shared_inputs
import summary

_DIALOGUES = [
    ["Hi", "Hello! How are you?", "fine, thank you", "yes", "And you?", "I am fine."],
    ["What is this?", "I am fine."],
    ["And you?", "yes\nyes", "What is this?"],  # ends with a user message
    ["Hi " * 60, "no"],
]
_OURS = {"compared_loss": 2.5, "compared_targets": 40}
_PEER = {"compared_loss": 2.5001, "compared_targets": 40}
_COMPARED = {"ours": _OURS, "trl_packed": _PEER, "trl_padded": {"compared_loss": 2.502, "compared_targets": 40}}
_COMPARED |= {"tunix": {"compared_loss": 2.5, "compared_targets": 41}, "trl_packed_logits": {"failed": "no memory"}}


def records():
    roles = ("user", "assistant")
    return [{"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(talk)]} for talk in _DIALOGUES]


def a_round(contestant, real, **more):
    speeds = {"real_tokens_per_second": real, "response_tokens_per_second": real / 4}
    steps = {"seconds_a_step": 400 / real, "tokens_a_step": 2046.5, "first_loss": 3.0}
    return {"contestant": contestant, "peak_memory_gb": 4.0, **speeds, **steps, **more}


class SharedInputsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        chat_templates.train_tokenizer("chatml").save_pretrained(self.directory / "model")
        self.data = self.directory / "data.jsonl"
        self.data.write_text("".join(json.dumps(one) + "\n" for one in records()))

    def write(self, **changes):
        options = {"model": str(self.directory / "model"), "data": str(self.data), "dialogues": 4, "max_length": 100}
        options |= {"warmup": 2, "measured": 2}
        return shared_inputs.write_inputs(self.directory / "inputs", **(options | changes))

    def read(self, name):
        return [json.loads(line) for line in (self.directory / "inputs" / name).read_text().splitlines()]

    def test_write_inputs_targets_equal_those_of_our_trees(self):
        written = self.write()
        renderer = Renderer(load_tokenizer(str(self.directory / "model")))
        trees = dataset.prepare(list(read_dialogues(str(self.data))), renderer, TreeConfig(max_length=4096))
        ours = [one.tokens[one.weight > 0].tolist() for one in map(trees.tree, range(4))]
        labels = [one["labels"][1:] for one in self.read("tokens.jsonl")]
        peers = [[label for label in row if label != shared_inputs.IGNORED] for row in labels]
        self.assertEqual(peers, ours)
        self.assertEqual(written["targets"], sum(map(len, ours)))

    def test_write_inputs_compared_dialogues_fit_a_row(self):
        written = self.write()
        sizes = [len(one["input_ids"]) for one in self.read("tokens.jsonl")]
        self.assertGreater(sizes[3], 100)
        self.assertEqual([len(one["input_ids"]) for one in self.read("compared_tokens.jsonl")], sizes[:3])
        self.assertEqual(self.read("compared.jsonl"), records()[:3])
        self.assertEqual((written["compared_dialogues"], written["longer_than_max_length"]), (3, 1))
        self.assertEqual(written["tokens"], sum(sizes))

    def test_write_inputs_spread_samples_all_lengths_longest_first(self):
        self.write()
        dialogues, spread = self.read("tokens.jsonl"), self.read("spread_tokens.jsonl")
        order = sorted(range(4), key=lambda number: -len(dialogues[number]["input_ids"]))
        self.assertEqual(spread, [dialogues[order[number]] for number in (1, 1, 1, 3)])
        rng = np.random.default_rng(0)
        lengths = rng.integers(10, 2000, 256).tolist()
        chosen = [lengths[place] for place in shared_inputs.sample_lengths(lengths, 8)]
        self.assertEqual(chosen, sorted(chosen, reverse=True))
        self.assertLen(set(chosen), 8)
        self.assertAlmostEqual(np.mean(chosen) / np.mean(lengths), 1, delta=0.03)

    def test_write_inputs_with_too_few_dialogues_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "has 4 dialogues, 5 are needed"):
            self.write(dialogues=5)

    def test_write_inputs_with_a_stripping_template_is_an_error(self):
        chat_templates.train_tokenizer("qwen3").save_pretrained(self.directory / "model")
        roles, texts = ("user", "assistant") * 2, ("Hi", "<think>\na b\n</think>\n\nyes", "And you?", "yes")
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        self.data.write_text(json.dumps({"messages": messages}))
        with self.assertRaisesRegex(ValueError, "message 1"):
            self.write(dialogues=1)


class FiguresTest(absltest.TestCase):
    def test_add_speeds_uses_all_steps(self):
        written = {"seconds": [10.0, 20.0, 70.0], "real_tokens": [100, 400, 700], "response_tokens": [10, 80, 60]}
        figures = contestants.add_speeds(written | {"peak_memory_gb": 1.0, "real_tokens_per_second": 99.0})
        self.assertEqual((figures["seconds_a_step"], figures["tokens_a_step"]), (20.0, 400))
        self.assertEqual((figures["real_tokens_per_second"], figures["response_tokens_per_second"]), (12.0, 1.5))
        self.assertEqual(figures["peak_memory_gb"], 1.0)

    def test_add_speeds_with_missing_tokens_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "2 seconds, 1 real_tokens"):
            contestants.add_speeds({"seconds": [1.0, 2.0], "real_tokens": [5], "response_tokens": [1, 2]})

    def test_add_speeds_without_steps_changes_nothing(self):
        self.assertEqual(contestants.add_speeds(_PEER), _PEER)

    def test_run_command_that_fails_returns_the_reason(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        out = directory / "a.json"
        writes = [sys.executable, "-c", f"open({str(out)!r}, 'w').write('{{\"seconds\": [1], \"real_tokens\": []')"]
        for command, why in (
            (["/bin/false"], "ended with 1; see a.log"),
            (["/bin/sleep", "20"], "not done after 2 s"),
            (["/bin/true"], "ended with 0; see a.log"),
            (writes, "Expecting"),
        ):
            figures = contestants.run_command("tunix", command, out, seconds=2)
            self.assertEqual(list(figures), ["failed"])
            self.assertStartsWith(figures["failed"], why)

    def test_measure_command_passes_the_same_settings_to_all(self):
        here = pathlib.Path("inputs")
        settings = contestants.Settings(model=pathlib.Path("m"), inputs=here, max_length=77, rows=3, warmup=1, steps=5)
        for name in contestants.CONTESTANTS:
            command = contestants.measure_command(name, settings, pathlib.Path("python"), pathlib.Path("out.json"))
            self.assertContainsSubset(["--max_length=77", "--rows=3", "--steps=5", "--out=out.json"], command, name)


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
            a_round("trl_padded", 300.0),
            a_round("trl_packed_logits", 400.0),
        ]
        self.figures = summary.summarize(rounds, _COMPARED)

    def test_summarize_takes_medians_and_spread_over_rounds(self):
        ours, peer = self.figures["ours"], self.figures["trl_packed"]
        self.assertEqual((ours["real_tokens_per_second"], ours["spread"]), (170.0, [150.0, 250.0]))
        self.assertEqual((peer["real_tokens_per_second"], peer["spread"]), (100.0, [90.0, 110.0]))
        self.assertEqual(ours["response_tokens_per_second"], 42.5)
        self.assertEqual((ours["rounds"], peer["rounds"]), (3, 2))
        self.assertEqual((ours["peak_memory_gb"], ours["compile_seconds"]), (3.2, 30.0))
        self.assertEqual((ours["compared_loss"], peer["compared_loss"], peer["first_loss"]), (2.5, 2.5001, 3.0))
        self.assertEqual(self.figures["tunix"], {"failed": "not done after 9 s"})

    def test_summarize_excludes_contestants_with_another_loss(self):
        reason = (
            "it computes another loss on the same dialogues: 2.50200 on 40 targets; dialog_jax 2.50000 on 40 targets"
        )
        self.assertEqual(self.figures["trl_padded"], {"failed": reason})
        self.assertEqual(self.figures["trl_packed_logits"], {"failed": "no memory"})
        figures = summary.summarize([a_round("tunix", 500.0)], _COMPARED)
        self.assertIn("on 41 targets; dialog_jax 2.50000 on 40 targets", figures["tunix"]["failed"])

    def test_make_table_is_sorted_by_speed_and_names_the_missing(self):
        lines = summary.make_table(self.figures, self.labels, {"Other": "no network"}).splitlines()
        self.assertEqual(
            lines[2],
            f"| {self.labels['ours']} | 170.0 | 150.0 to 250.0 | 42.5 | 2.4 | 2,046 | 3.20 | 30.0 | 3.0000 | 2.5000 |",
        )
        self.assertTrue(lines[3].startswith("| TRL, packed (bfd), malloc tuned | 100.0 | 90.0 to 110.0 |"))
        self.assertContainsSubset(
            [f"* {self.labels['tunix']}: not done after 9 s", "* Other: no network"],
            lines[lines.index("Not measured:") :],
        )

    def test_make_verdict_compares_with_the_fastest_peer(self):
        text = summary.make_verdict(self.figures, self.labels)
        self.assertIn(
            "1.70 times as many real tokens per second as the fastest peer (TRL, packed (bfd), malloc tuned)", text
        )
        self.assertIn("0.80 times its memory", text)
        self.assertIn("all losses on the same 40 targets are within 1.0e-04 nats", text)
        for alone in ("ours", "trl_packed"):
            with self.assertRaisesRegex(ValueError, "nothing to compare"):
                summary.make_verdict({alone: self.figures[alone]}, self.labels)

    def test_write_results_writes_table_plot_and_json(self):
        directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        measured = {
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
        with running.loaded("benchmarks/peers/run") as script:
            text = script.write_results(measured, directory)
            self.assertEqual(
                script.rotate_orders(["a", "b", "c"], 4), [list("abc"), list("bca"), list("cab"), list("abc")]
            )
        self.assertIn("trl: torch 2.13.0  \n", text)
        self.assertEqual((directory / "peers.md").read_text(), text)
        self.assertEqual(json.loads((directory / "peers.json").read_text())["rounds"], measured["rounds"])
        self.assertEqual((directory / "peers.png").read_bytes()[:4], b"\x89PNG")


if __name__ == "__main__":
    absltest.main()
