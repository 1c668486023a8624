"""dialog_jax select: what its file makes training train on, and errors of flags."""

import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
import rich.console
from absl.testing import absltest

from dialog_jax.dialogues import holdout, parsing
from dialog_jax.errors import UserError
from dialog_jax.training import run_inputs
from tests.commands import running
from tests.training import tiny


class SelectTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.create_tempdir().full_path)
        self.config = tiny.run_config(self.directory)
        self.train = self.directory / "train.jsonl"
        self.scores = self.directory / "scores.jsonl"
        self.weights = self.directory / "weights.jsonl"
        self.log = io.StringIO()

    def write_scores(self):
        """Scores of all responses, with a different number of tokens for each; returns them by (id, message)."""
        rng, tokens = np.random.default_rng(0), {}
        with self.scores.open("w") as file:
            for dialogue in parsing.read_dialogues(self.train):
                responses = [i for i, message in enumerate(dialogue.messages) if message.role == "assistant"]
                turns = [
                    {"turn": k, "message": i, "tokens": int(rng.integers(10**6)), "nll": 1.0}
                    for k, i in enumerate(responses)
                ]
                tokens |= {(dialogue.id, turn["message"]): turn["tokens"] for turn in turns}
                line = {"id": dialogue.id, "content": holdout.format_hash(dialogue), "turns": turns}
                file.write(json.dumps(line) + "\n")
        return tokens

    def select(self, *flags, scores=None):
        return running.run("select", f"--scores={scores or self.scores}", f"--out={self.weights}", *flags)

    def read_inputs(self, name="run", **data):
        config = dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, workers=0, **data))
        (self.directory / name).mkdir(exist_ok=True)
        console = rich.console.Console(file=self.log, highlight=False, soft_wrap=True)
        return run_inputs.read_inputs(config, self.directory / name, console)

    def test_training_has_the_targets_of_the_kept_responses_behind_all_of_their_history(self):
        tokens = self.write_scores()
        out, error = self.select("--criterion=longest", "--keep=0.25")
        self.assertEmpty(error)
        kept = sorted(tokens, key=lambda key: -tokens[key])[: round(0.25 * len(tokens))]
        without = {identifier for identifier, _ in tokens} - {identifier for identifier, _ in kept}
        self.assertIn(f"{len(kept)} of {len(tokens)} responses are kept", out)
        self.assertIn(f"{len(without)} of 24 dialogues have none of them", out)
        self.assertIn(f"longest (tokens): high is kept, from {min(tokens[key] for key in kept):.4g}", out)
        selected = self.read_inputs(weights=str(self.weights))
        self.assertIn(f"{len(without)} dropped, no target", self.log.getvalue())
        records = [json.loads(line) for line in self.train.read_text(encoding="utf-8").splitlines()]
        for record in records:
            for index, message in enumerate(record["messages"]):
                if message["role"] == "assistant":
                    message["weight"] = float((record["id"], index) in kept)
        other = self.directory / "weighted.jsonl"
        other.write_text("".join(json.dumps(record) + "\n" for record in records))
        expected = self.read_inputs(train=str(other))
        self.assertEqual(selected.train.tokens.tolist(), expected.train.tokens.tolist())
        self.assertEqual(selected.train.weight.tolist(), expected.train.weight.tolist())
        self.assertEqual(list(selected.train.ids), list(expected.train.ids))
        plain = self.read_inputs()  # in the same directory, whose trees have other keys
        self.assertGreater(plain.train.targets.sum(), selected.train.targets.sum())
        self.assertNotEqual(plain.hashes["data.train"], selected.hashes["data.train"])
        self.assertEqual(plain.hashes["data.validation"], selected.hashes["data.validation"])

    @pytest.mark.full
    def test_held_out_dialogues_of_a_share_are_the_same_and_keep_their_weights(self):
        self.write_scores()
        self.select("--criterion=random", "--keep=0.2")
        plain = self.read_inputs(validation="", validation_share=0.3)
        selected = self.read_inputs(validation="", validation_share=0.3, weights=str(self.weights))
        self.assertEqual(plain.held_out.weight.tolist(), selected.held_out.weight.tolist())
        self.assertEmpty(set(selected.train.ids) & set(selected.held_out.ids))
        self.assertLess(len(selected.train), len(plain.train))

    @pytest.mark.full
    def test_other_weights_are_other_data_and_changed_data_is_an_error(self):
        self.write_scores()
        self.select("--criterion=random", "--keep=0.5")
        first = self.read_inputs(weights=str(self.weights))
        self.select("--criterion=random", "--keep=0.5", "--seed=1")
        second = self.read_inputs(weights=str(self.weights))
        self.assertNotEqual(first.hashes["data.train"], second.hashes["data.train"])
        self.assertNotEqual(first.train.tokens.tolist(), second.train.tokens.tolist())
        text = self.train.read_text(encoding="utf-8")
        self.train.write_text(text.replace('"role": "user", "content": "', '"role": "user", "content": "Well, ', 1))
        with self.assertRaisesRegex(UserError, r"dialogue train-0 \(train.jsonl:1\): has changed since its responses"):
            self.read_inputs(weights=str(self.weights))
        self.train.write_text(text + json.dumps({"id": "new", "prompt": "a", "completion": "b"}) + "\n")
        with self.assertRaisesRegex(UserError, r"dialogue new \(train.jsonl:25\): weights.jsonl has no line"):
            self.read_inputs(weights=str(self.weights))
        skipped = self.read_inputs(weights=str(self.weights), on_error="skip")
        self.assertEqual(skipped.train.tokens.tolist(), second.train.tokens.tolist())
        self.assertIn("dialogue new", (self.directory / "run" / "skipped.txt").read_text())

    @pytest.mark.full
    def test_wrong_flags_are_errors_with_the_remedy(self):
        self.write_scores()
        for flags, message in (
            (["--keep=0.5"], "--criterion is missing"),
            (["--criterion=length"], "needs one of --keep=SHARE, --threshold=VALUE and --weigh"),
            (["--criterion=length", "--keep=0.5", "--weigh"], "needs one of --keep"),
            (["--criterion=length", "--keep=30"], "--keep is 30; it must be above 0 and at most 1"),
            (["--criterion=random", "--keep=0.5", "--prefer=low"], "--prefer=low has no effect on the baseline random"),
            (["--criterion=ifd", "--keep=0.5"], "needs nll_none"),
            (
                ["--criterion=length", "--keep=0.5", f"--out={self.scores}"],
                "is one of --scores, which it would replace",
            ),
        ):
            out, error = self.select(*flags)
            self.assertEmpty(out)
            self.assertIn(message, error)
            self.assertIn("[exit code 1]", error)
        self.assertFalse(self.weights.exists())

    @pytest.mark.full
    def test_scores_of_two_models_select_what_show_then_prints(self):
        flags = [f"--config.model={self.directory / 'model'}", f"--config.data.train={self.train}"]
        tuned = self.directory / "tuned.jsonl"
        for out in (self.scores, tuned):
            running.run("score", *flags, "--context=all", f"--out={out}")
        records = [json.loads(line) for line in tuned.read_text().splitlines()]
        best = records[5]["turns"][-1]
        best["nll"] -= 3.0 * best["tokens"]
        tuned.write_text("".join(json.dumps(record) + "\n" for record in records))
        out, error = self.select("--criterion=rho", "--threshold=2.9", scores=f"{self.scores},{tuned}")
        self.assertEmpty(error)
        self.assertIn("1 of 48 responses are kept", out)
        shown, _ = running.run("show", *flags, f"--config.data.weights={self.weights}", "--index=5")
        self.assertIn(f"targets: {best['tokens']} ", shown)
        for criterion in ("ifd", "history_gain", "perplexity"):
            _, error = self.select(f"--criterion={criterion}", "--keep=0.3")
            self.assertEmpty(error)
            self.read_inputs(weights=str(self.weights))


if __name__ == "__main__":
    absltest.main()
