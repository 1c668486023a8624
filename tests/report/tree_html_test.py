import dataclasses
import html.parser
import json
import pathlib

import numpy as np
from absl.testing import absltest

from dialog_jax.errors import UserError
from dialog_jax.model.soft_prompt_config import SoftPromptConfig
from dialog_jax.report import dialogue_views, tree_html
from dialog_jax.training.config import DataConfig, TrainConfig
from dialog_jax.trees import prefix_tree
from dialog_jax.trees.prefix_tree import Span
from tests.report import pages
from tests.training import hand_made


class Reader(html.parser.HTMLParser):
    """What a browser would make of it: tags in order, and of each token (depth of its branch, text, hint, trained)."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tokens, self.labels, self.summaries = [], [], [], []
        self._depth, self._token, self._into = 0, None, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self._depth += tag == "details"
        self._into = self.summaries if tag == "summary" else None
        if tag == "span" and "title" in attributes:
            self._token = (self._depth, attributes["title"], attributes.get("style"))
        elif attributes.get("class") == "label":
            self._into = self.labels

    def handle_data(self, data):
        if self._token:
            depth, hint, style = self._token
            self.tokens.append((depth, data, hint, style))
        elif self._into is not None:
            self._into.append(data)

    def handle_endtag(self, tag):
        self._depth -= tag == "details"
        self._token = self._into = None


class DrawTest(absltest.TestCase):
    def test_largest_branch_continues_and_the_other_is_indented(self):
        # h x [a b] in generation; later history has b for the response: h x b u [c].
        sequences = [
            (np.array([7, 8, 1, 2]), [Span(2, 4, 1.0, 0)]),
            (np.array([7, 8, 2, 9, 3]), [Span(4, 5, 0.5, 1)]),
        ]
        tree = prefix_tree.build_tree(sequences)
        texts = ["h", "x", "a", "b", "b", "u", "c"]
        drawn = Reader(
            tree_html.draw(tree, texts, [0, 0, 1, 1, 1, 2, 3], ["user", "assistant", "user", "assistant"], name="one")
        )
        self.assertEqual(
            [(depth, text) for depth, text, _, _ in drawn.tokens],
            [(0, "h"), (0, "x"), (1, "a"), (1, "b"), (0, "b"), (0, "u"), (0, "c")],
        )
        self.assertEqual([text for _, text, _, style in drawn.tokens if style], ["a", "b", "c"])
        self.assertEqual([style for _, _, _, style in drawn.tokens if style], ["--w:1.0", "--w:1.0", "--w:0.5"])
        self.assertEqual(drawn.tokens[-1][2], "token 3, position 4, weight 0.5, turn 1")
        self.assertEqual(drawn.tokens[0][2], "token 7, position 0, not trained")
        self.assertEqual(drawn.summaries, ["a branch of 2 tokens, trains turn 0"])
        self.assertEqual(drawn.labels, ["user", "assistant, turn 0", "assistant", "user", "assistant, turn 1"])


class ViewTest(absltest.TestCase):
    def test_dialogue_of_a_config_shows_itself_and_its_text_stays_text(self):
        directory = pathlib.Path(self.create_tempdir().full_path)
        hand_made.save_model(directory / "base", max_length=512)
        records = [*pages.records(), {"messages": [{"role": "user", "content": "Hello"}]}]
        data = directory / "data.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        config = TrainConfig(model=str(directory / "base"), data=DataConfig(train=str(data)))

        view = dialogue_views.view_dialogue(config, index=4)
        drawn = Reader(view._repr_html_())
        self.assertNotIn("script", drawn.tags)
        self.assertNotIn("b", drawn.tags)
        self.assertEqual("".join(text for _, text, _, _ in drawn.tokens).replace("·", "").count(pages.ATTACK), 2)
        self.assertLen(drawn.tokens, len(view.tree.tokens))

        self.assertEmpty(view.remarks)
        short = dataclasses.replace(
            config, data=dataclasses.replace(config.data, max_length=16), soft_prompt=SoftPromptConfig(tokens=4)
        )
        remarks = dialogue_views.view_dialogue(short, index=4).remarks
        self.assertLen(remarks, 2)
        self.assertIn("4 virtual tokens", remarks[0])
        self.assertIn("data.max_length = 16 tokens", remarks[1])
        self.assertIn(remarks[1].partition(":")[0], dialogue_views.view_dialogue(short, index=4)._repr_html_())

        answers = Reader(dialogue_views.view_dialogue(config, index=2)._repr_html_())
        self.assertLen(answers.summaries, 1)
        for index, message in (
            (5, "has nothing to train on"),
            (6, "index 6: data.jsonl has 6 records"),
            (-1, "index -1: data.jsonl has 6 records"),
        ):
            with self.assertRaisesRegex(UserError, message):
                dialogue_views.view_dialogue(config, index)


if __name__ == "__main__":
    absltest.main()
