"""dialog_jax score against one forward pass a response, on tiny random models.

The oracle renders and tokenises every turn with the tokenizer's own chat interface and runs prompt ++ response alone.
"""

import functools
import json
import pathlib
import re
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from absl.testing import absltest, parameterized

from dialog_jax.evaluation import tree_scores
from dialog_jax.model import decoder, saving
from dialog_jax.trees import dataset, prefix_tree
from tests.commands import running
from tests.rendering import chat_templates
from tests.rendering.chat_templates import FAMILIES
from tests.training import tiny

_OTHER = {"role": "assistant", "content": "<think>\nlong ago\n</think>\n\nFine.", "weight": 2.0}
_LONG = " ".join(["the capital of France is Paris."] * 6)

_DIALOGUES = [
    {"id": "text", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! 🙂"}]},
    {
        "id": 7,
        "messages": [
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": "How are you?"},
            _OTHER,
            {"role": "user", "content": "And you?"},
            {"role": "assistant", "content": "I am fine.", "train": False},
            {"role": "user", "content": "12 x 12"},
            {"role": "assistant", "content": "<think>\nfirst, second\n</think>\n\n144", "weight": 0.25},
        ],
    },
    {"messages": [{"role": "user", "content": _LONG}, {"role": "assistant", "content": _LONG}]},
    {"prompt": "What is the capital of France?", "completion": "Paris."},
]
_TREE = {
    "id": "tree",
    "messages": [
        {"id": "q", "role": "user", "content": "Hi"},
        {"id": "a", "parent": "q", "role": "assistant", "content": "Hello there"},
        {"id": "b", "parent": "q", "role": "assistant", "content": "Hello!"},
    ],
}


def _oracle(model, parameters, tokenizer, messages, end_of_turn):
    """[(message, tokens of prompt ++ response, tokens of the response, nll)] of every response that is trained on."""
    return [
        (index, len(ids), len(ids) - start, float(_alone(model, parameters, ids)[start - 1 :].sum()))
        for index, ids, start in _sequences(tokenizer, messages, end_of_turn)
    ]


def _sequences(tokenizer, messages, end_of_turn):
    """[(message, prompt ++ response, where the response starts)], likewise."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    found = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("train") is False:
            continue
        prompt = tokenizer.apply_chat_template(plain[:index], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(plain[: index + 1], tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert ids[: len(prompt_ids)] == prompt_ids
        stop = ids.index(tokenizer.convert_tokens_to_ids(end_of_turn), len(prompt_ids)) + 1
        found.append((index, ids[:stop], len(prompt_ids)))
    return found


def _alone(model, parameters, ids):
    """-log p of every token but the first under the causal mask."""
    return -np.take_along_axis(_log_softmax(model, parameters, ids), np.asarray(ids)[1:, None], axis=1)[:, 0]


def _log_softmax(model, parameters, ids):
    """Log-probabilities of all tokens in the place of every token but the first."""
    length = 512
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(_logits(model, parameters, padded)[0, : len(ids) - 1], np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, parameters, tokens):
    length = tokens.shape[1]
    hidden = decoder.hidden_states(
        model, parameters, tokens, jnp.arange(length)[None], jnp.full((1, length), length, jnp.int32)
    )
    return jnp.einsum("btd,vd->btv", hidden, decoder.unembedding(model, parameters))


def _messages(record):
    if "messages" in record:
        return record["messages"]
    return [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]


class ScoreTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.out = self.directory / "scores.jsonl"

    def save_model(self, family, **changes):
        """(config, parameters, tokenizer) of a model in self.directory / "model"."""
        tokenizer = chat_templates.train_tokenizer(family)
        model = tiny.config(len(tokenizer), **({"max_length": 512} | changes))
        parameters = tiny.parameters(model)
        saving.save_pretrained(self.directory / "model", model, parameters, tokenizer=tokenizer)
        return model, parameters, tokenizer

    def score(self, records, *flags):
        """(records written, standard output, standard error)."""
        data = self.directory / "data.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        data.write_text("\n".join(lines) + "\n")
        model = self.directory / "model"
        told, error = running.run(
            "score", f"--config.model={model}", f"--config.data.train={data}", f"--out={self.out}", *flags
        )
        written = [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.exists() else None
        return written, told, error

    @parameterized.product(family=("chatml", "qwen3"), passes=("one", "k"))
    def test_scores_equal_one_forward_pass_a_response(self, family, passes):
        model, parameters, tokenizer = self.save_model(family)
        written, told, error = self.score(_DIALOGUES, f"--passes={passes}")
        self.assertEqual([record["id"] for record in written], ["text", 7, 2, 3])
        total = total_tokens = 0
        for record, dialogue in zip(written, _DIALOGUES, strict=True):
            self.assertEqual(list(record), ["id", "content", "tokens", "nll", "turns"])
            expected = _oracle(model, parameters, tokenizer, _messages(dialogue), "<|im_end|>")
            self.assertEqual(
                [(turn["message"], turn["tokens"]) for turn in record["turns"]], [(m, n) for m, _, n, _ in expected]
            )
            np.testing.assert_allclose(
                [turn["nll"] for turn in record["turns"]], [nll for *_, nll in expected], rtol=1e-5
            )
            np.testing.assert_allclose(record["nll"], sum(nll for *_, nll in expected), rtol=1e-5)
            self.assertEqual(record["tokens"], sum(n for _, _, n, _ in expected))
            total, total_tokens = total + record["nll"], total_tokens + record["tokens"]
        self.assertEqual([turn["turn"] for turn in written[1]["turns"]], [0, 2])
        self.assertIn(f"{total / total_tokens:.4f} nats per token", told)
        self.assertIn("4 dialogues, 5 responses", told)
        self.assertEmpty(error)

    @parameterized.parameters("chatml", "qwen3")
    def test_message_trees_score_each_response_after_its_own_history(self, family):
        model, parameters, tokenizer = self.save_model(family)
        messages = [
            {"id": "q", "role": "user", "content": "What is 12 x 12?"},
            {"id": "a", "parent": "q", "role": "assistant", "content": "<think>\nhm\n</think>\n\n144."},
            {"id": "b", "parent": "q", "role": "assistant", "content": "145."},
            {"id": "q2", "parent": "b", "role": "user", "content": "Sure?"},
            {"id": "c", "parent": "q2", "role": "assistant", "content": "<think>\nno\n</think>\n\n144, sorry."},
            {"id": "d", "parent": "q2", "role": "assistant", "content": "Yes."},
        ]
        ((record,), _, _) = self.score([{"id": "t", "messages": messages}])
        self.assertEqual(
            [(turn["message"], turn["turn"]) for turn in record["turns"]], [(1, 0), (2, 0), (4, 1), (5, 1)]
        )
        for path, turn in zip(([0, 1], [0, 2], [0, 2, 3, 4], [0, 2, 3, 5]), record["turns"], strict=True):
            alone = [messages[i] for i in path]
            *_, (_, _, tokens, nll) = _oracle(model, parameters, tokenizer, alone, FAMILIES[family].end_of_turn)
            self.assertEqual(turn["tokens"], tokens)
            self.assertAlmostEqual(turn["nll"], nll, delta=1e-5 * nll)

    @parameterized.product(family=("chatml", "qwen3", "mistral"), passes=("one", "k"))
    @pytest.mark.quick_every(6)
    def test_the_same_response_behind_less_history(self, family, passes):
        model, parameters, tokenizer = self.save_model(family)
        end_of_turn = FAMILIES[family].end_of_turn
        records = [_DIALOGUES[1], _DIALOGUES[3], _TREE]
        written, told, error = self.score(records, "--context=all", f"--passes={passes}")
        plain, _, _ = self.score(records, f"--passes={passes}")
        self.assertEmpty(error)
        lists = [_messages(records[0]), _messages(records[1])]
        lists += [[_TREE["messages"][0], _TREE["messages"][index]] for index in (1, 2)]
        turns = [turn for record in written for turn in record["turns"]]
        full = [turn for record in plain for turn in record["turns"]]
        expected = [(messages, *one) for messages in lists for one in _sequences(tokenizer, messages, end_of_turn)]
        # By hand: which messages are left behind the last user message, and what the templates write without any.
        last = {1: [0], 2: [0, 1], 6: [0, 5]}
        bare = {
            "chatml": "<|im_start|>assistant\n",
            "qwen3": "<|im_start|>assistant\n",
            "mistral": "<s>[INST]  [/INST]",
        }
        for turn, full_turn, (messages, index, ids, start) in zip(turns, full, expected, strict=True):
            self.assertEqual(set(turn) - set(full_turn) - {"none_follows"}, {"nll_last", "nll_none"})
            np.testing.assert_allclose(turn["nll"], full_turn["nll"], rtol=1e-5)
            plain_messages = [{"role": message["role"], "content": message["content"]} for message in messages]
            history = [plain_messages[i] for i in last[index]]
            prompts = {
                "nll_last": tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False),
                "nll_none": bare[family],
            }
            for name, prompt in prompts.items():
                prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                nll = _alone(model, parameters, [*prompt_ids, *ids[start:]])[len(prompt_ids) - 1 :].sum()
                np.testing.assert_allclose(turn[name], nll, rtol=1e-5)
            self.assertEqual(turn.get("none_follows"), "empty user message" if family == "mistral" else None)
        self.assertNotAlmostEqual(turns[1]["nll"], turns[1]["nll_last"], places=2)
        tokens = sum(turn["tokens"] for turn in turns)
        total = sum(turn["nll_none"] for turn in turns)
        self.assertIn(f"{total / tokens:.4f} nats per token, perplexity", told)
        self.assertEqual("nll_none of 5 responses is behind an empty user message" in told, family == "mistral")

    @pytest.mark.full
    def test_contexts_are_branches_of_one_tree_and_results_of_tools_stay(self):
        self.save_model("qwen3")
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
        messages = [
            {"role": "user", "content": f"{_LONG} {_LONG}"},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2."},
        ]
        scores, reads = {}, {}
        for context in ("full", "last", "none", "all"):
            ((record,), told, _) = self.score([{"messages": messages}], f"--context={context}")
            scores[context] = record["turns"]
            reads[context] = int(re.search(r"([\d,]+) tokens read", told)[1].replace(",", ""))
        self.assertEqual([set(turns[0]) & {"nll_last", "nll_none"} for turns in scores.values()], [
            set(), {"nll_last"}, {"nll_none"}, {"nll_last", "nll_none"},
        ])  # fmt: skip
        self.assertEqual(scores["last"][0]["nll_last"], scores["last"][0]["nll"])
        (short, _, _) = self.score([{"messages": messages[2:]}])
        np.testing.assert_allclose(scores["all"][1]["nll_last"], short[0]["turns"][0]["nll"], rtol=1e-5)
        # The second response is behind less twice, the first once; neither is read again with its full history.
        self.assertLess(reads["all"], 1.5 * reads["full"])
        self.assertEqual(reads["all"] - reads["full"], reads["last"] + reads["none"] - 2 * reads["full"])

    @parameterized.parameters("chatml", "qwen3")
    @pytest.mark.full
    def test_likeliest_tokens_equal_one_forward_pass_a_response(self, family):
        model, parameters, tokenizer = self.save_model(family)
        file = self.directory / "top.safetensors"
        plain, _, _ = self.score([*_DIALOGUES, _TREE])
        written, _, error = self.score([*_DIALOGUES, _TREE], "--top_k=5", f"--top_k_out={file}")
        self.assertEmpty(error)
        self.assertEqual(plain, written)
        arrays = safetensors.numpy.load_file(file)
        with safetensors.safe_open(file, "numpy") as opened:
            self.assertEqual(opened.metadata()["ids"], '["text", 7, 2, 3, "tree"]')
        lists = [(number, _messages(record)) for number, record in enumerate(_DIALOGUES)]
        lists += [(4, _TREE["messages"][:2]), (4, [_TREE["messages"][0], _TREE["messages"][2]])]
        expected = [
            (number, 2 if messages[index].get("id") == "b" else index, ids, start)
            for number, messages in lists
            for index, ids, start in _sequences(tokenizer, messages, "<|im_end|>")
        ]
        self.assertEqual(arrays["response_dialogue"].tolist(), [number for number, *_ in expected])
        self.assertEqual(arrays["response_message"].tolist(), [message for _, message, *_ in expected])
        for response, (_, _, ids, start) in enumerate(expected):
            begin, end = arrays["response_offset"][response : response + 2]
            np.testing.assert_array_equal(arrays["token"][begin:end], ids[start:])
            logs = _log_softmax(model, parameters, ids)[start - 1 :]
            top, best = arrays["top_token"][begin:end], -np.sort(-logs, axis=-1)[:, :5]
            self.assertTrue((np.diff(np.sort(top, axis=1), axis=1) > 0).all())
            np.testing.assert_allclose(np.take_along_axis(logs, top, axis=1), best, atol=1e-5)
            np.testing.assert_allclose(arrays["top_log_probability"][begin:end], best, atol=1e-5)

    def test_error_leaves_no_likeliest_tokens(self):
        self.save_model("chatml")
        file = self.directory / "top.safetensors"
        before = sorted(path.name for path in self.directory.iterdir())
        flags = "--top_k=5", f"--top_k_out={file}"
        written, _, error = self.score([_DIALOGUES[0], _DIALOGUES[0]], *flags)
        self.assertIsNone(written)
        self.assertIn("two dialogues have the id 'text'", error)
        self.assertEqual(sorted(path.name for path in self.directory.iterdir()), sorted([*before, "data.jsonl"]))
        for flags, message in (
            (("--top_k=5",), "--top_k and --top_k_out need each other"),
            ((f"--top_k_out={file}",), "--top_k and --top_k_out need each other"),
            (("--top_k=5", f"--top_k_out={self.directory}"), "is a directory; name a file"),
            (("--top_k=5000", f"--top_k_out={file}"), "top_k is 5,000; it must be 0 to 512"),
        ):
            written, _, error = self.score(_DIALOGUES, *flags)
            self.assertIsNone(written)
            self.assertIn(message, error)

    @pytest.mark.full
    def test_scores_many_dialogues_of_all_lengths_stay_in_order(self):
        self.save_model("chatml", max_length=2048)
        rng = np.random.default_rng(0)
        records = [
            {
                "id": f"number {number}",
                "messages": [
                    {"role": role, "content": "yes " * int(rng.integers(1, 60))}
                    for _ in range(int(rng.integers(1, 9)))
                    for role in ("user", "assistant")
                ],
            }
            for number in range(30)
        ]
        together, _, _ = self.score(records)
        self.assertEqual([record["id"] for record in together], [record["id"] for record in records])
        for number in (0, 17, 29):
            alone, _, _ = self.score([records[number]])
            self.assertEqual(alone[0]["tokens"], together[number]["tokens"])
            np.testing.assert_allclose(alone[0]["nll"], together[number]["nll"], rtol=1e-5)

    @parameterized.product(family=("chatml", "qwen3"), passes=("one", "k"))
    def test_turns_beyond_the_context_are_cut_counted_and_named(self, family, passes):
        model, parameters, tokenizer = self.save_model(family, max_length=80)
        # The second response alone is too long because of its reasoning; qwen3 forgets that in the third prompt.
        contents = ["Hi", "Hello!", "And?", f"<think>\n{_LONG}\n</think>\n\nyes", "So?", "No."]
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        records = [_DIALOGUES[0], {"id": "long", "messages": messages}]
        written, _, error = self.score(records, f"--passes={passes}")
        expected = _oracle(model, parameters, tokenizer, messages, "<|im_end|>")
        fitting = [entry for entry in expected if entry[1] <= 80]
        self.assertLen(fitting, {"chatml": 1, "qwen3": 2}[family])
        self.assertEqual([turn["message"] for turn in written[1]["turns"]], [entry[0] for entry in fitting])
        np.testing.assert_allclose(
            [turn["nll"] for turn in written[1]["turns"]], [entry[3] for entry in fitting], rtol=1e-5
        )
        self.assertEqual(written[1]["turns_cut"], 3 - len(fitting))
        self.assertNotIn("turns_cut", written[0])
        self.assertRegex(error, r"warning: dialogue long \(data.jsonl:2\): . responses exceed .* 80 tokens")

    def test_tree_larger_than_the_context_is_scored_in_parts(self):
        model, parameters, tokenizer = self.save_model("qwen3", max_length=128)
        messages = []
        for number in range(4):
            messages.append({"role": "user", "content": f"{number}?"})
            reasoning = "First, second, third. " * 3 + str(number)
            messages.append({"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n\n{number}."})
        written, _, _ = self.score([{"messages": messages}])
        expected = _oracle(model, parameters, tokenizer, messages, "<|im_end|>")
        self.assertLessEqual(max(length for _, length, _, _ in expected), 128)
        self.assertGreater(sum(tokens for _, _, tokens, _ in expected), 128)
        self.assertLen(written[0]["turns"], 4)
        np.testing.assert_allclose(
            [turn["nll"] for turn in written[0]["turns"]], [entry[3] for entry in expected], rtol=1e-5
        )

    def test_dialogue_with_nothing_to_score_has_a_line_without_turns(self):
        self.save_model("chatml")
        silent = [
            {"id": "asks", "messages": [{"role": "user", "content": "Hi"}]},
            {"id": "untrained", "messages": [*_DIALOGUES[0]["messages"][:1], {**_OTHER, "weight": 0}]},
        ]
        written, told, error = self.score([silent[0], _DIALOGUES[0], silent[1]])
        for record, identifier in ((written[0], "asks"), (written[2], "untrained")):
            self.assertRegex(record.pop("content"), "^[0-9a-f]{16}$")
            self.assertEqual(record, {"id": identifier, "tokens": 0, "nll": 0.0, "turns": []})
        self.assertLen(written[1]["turns"], 1)
        self.assertIn("dialogue asks (data.jsonl:1): nothing to score", error)
        self.assertIn("dialogue untrained (data.jsonl:3): nothing to score", error)
        written, told, _ = self.score(silent)
        self.assertLen(written, 2)
        self.assertIn("2 dialogues, 0 responses of 0 tokens", told)

    def test_ids_that_several_dialogues_have_are_counted(self):
        self.save_model("chatml")
        records = [{"id": identifier, "messages": [{"role": "user", "content": "Hi"}]} for identifier in "abbab"]
        written, _, error = self.score(records)
        self.assertLen(written, 5)
        self.assertIn("warning: 2 ids, such as 'a', belong to several dialogues; dialog_jax select would stop", error)
        _, _, error = self.score(records[:2])
        self.assertNotIn("belong to several dialogues", error)

    def test_error_leaves_what_was_there_and_nothing_half_written(self):
        self.save_model("chatml")
        before = sorted(path.name for path in self.directory.iterdir())
        written, told, error = self.score([_DIALOGUES[0], '{"messages": [{"role": "user", "content": "Hi"}'])
        self.assertIsNone(written)
        self.assertEmpty(told)
        self.assertRegex(error, r"dialog_jax score: data\.jsonl:2: not JSON")
        self.assertEqual(sorted(path.name for path in self.directory.iterdir()), sorted([*before, "data.jsonl"]))
        self.out.write_text('{"id": "earlier"}\n')
        written, _, error = self.score([{"messages": [{"role": "bot", "content": "Hi"}]}])
        self.assertEqual(written, [{"id": "earlier"}])
        self.assertIn("role 'bot'", error)

    @parameterized.parameters("one", "k")
    def test_bad_records_are_left_out_counted_and_listed_if_the_config_says_so(self, passes):
        self.save_model("gemma")
        refused = {"id": "refused", "messages": [{"role": "system", "content": "a"}, *_DIALOGUES[0]["messages"]]}
        records = [_DIALOGUES[0], "{", refused, {**_DIALOGUES[3], "id": "last"}]
        written, told, _ = self.score(records, "--config.data.on_error=skip", f"--passes={passes}")
        self.assertEqual([record["id"] for record in written], ["text", "last"])
        listed = self.out.with_name("scores.skipped.txt").read_text().splitlines()
        self.assertLen(listed, 2)
        self.assertStartsWith(listed[0], "data.jsonl:2: not JSON")
        self.assertRegex(listed[1], r"^dialogue refused \(data\.jsonl:3\): .*System role not supported")
        self.assertIn("2 records skipped because of errors, all listed in", told)

    @parameterized.parameters("one", "k")
    def test_weights_that_are_not_finite_are_an_error_that_names_the_dialogue(self, passes):
        model, parameters, tokenizer = self.save_model("chatml")
        parameters["final_norm"] = parameters["final_norm"].at[3].set(jnp.nan)
        shutil.rmtree(self.directory / "model")
        saving.save_pretrained(self.directory / "model", model, parameters, tokenizer=tokenizer)
        written, _, error = self.score(_DIALOGUES[:1], f"--passes={passes}")
        self.assertIsNone(written)
        self.assertRegex(error, r"dialogue text \(data.jsonl:1\): the loss of message 1 is nan")

    @parameterized.parameters("one", "k")
    def test_template_and_its_variables_are_used(self, passes):
        model, parameters, tokenizer = self.save_model("chatml")
        template = "{% for m in messages %}{{ m.role + word + m.content + '<|im_end|>' }}{% endfor %}"
        template += "{% if add_generation_prompt %}{{ 'assistant' + word }}{% endif %}"
        flags = (
            f"--config.data.chat_template={template}",
            '--config.data.chat_template_kwargs={"word": ": "}',
            f"--passes={passes}",
        )
        written, _, _ = self.score([_DIALOGUES[0]], *flags)
        prompt, response = "user: Hi<|im_end|>assistant: ", "Hello! 🙂<|im_end|>"
        ids = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        self.assertEqual(written[0]["tokens"], len(ids) - start)
        expected = _alone(model, parameters, ids)[start - 1 :].sum()
        np.testing.assert_allclose(written[0]["nll"], expected, rtol=1e-5)
        _, _, error = self.score([_DIALOGUES[0]], "--config.data.chat_template_kwargs={word")
        self.assertIn("--config.data.chat_template_kwargs is '{word'; needed a dict", error)


class BatchesTest(parameterized.TestCase):
    @parameterized.parameters(2048, 3000, 8192)
    def test_every_tree_is_in_one_row_and_few_shapes_occur(self, context):
        rng = np.random.default_rng(0)
        sizes = np.minimum(rng.lognormal(6, 1.2, 400).astype(int) + 2, context)
        spans = [prefix_tree.Span(size // 2, size, 1.0, 0) for size in sizes]
        trees = [
            prefix_tree.build_tree([(np.arange(size, dtype=np.int32), [span])])
            for size, span in zip(sizes, spans, strict=True)
        ]
        seen, shapes, room = [], set(), 0
        for length, rows in tree_scores.make_batches(dataset.concatenate_trees(trees), context, 4096):
            shapes.add((length, len(rows)))
            room += length * len(rows)
            for row in rows:
                self.assertLessEqual(sizes[row].sum(), length)
                seen += row
        self.assertCountEqual(seen, range(400))
        self.assertLess(len(shapes), 7)
        self.assertLess(max(length for length, _ in shapes), context + 1)
        self.assertGreater(sizes.sum() / room, 0.9)


if __name__ == "__main__":
    absltest.main()
