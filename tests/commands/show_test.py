"""dialog_jax show: the picture must give back the text it shows, and each token's line what the tree is."""

import json
import os
import pathlib
import re
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from tests.commands import running
from tests.rendering import chat_templates

_GUTTER = 9

_REASONING = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nI greet.\n</think>\n\nHello!"},
    {"role": "user", "content": "And you?"},
    {"role": "assistant", "content": "fine", "weight": 0.5},
]

# fmt: off
_REASONING_PICTURE = """\
         <|im_start|>user⏎
         Hi<|im_end|>⏎
         <|im_start|>assistant⏎
turn 0   ├ ⟦<think>⏎
         │ I greet.⏎
         │ </think>⏎
         │ ⏎
         │ Hello!<|im_end|>⟧
         Hello!<|im_end|>⏎
         <|im_start|>user⏎
         And you?<|im_end|>⏎
         <|im_start|>assistant⏎
turn 1   ⟦0.5: <think>⏎
         ⏎
         </think>⏎
         ⏎
         fine<|im_end|>⟧
"""

_CONTINUATIONS = {
    "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
    "continuations": [
        "Hello, friend!",
        [
            {"role": "assistant", "content": "Yes\tno", "train": False},
            {"role": "user", "content": "So?"},
            {"role": "assistant", "content": [{"type": "text", "text": "I am ", "weight": 0.25},
                                              {"type": "text", "text": "fine 🙂"}]},
        ],
    ],
}

_CONTINUATIONS_PICTURE = """\
         <|im_start|>system⏎
         Be kind.<|im_end|>⏎
         <|im_start|>user⏎
         Hi<|im_end|>⏎
         <|im_start|>assistant⏎
turn 0   ├ ⟦Hello, friend!<|im_end|>⟧
         Yes⇥no<|im_end|>⏎
         <|im_start|>user⏎
         So?<|im_end|>⏎
         <|im_start|>assistant⏎
turn 1   ⟦0.25: I am⟧⟦ fine 🙂<|im_end|>⟧
"""

# One line, in which the response and its end are trained on.
_MISTRAL_PICTURE = """\
turn 0   <s>[INST] Hi there [/INST]⟦ Hello!</s>⟧[INST] a b [/INST]⟦ c d</s>⟧
"""
# fmt: on


class ShowTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def show(self, record, *flags, family="chatml"):
        """(standard output, standard error)"""
        path = self.directory / family
        if not path.exists():
            chat_templates.train_tokenizer(family).save_pretrained(path)
        data = self.directory / "data.jsonl"
        records = record if isinstance(record, list) else [record]
        data.write_text("".join(json.dumps(one) + "\n" for one in records))
        return running.run("show", f"--config.tokenizer={path}", f"--config.data.train={data}", *flags)

    def picture(self, *arguments, **options):
        """The lines between the legend and the totals."""
        told, error = self.show(*arguments, **options)
        self.assertEmpty(error)
        self.assertNotIn("\x1b", told)
        return told.split("\n\n")[1] + "\n"

    def tokens(self, *arguments, **options):
        """The fields of each token's line, by their headings."""
        told, error = self.show(*arguments, "--tokens", **options)
        self.assertEmpty(error)
        heading, *lines = told.splitlines()
        names = heading.split()
        self.assertEqual(names, ["index", "position", "parent", "end", "weight", "turn", "role", "id", "text"])
        form = r" *(\d+) +(\d+) +(-?\d+) +(\d+) +([\d.e-]+) +(\d*) +(\w+) +(\d+)  (.*)"
        return [dict(zip(names, re.fullmatch(form, line).groups(), strict=True)) for line in lines]

    def test_reasoning_that_history_drops_is_a_branch(self):
        self.assertEqual(self.picture({"messages": _REASONING}, family="qwen3"), _REASONING_PICTURE)

    def test_continuations_are_branches_and_parts_have_their_weights(self):
        self.assertEqual(self.picture(_CONTINUATIONS), _CONTINUATIONS_PICTURE)

    def test_soft_prompt_is_named_in_front_of_the_dialogue(self):
        record = {"messages": _REASONING}
        prompt = "--config.soft_prompt.tokens=3"
        picture = self.picture(record, prompt, family="qwen3")
        self.assertEqual(picture, " " * _GUTTER + "<soft prompt: 3 tokens>" + _REASONING_PICTURE[_GUTTER:])
        without, tokens = self.tokens(record, family="qwen3"), self.tokens(record, prompt, family="qwen3")
        self.assertEqual([token["text"] for token in tokens[:3]], [f"<soft prompt {number}>" for number in range(3)])
        self.assertEqual([token["position"] for token in tokens[:3]], ["0", "1", "2"])
        for field in ("weight", "turn", "role", "id", "text"):
            self.assertEqual([token[field] for token in tokens[3:]], [token[field] for token in without])

    def test_text_that_is_not_in_lines_keeps_its_spaces(self):
        contents = ["Hi there", "Hello!", "a b", "c d"]
        roles = ["user", "assistant"] * 2
        record = {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}
        picture = self.picture(record, family="mistral")
        self.assertEqual(picture.replace("turn 1", "turn 0"), _MISTRAL_PICTURE)

    @parameterized.product(family=("chatml", "llama3", "gemma", "mistral", "phi3", "plain"), seed=(0, 1))
    def test_picture_gives_back_what_the_template_renders(self, family, seed):
        dialogue = chat_templates.random_dialogue(np.random.default_rng(seed), turns=3)
        messages = [message.as_dict() for message in dialogue.messages]
        if family in ("llama3", "plain"):  # white space that belongs to tokens of prompt and response makes branches
            messages = messages[:2]
        picture = self.picture({"messages": messages}, family=family)
        lines = "\n".join(re.sub("[⟦⟧]", "", line[_GUTTER:]) for line in picture.splitlines())
        back = re.sub("⏎(\n|$)", "\n", lines).replace("⇥", "\t")
        tokenizer = chat_templates.train_tokenizer(family)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        self.assertEqual(back, text[: len(back)])
        self.assertIn(text[len(back) :], ("", "\n", "\n<|endoftext|>"))

    @parameterized.parameters("conditional", "joint", "last", "roles")
    def test_lines_of_tokens_are_the_tokens_of_the_passes(self, objective):
        tokenizer = chat_templates.train_tokenizer("chatml")
        messages = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi 🙂"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "fine", "weight": 0.5},
        ]
        shown = self.tokens(
            {"messages": messages},
            f"--config.objective.name={objective}",
            "--config.objective.roles=('user', 'assistant')",
        )
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        stop = len(text) if objective in ("joint", "roles") else text.rindex("<|im_end|>") + len("<|im_end|>")
        ids = tokenizer.encode(text[:stop], add_special_tokens=False)
        if objective == "roles":  # what follows the last trained token is not in its tree
            ids = ids[: len(shown)]
        self.assertEqual([int(line["id"]) for line in shown], ids)
        self.assertEqual([int(line["parent"]) for line in shown], list(range(-1, len(ids) - 1)))
        self.assertEqual([int(line["position"]) for line in shown], list(range(len(ids))))
        self.assertEqual({int(line["end"]) for line in shown}, {len(ids)})
        sizes = [len(tokenizer.encode(message["content"], add_special_tokens=False)) + 1 for message in messages]
        counts = {role: sum(line["role"] == role for line in shown) for role in ("system", "user", "assistant")}
        self.assertEqual(counts, {"system": sizes[0], "user": sizes[1] + sizes[3], "assistant": sizes[2] + sizes[4]})
        weights = {
            "conditional": sizes[2] + sizes[4] / 2,
            "last": sizes[4] / 2,
            "roles": sizes[1] + sizes[2] + sizes[3] + sizes[4] / 2,
            "joint": len(ids) - 1 - sizes[4] / 2,
        }
        self.assertEqual(sum(float(line["weight"]) for line in shown), weights[objective])
        turned = [line["turn"] for line in shown if line["turn"]]
        self.assertEqual(turned, ["0"] * sizes[2] * (objective != "last") + ["1"] * sizes[4])
        self.assertEqual(shown[0]["text"], "'<|im_start|>'")
        self.assertEqual(shown[2]["text"], "'\\n'")

    def test_lines_of_tokens_of_a_branch_go_back_to_where_it_leaves(self):
        tokenizer = chat_templates.train_tokenizer("qwen3")
        shown = self.tokens({"messages": _REASONING}, family="qwen3")
        for line in shown:  # the parents of each token, read off the lines, are its context
            ancestors, node = [], int(line["index"])
            while node >= 0:
                ancestors.insert(0, node)
                node = int(shown[node]["parent"])
            self.assertLen(ancestors, int(line["position"]) + 1)
            visible = [j for j in range(int(line["index"]) + 1) if int(line["index"]) < int(shown[j]["end"])]
            self.assertEqual(visible, ancestors)
        last = "".join(tokenizer.decode([int(shown[node]["id"])]) for node in ancestors)
        self.assertEqual(last, tokenizer.apply_chat_template(_REASONING, tokenize=False).removesuffix("\n"))
        self.assertEqual([line["role"] for line in shown if line["text"] == "'Hello'"], ["assistant"] * 2)

    def test_totals_are_counted(self):
        told, _ = self.show({"messages": _REASONING}, family="qwen3")
        tokenizer = chat_templates.train_tokenizer("qwen3")

        def count(messages, **options):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options).removesuffix("\n")
            return len(tokenizer.encode(text, add_special_tokens=False)) + bool(options)  # with the line break

        first, last = count(_REASONING[:2]), count(_REASONING)
        own = [first - count(_REASONING[:1], add_generation_prompt=True),
               last - count(_REASONING[:3], add_generation_prompt=True)]  # fmt: skip
        size = first + last - count(_REASONING[:1], add_generation_prompt=True)
        self.assertEndsWith(
            told,
            f"\n\ntokens: {size}; targets: {sum(own)} ({sum(own) / size:.1%}); sum of their weights: "
            f"{own[0] + own[1] / 2:.6g}; responses: 2, which as separate sequences have {first + last} tokens\n",
        )

    def test_weights_follow_the_flags_of_the_objective(self):
        plain = [{k: v for k, v in message.items() if k != "weight"} for message in _REASONING]
        for flags, marks in (
            (["--config.objective.turn_discount=0.5"], ["⟦0.5: ", "⟦"]),
            (["--config.objective.turn_weights=(3, 0.25)"], ["⟦3: ", "⟦0.25: "]),
        ):
            picture = self.picture({"messages": plain}, *flags)
            self.assertEqual(re.findall(r"⟦(?:[\d.]+: )?", picture), marks)
        shown = self.tokens({"messages": plain}, "--config.objective.normalize=dialogue")
        self.assertAlmostEqual(sum(float(line["weight"]) for line in shown), 1, places=2)

    def test_colours_are_written_to_terminals_only(self):
        record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
        plain, _ = self.show(record)
        with mock.patch.dict(os.environ, {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}):
            coloured, _ = self.show(record)
        self.assertIn("\x1b[1;32mHello!\x1b[0m", coloured)  # bold green
        self.assertIn("\x1b[2;36mHi\x1b[0m", coloured)  # dim cyan
        without = re.sub(r"\x1b\[[\d;]*m", "", coloured)
        self.assertEqual(without.split("\n\n")[1:], plain.split("\n\n")[1:])
        with mock.patch.dict(os.environ, {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "200"}):
            uncoloured, _ = self.show(record)
        self.assertNotRegex(uncoloured, r"\x1b\[[\d;]*3\d")
        self.assertIn("⟦", uncoloured)

    def test_template_that_changes_contents_is_shown_without_their_roles(self):
        template = chat_templates.TEMPLATES["chatml"].replace("message.content", "message.content | upper")
        told, error = self.show({"prompt": "Hi", "completion": "Qx7 zebra"}, f"--config.data.chat_template={template}")
        self.assertRegex(error, "does not render the content of an assistant message")
        template = chat_templates.TEMPLATES["chatml"].replace(
            "message.content", "(message.content | upper if message.role == 'user' else message.content)"
        )
        told, error = self.show({"prompt": "Hi", "completion": "Hello!"}, f"--config.data.chat_template={template}")
        self.assertEmpty(error)
        self.assertIn(
            "the role of a message in the history cannot be determined: dialogue 0 (data.jsonl:1): message 0 (user)",
            told,
        )
        self.assertIn("         HI<|im_end|>⏎\n         <|im_start|>assistant⏎\nturn 0   ⟦Hello!<|im_end|>⟧\n", told)

    def test_branch_inside_a_character_loses_no_text(self):
        picture = self.picture({"prompt": "Hi", "continuations": ["🙂", "🙃"]})
        self.assertEqual(picture.count("⟦"), 3)
        self.assertIn("\ufffd", picture)

    def test_control_characters_do_not_reach_the_terminal(self):
        record = {"prompt": "a\x1b[31mb\x07", "completion": "c\rd"}
        picture = self.picture(record)
        self.assertIn("a␛[31mb␇<|im_end|>⏎", picture)
        self.assertIn("⟦c␍d<|im_end|>⟧", picture)

    def test_long_lines_are_wrapped_for_terminals_and_whole_in_files(self):
        record = {"prompt": "Hi", "completion": "yes " * 100}
        self.assertIn("yes " * 100, self.picture(record))
        with mock.patch.dict(os.environ, {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "60"}):
            told, _ = self.show(record)
        lines = re.sub(r"\x1b\[[\d;]*m", "", told.split("\n\n")[1]).splitlines()
        self.assertLessEqual(max(map(len, lines)), 60)
        self.assertTrue(all(line.startswith(" " * _GUTTER) for line in lines if not line.startswith("turn")))

    def test_other_records_may_be_bad_but_not_this_one(self):
        good = {"prompt": "Hi", "completion": "Hello!"}
        records = [{"prompt": "Hi"}, good]
        self.assertIn("⟦Hello!", self.picture(records, "--index=1"))
        for flags, told in (
            (["--index=0"], r"dialog_jax show: dialogue 0 \(data\.jsonl:1\): has the keys 'prompt'"),
            (["--index=2"], r"dialog_jax show: index 2: data.jsonl has 2 records, counted from 0"),
            (
                ["--index=1", "--config.objective.turn_weights=(0,)"],
                r"dialog_jax show: dialogue 1 \(data.jsonl:2\) has nothing to train on",
            ),
            (
                ["--index=1", "--config.objective.turn_weights=('a',)"],
                r"dialog_jax show: config.objective.turn_weights is 'a'; it must be of type float",
            ),
        ):
            out, error = self.show(records, *flags)
            self.assertRegex(error, told)
            self.assertEmpty(out)


if __name__ == "__main__":
    absltest.main()
