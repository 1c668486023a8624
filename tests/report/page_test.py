"""What a page holds: the losses of dialog_jax score, the texts of the tokens, and no request."""

import json
import pathlib
import re
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from dialog_jax.audit.figures import make_audit
from dialog_jax.dialogues import parsing
from dialog_jax.errors import UserError
from dialog_jax.evaluation import scoring, token_scores
from dialog_jax.report import charts, dialogue_views, page
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.commands import running
from tests.experiments import tiny_run
from tests.rendering import chat_templates
from tests.report import pages


class PageTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.model = tiny_run.save_model(directory, max_length=512)
        data = directory / "data.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in pages.records()))
        cls.dialogues = list(parsing.iterate_dialogues(str(data)))
        renderer, objective = cls.model.renderer, ObjectiveConfig()
        cls.views, cls.remarks = dialogue_views.make_views(cls.dialogues, "training", renderer, objective, 9)
        trees = [view.tree for view in cls.views]
        scores = token_scores.score_tokens(trees, cls.model, compute_dtype=jnp.float32, top_k=page.ALTERNATIVES)
        cls.audit = make_audit(cls.dialogues, cls.model.tokenizer, renderer, TreeConfig(max_length=256))
        with mock.patch.object(page, "bundle_vega", lambda: ""):
            cls.html = page.render(
                title=pages.ATTACK,
                runs=[],
                audit=cls.audit,
                data_name=pages.ATTACK,
                max_length=256,
                views=cls.views,
                models=[page.ScoredModel("before", scores)],
                renderer=renderer,
                notes=[],
                remarks=[pages.ATTACK],
            )

    def test_losses_of_responses_are_those_of_score(self):
        scored = scoring.score_dialogues(
            self.dialogues, self.model.renderer, self.model.config, self.model.parameters, compute_dtype=jnp.float32
        )
        seen = 0
        for place, score in enumerate(scored):
            columns = pages.read_dialogue(self.html, place)
            for turn in score.record["turns"]:
                nodes = columns["message"] == turn["message"]
                self.assertEqual(nodes.sum(), turn["tokens"])
                self.assertAlmostEqual(columns["loss"][0, nodes].sum(), turn["nll"], delta=1e-3)
                seen += 1
            trained = columns["weight"] > 0
            expected = np.average(columns["loss"][0, trained], weights=columns["weight"][trained])
            (listed,) = pages.read_data(self.html)["dialogues"][place]["losses"]
            self.assertAlmostEqual(listed, expected, delta=1e-4)
        self.assertGreaterEqual(seen, 10)

    def test_every_token_but_the_first_has_a_loss_and_alternatives_that_fit_it(self):
        for place in range(len(self.dialogues)):
            columns = pages.read_dialogue(self.html, place)
            self.assertEqual(np.isnan(columns["loss"][0]).tolist(), (columns["gap"] == 0).tolist())
            scored = columns["gap"] > 0
            probability, loss = columns["probability"][0][:, scored], columns["loss"][0][scored]
            self.assertTrue((np.diff(probability, axis=0) <= 0).all())
            is_token = columns["top"][0][:, scored] == columns["token"][scored]
            np.testing.assert_allclose(probability[is_token], np.exp(-loss)[is_token.any(0)], atol=1e-4)
            self.assertTrue((probability[-1][~is_token.any(0)] >= np.exp(-loss)[~is_token.any(0)] - 1e-4).all())

    def test_texts_of_a_path_join_to_the_text_of_its_tokens(self):
        texts = pages.read_texts(self.html)
        backend = self.model.tokenizer.backend_tokenizer
        for place, view in enumerate(self.views):
            columns = pages.read_dialogue(self.html, place)
            parent = np.where(columns["gap"] > 0, np.arange(len(columns["gap"])) - columns["gap"].astype(int), -1)
            self.assertEqual(parent.tolist(), view.tree.parent.tolist())
            for leaf in set(range(len(parent))) - set(parent.tolist()):
                path = [leaf]
                while parent[path[0]] >= 0:
                    path.insert(0, int(parent[path[0]]))
                shown = "".join(texts["strings"][columns["text"][node]] for node in path)
                ids = [texts["ids"][columns["token"][node]] for node in path]
                self.assertEqual(shown, backend.decode(ids, skip_special_tokens=False))
        self.assertIn("🙂", self.views[-1].texts)

    def test_tokens_belong_to_the_message_whose_text_they_are(self):
        for view in self.views:
            for index, message in enumerate(view.dialogue.messages):
                text = "".join(t for t, owner in zip(view.texts, view.messages, strict=True) if owner == index)
                self.assertIn(message.content, text)

    def test_text_of_the_data_opens_and_ends_no_element(self):
        self.assertEqual(len(re.findall("<script", self.html)), len(re.findall("</script>", self.html)))
        self.assertLen(re.findall("<script", self.html), 3 + len(self.views) + 1 + len(page._SCRIPTS))
        self.assertNotIn("<b>é", self.html)
        self.assertIn("&lt;b&gt;é", self.html)

    def test_nothing_is_loaded_from_elsewhere(self):
        self.assertIn("default-src 'none'", self.html)
        self.assertEmpty(
            re.findall(r"""(?:src|href|action)=["']?(?!#|data:,)[^"' >]+""", self.html.split("<script")[0])
        )
        self.assertNotRegex(self.html, r"@import|url\(|fetch\(|XMLHttpRequest")

    def test_dialogues_that_are_not_shown_are_named(self):
        untrained = json.dumps({"id": "u", "messages": [{"role": "user", "content": "Hello"}]})
        with tempfile.TemporaryDirectory() as name:
            file = pathlib.Path(name) / "some.jsonl"
            file.write_text(f"{untrained}\n{json.dumps(pages.records()[0])}\n{untrained}\n")
            records = [UserError("broken"), *parsing.iterate_dialogues(str(file))]
        views, remarks = dialogue_views.make_views(records, "training", self.model.renderer, ObjectiveConfig(), 1)
        self.assertEqual([view.dialogue.id for view in views], ["plain"])
        self.assertLen(remarks, 2)
        self.assertEqual(remarks[0], "not shown: broken")
        self.assertRegex(remarks[1], "dialogue u .* has nothing to train on under the objective conditional")

    def test_history_that_is_rendered_otherwise_branches_with_messages_on_each_branch(self):
        renderer = self.model.renderer
        tokenizer = chat_templates.train_tokenizer("qwen3")
        renderer = type(renderer)(tokenizer)
        record = {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "<think>\nI greet.\n</think>\n\nHello!"},
                {"role": "user", "content": "And you?"},
                {"role": "assistant", "content": "fine"},
            ]
        }
        with tempfile.TemporaryDirectory() as name:
            file = pathlib.Path(name) / "some.jsonl"
            file.write_text(json.dumps(record) + "\n")
            dialogues = list(parsing.iterate_dialogues(str(file)))
        ((view,), _) = dialogue_views.make_views(dialogues, "training", renderer, ObjectiveConfig(), 1)
        self.assertEqual(page.describe_view(view, 0, [])["branches"], 2)
        trained = [text for text, weight in zip(view.texts, view.tree.weight, strict=True) if weight]
        self.assertStartsWith("".join(trained), "<think>\nI greet.\n</think>\n\nHello!<|im_end|>")
        owners = {m for m, weight in zip(view.messages, view.tree.weight, strict=True) if weight}
        self.assertEqual(owners, {1, 3})


class ChartsTest(absltest.TestCase):
    def test_curve_of_many_steps_is_averaged_and_says_so(self):
        steps = [{"step": step, "loss": float(step % 2)} for step in range(1, 4001)]
        (loss,) = charts.draw_steps({"run": (steps, [{"step": 0, "loss": 2.0}])})
        values = [value for value in loss.spec["data"]["values"] if not value["marked"]]
        self.assertLess(len(values), 1500)
        self.assertIn("the mean of 3 steps", loss.note)
        self.assertAlmostEqual(values[0]["y"], 2 / 3)
        self.assertEqual((values[0]["x"], values[-1]["x"]), (3, 4000))
        self.assertEqual([value["y"] for value in loss.spec["data"]["values"] if value["marked"]], [2.0])

    def test_figures_that_are_missing_have_no_chart_and_are_not_zero(self):
        steps = [{"step": 1, "loss": None, "peak_memory_gb": 2.5}, {"step": 2, "loss": 3.0, "peak_memory_gb": 2.5}]
        drawn = charts.draw_steps({"run": (steps, [])})
        self.assertEqual([chart.title for chart in drawn], ["Loss", "Peak memory of a device"])
        self.assertEqual([(value["x"], value["y"]) for value in drawn[0].spec["data"]["values"]], [(2, 3.0)])


@pytest.mark.full
class CommandTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.base, cls.data, cls.run_path = pages.write_run(cls.directory)

    def report(self, *flags):
        (self.directory / "report.html").unlink(missing_ok=True)
        return pages.write_report(self.directory, self.run_path, self.data, self.base, *flags)

    def test_page_of_a_run_has_losses_before_and_after(self):
        html, told, _ = self.report("--dialogues=8")
        self.assertRegex(told, r"report\.html: \d\.\d MB; open it in a browser")
        data = pages.read_data(html)
        self.assertEqual((data["models"], data["differences"]), (["before", "after"], [[1, 0]]))
        self.assertEqual([one["group"] for one in data["dialogues"]], ["held-out"] * 4 + ["training"] * 4)
        out = self.directory / "scores.jsonl"
        run_flags = f"--config.model={self.run_path}", f"--base={self.base}"
        for place, flags in enumerate(((f"--config.model={self.base}",), run_flags)):
            running.run("score", *flags, f"--config.data.train={self.data}", f"--out={out}")
            for number, line in enumerate(out.read_text().splitlines()[:4]):
                columns = pages.read_dialogue(html, number)
                for turn in json.loads(line)["turns"]:
                    nodes = columns["message"] == turn["message"]
                    self.assertAlmostEqual(columns["loss"][place, nodes].sum(), turn["nll"], delta=2e-3)
        for text in ("held-out loss", "4.0000 → 3.0000", "lora.rank", "soft_prompt.tokens", "Not recorded by this run"):
            self.assertIn(text, html)

    def test_two_runs_are_compared(self):
        other = pages.write_run(self.directory, "other", seed=2)[2]
        html, _, _ = self.report(f"--against={other}", "--dialogues=2")
        data = pages.read_data(html)
        self.assertEqual(data["models"], ["before", "run", "other"])
        self.assertEqual(data["differences"], [[1, 0], [2, 0], [1, 2]])
        losses = data["dialogues"][0]["losses"]
        self.assertLen(set(losses), 3)
        names = {value["line"] for value in data["charts"]["chart-0"]["spec"]["data"]["values"]}
        self.assertContainsSubset({"run: held-out dialogues", "other: held-out dialogues"}, names)

    def test_runs_of_one_name_and_a_run_of_all_weights_are_told_apart(self):
        other = pages.write_run(self.directory / "elsewhere", seed=2, whole=True)[2]
        html, _, _ = self.report(f"--against={other}", "--dialogues=2")
        self.assertEqual(pages.read_data(html)["models"], ["before", str(self.run_path), str(other)])

    def test_page_of_data_alone_has_no_losses_and_reads_no_weights(self):
        out = self.directory / "data.html"
        model = self.directory / "tokenizer_only"
        chat_templates.train_tokenizer("chatml").save_pretrained(model)
        told, error = running.run(
            "report", f"--config.tokenizer={model}", f"--config.data.train={self.data}", f"--out={out}"
        )
        self.assertEmpty(error)
        self.assertIn("data.html", told)
        data = pages.read_data(out.read_text(encoding="utf-8"))
        self.assertEqual((data["models"], data["dialogues"][1]["losses"]), ([], []))
        self.assertLen(data["dialogues"], 5)
        self.assertEqual(data["dialogues"][2]["branches"], 2)

    def test_errors_name_place_and_remedy(self):
        (self.directory / "report.html").unlink(missing_ok=True)
        run = f"--run={self.run_path}"
        out = f"--out={self.directory / 'report.html'}"
        for flags, message in (
            ((run,), "--out is missing"),
            ((run, out), "names the data 'data.jsonl', which is not here"),
            ((run, out, "--config.steps=3"), "--config.steps has no effect with --run"),
            (
                (out, f"--against={self.run_path}", f"--config.data.train={self.data}"),
                "needs a run. Name one: --run=DIRECTORY",
            ),
            ((f"--run={self.directory}", out), "holds no run"),
        ):
            _, error = running.run("report", *flags)
            self.assertIn(message, error)
        page.bundle_vega.cache_clear()
        with mock.patch.dict("sys.modules", {"vl_convert": None}):
            _, error = running.run("report", run, out)
        self.assertIn("Run: pip install 'dialog_jax[report]'", error)
        self.assertFalse((self.directory / "report.html").exists())


if __name__ == "__main__":
    absltest.main()
