"""Figures and findings of a file against `apply_chat_template`, called once a prompt and a response, and by hand."""

import json
import subprocess
import sys

import numpy as np
import tokenizers
from absl.testing import absltest, parameterized

from dialog_jax.audit import figures as audit
from dialog_jax.dialogues import parsing
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.parsing import parse_dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering import sequences as sequences_lib
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.rendering import chat_templates, unwritten_records
from tests.rendering.chat_templates import FAMILIES


def said(*messages, id=0):
    """A dialogue of (role, content) or (role, content, weight)."""
    made = [Message(role=role, content=content, weight=float(*weight or [1])) for role, content, *weight in messages]
    return Dialogue(id=id, messages=tuple(made), where=f"said.jsonl:{id + 1}")


def fresh(family, template=None):
    """A tokenizer that a test may change."""
    tokenizer = chat_templates.train_tokenizer.__wrapped__(family)
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def look(records, tokenizer, *, max_length=100_000, on_error="stop", **objective):
    if isinstance(tokenizer, str):
        tokenizer = chat_templates.train_tokenizer(tokenizer)
    return audit.make_audit(
        records,
        tokenizer,
        sequences_lib.Renderer(tokenizer),
        TreeConfig(objective=ObjectiveConfig(**objective), max_length=max_length, on_error=on_error),
    )


def found(result):
    """{kind: (level, count, among)}"""
    return {finding.kind: (finding.level, finding.count, finding.among) for finding in result.findings}


def first(result, kind):
    return next(finding.first for finding in result.findings if finding.kind == kind)


def official(tokenizer, dialogue, count, *, prompt=False):
    messages = [message.as_dict() for message in dialogue.messages[:count]]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    return text, tokenizer.encode(text, add_special_tokens=False)


def oracle(tokenizer, dialogue, end):
    """(prompt ids, response ids, kinds of seam) of each trained response of a byte-level tokenizer, from transformers.

    The seams are those between a response and its prompt, and between it and the next trained response's prompt.
    """
    responses = [i for i, message in enumerate(dialogue.messages) if message.role == "assistant" and message.weight]
    for index, later in zip(responses, [*responses[1:], None], strict=False):
        shown, prompt = official(tokenizer, dialogue, index, prompt=True)
        text, _ = official(tokenizer, dialogue, index + 1)
        if end.strip():
            text = text[: text.rindex(end) + len(end)]
        together = tokenizer.encode(text, add_special_tokens=False)
        kinds = set()
        if together[: len(prompt)] == prompt:
            response = together[len(prompt) :]
        else:
            kinds.add("prompt")
            response = tokenizer.encode(text[len(shown) :], add_special_tokens=False)
        if later is not None:
            following, ids = official(tokenizer, dialogue, later, prompt=True)
            if not following.startswith(text):
                kinds.add("history")
            elif ids[: len(together)] != together:
                kinds.add("next")
        yield prompt, response, kinds


def tree_size(sequences):
    return len({tuple(ids[:i]) for ids in sequences for i in range(1, len(ids) + 1)})


class ResponsesTest(parameterized.TestCase):
    """Responses that are not rendered as recorded, and those that cannot be rendered at all."""

    R1 = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"
    )

    def dialogues(self):
        think = "<think>\nEasy.</think>2"
        return [said(("user", "?"), ("assistant", think), id=0), said(("assistant", "b"), ("user", "c"), id=1)]

    @parameterized.parameters(("stop", "error", ""), ("skip", "warning", "_skipped"))
    def test_dialogues_that_only_verbatim_trains_are_named_apart_from_others(self, on_error, level, suffix):
        result = look(self.dialogues(), fresh("chatml", self.R1), on_error=on_error)
        self.assertEqual(found(result)[f"needs_verbatim{suffix}"], (level, 1, 2))
        self.assertEqual(found(result)[f"refused{suffix}"], (level, 1, 2))
        self.assertStartsWith(first(result, f"needs_verbatim{suffix}")[0], "dialogue 0 (said.jsonl:1): with message 1 ")

    def test_with_verbatim_they_are_trained(self):
        tokenizer = fresh("chatml", self.R1)
        renderer = sequences_lib.Renderer(tokenizer, responses="verbatim")
        more = [said(("user", "?"), ("assistant", "a</think>b"), ("user", "!"), ("assistant", "c"), id=2)]
        result = audit.make_audit([*self.dialogues(), *more], tokenizer, renderer, TreeConfig(max_length=1000))
        self.assertEqual(result.trees, 2)
        self.assertEqual(set(found(result)) & {"needs_verbatim", "refused"}, {"refused"})
        self.assertEqual(result.not_verbatim, 0)
        self.assertIn("was generated '<think>\\na</think>b<|im_end|>', but the prompt", first(result, "history")[0])

    def test_responses_that_are_rendered_differently_from_what_is_recorded_are_counted(self):
        dialogue = said(("user", "?"), ("assistant", "a "), ("user", "!"), ("assistant", "b"))
        result = look([dialogue], "llama3")
        self.assertEqual((result.not_verbatim, result.responses), (1, 2))
        self.assertEqual(result.first_not_verbatim, ["dialogue 0 (said.jsonl:1): message 1"])
        self.assertEqual(look([dialogue], "chatml").not_verbatim, 0)

    def test_prompts_that_change_once_their_response_follows_are_counted(self):
        template = (
            "{% for m in messages if m.role != 'system' %}<|im_start|>{{ messages[0].content if loop.last and "
            "m.role == 'user' and messages[0].role == 'system' }}{{ m.content }}<|im_end|>{% endfor %}"
            "{{ '<|im_start|>' if add_generation_prompt }}"
        )
        dialogues = [
            said(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            said(("user", "a"), ("assistant", "b"), id=1),
        ]
        result = look(dialogues, fresh("chatml", template))
        self.assertEqual(found(result)["prompt_changed"], ("note", 1, 2))
        self.assertEqual(first(result, "prompt_changed"), ["dialogue 0 (said.jsonl:1): message 2"])


class UnwrittenTest(parameterized.TestCase):
    """What records say and the template does not write; `tests/trees/dataset_test.py` has the same for training."""

    @parameterized.parameters(("stop", "error", ""), ("skip", "warning", "_skipped"))
    def test_a_call_of_which_nothing_is_written_is_named(self, on_error, level, suffix):
        records = list(parsing.parse_records([unwritten_records.CALL_RECORD, unwritten_records.HELLO_RECORD]))
        result = look(records, "chatml", on_error=on_error)
        self.assertEqual(found(result)[f"lost{suffix}"], (level, 1, 2))
        (place,) = first(result, f"lost{suffix}")
        self.assertStartsWith(place, "dialogue 0 (records[0]): message 1: the chat template writes nothing of what ")
        self.assertIn("tool_calls (call 'tide'); the response would be '<|im_end|>'", place)
        self.assertEqual(result.trees, 1)

    def test_each_kind_is_counted_and_named(self):
        records = list(parsing.parse_records(unwritten_records.RECORDS))
        result = look(records, fresh("chatml", unwritten_records.CUTTING_TEMPLATE))
        self.assertEqual(
            {kind: entry for kind, entry in found(result).items() if kind.endswith("_written")},
            {
                "content_not_written": ("warning", 1, 6),
                "reasoning_not_written": ("warning", 2, 6),
                "tool_calls_not_written": ("warning", 1, 6),
                "tools_not_written": ("warning", 1, 5),
                "message_not_written": ("warning", 1, 12),
            },
        )
        for kind, places in unwritten_records.PLACES.items():
            self.assertEqual(first(result, f"{kind}_not_written"), places)

    def test_with_verbatim_nothing_of_contents_and_reasoning_is_missing(self):
        tokenizer = fresh("chatml", unwritten_records.CUTTING_TEMPLATE)
        renderer = sequences_lib.Renderer(tokenizer, responses="verbatim")
        records = [*unwritten_records.RECORDS[:2], unwritten_records.RECORDS[3]]
        result = audit.make_audit(parsing.parse_records(records), tokenizer, renderer, TreeConfig(max_length=1000))
        self.assertFalse([kind for kind in found(result) if kind.endswith("_written")])

    def test_an_answer_inside_the_reasoning_that_the_prompt_begins_is_a_warning(self):
        template = chat_templates.TEMPLATES["chatml"].replace("assistant\\n", "assistant\\n<think>\\n")
        tokenizer = fresh("chatml", template)
        contents = "42", "<think>\nSix.\n</think>\n\n42"
        records = [{"prompt": f"{n}?", "completion": content} for n, content in enumerate(contents)]
        renderer = sequences_lib.Renderer(tokenizer, responses="verbatim")
        result = audit.make_audit(parsing.parse_records(records), tokenizer, renderer, TreeConfig(max_length=1000))
        self.assertEqual(found(result)["reasoning_end_not_written"], ("warning", 1, 2))
        self.assertEqual(
            first(result, "reasoning_end_not_written"),
            ["dialogue 0 (records[0]): message 1: its prompt ends with <think>"],
        )

    def test_reasoning_alone_is_not_called_empty(self):
        message = {"role": "assistant", "content": "", "reasoning_content": "Six."}
        record = {"messages": [{"role": "user", "content": "?"}, message]}
        template = chat_templates.TEMPLATES["chatml"].replace(
            "message.content", "message.content + (message.reasoning_content or '')"
        )
        self.assertEqual(found(look(parsing.parse_records([record]), fresh("chatml", template))), {})


class FiguresTest(parameterized.TestCase):
    @parameterized.parameters("chatml", "llama3", "qwen3", "phi3")
    def test_figures_equal_those_of_k_separate_passes(self, family):
        tokenizer, end = chat_templates.train_tokenizer(family), FAMILIES[family].end_of_turn
        rng = np.random.default_rng(3)
        dialogues = [
            chat_templates.random_dialogue(rng, turns=1 + i % 6, reasoning=i % 2 == 0, weights=True, id=i)
            for i in range(40)
        ]
        expected = [list(oracle(tokenizer, dialogue, end)) for dialogue in dialogues]
        trained = [sequences for sequences in expected if sequences]
        self.assertLess(len(trained), len(expected))
        responses = [response for sequences in trained for _, response, _ in sequences]
        result = look(dialogues, family)
        sizes = [tree_size([prompt + response for prompt, response, _ in sequences]) for sequences in trained]
        self.assertEqual(result.trees, len(trained))
        self.assertEqual(result.responses, len(responses))
        self.assertEqual(
            result.untrained, sum(m.role == "assistant" and not m.weight for d in dialogues for m in d.messages)
        )
        self.assertEqual(result.tokens, sum(sizes))
        self.assertEqual(
            result.k_pass_tokens, sum(len(prompt) + len(response) for s in trained for prompt, response, _ in s)
        )
        self.assertEqual(result.targets, sum(map(len, responses)))
        self.assertEqual(result.last_targets, {end: len(responses)})
        self.assertEqual(result.end_of_turn, end)
        changed = [any("history" in kinds for *_, kinds in sequences) for sequences in trained]
        self.assertEqual(result.changed, sum(changed))
        self.assertEqual(any(changed), family == "qwen3")
        for spread, values in (
            (result.dialogue_tokens, sizes),
            (result.response_tokens, list(map(len, responses))),
            (result.responses_each, list(map(len, trained))),
        ):
            values.sort()
            self.assertEqual(spread.longest, values[-1])
            self.assertEqual(spread.median, values[(len(values) + 1) // 2 - 1])
            self.assertEqual(spread.most, values[-(-len(values) * 95 // 100) - 1])

    @parameterized.parameters(
        {"name": "conditional"},
        {"name": "last"},
        {"name": "joint"},
        {"name": "roles", "roles": ("user",)},
        {"name": "conditional", "turn_weights": (0.0, 1.0)},
    )
    def test_every_objective_has_the_trees_that_training_prepares(self, **objective):
        rng = np.random.default_rng(1)
        dialogues = [chat_templates.random_dialogue(rng, turns=1 + i % 4, reasoning=True, id=i) for i in range(12)]
        dialogues.append(parse_dialogue({"prompt": "Hi", "continuations": ["a", "b c", "d"]}, index=12, where=""))
        renderer = sequences_lib.Renderer(chat_templates.train_tokenizer("qwen3"))
        trees = dataset.prepare(
            dialogues, renderer, TreeConfig(objective=ObjectiveConfig(**objective), max_length=100_000)
        )
        result = look(dialogues, "qwen3", **objective)
        self.assertEqual(
            (result.trees, result.tokens, result.targets, result.responses),
            (len(trees), trees.report.tokens, trees.report.targets, trees.report.turns),
        )

    def test_tokens_by_role_are_those_of_the_contents(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        dialogue = said(
            ("system", "Be kind."),
            ("user", "How are you?"),
            ("assistant", "I am fine.", 0),
            ("user", "12 x 12"),
            ("assistant", "The answer is 144."),
            ("user", "What follows the last response is not in the tree."),
        )
        result = look([dialogue], "chatml")

        def count(text):
            return len(tokenizer.encode(text, add_special_tokens=False))

        own = {
            "system": count("Be kind."),
            "user": count("How are you?") + count("12 x 12"),
            "assistant": count("I am fine."),
            "responses": count("The answer is 144.") + 1,
        }
        whole, _ = official(tokenizer, dialogue, 5)
        rest = count(whole.removesuffix("\n")) - sum(own.values())
        self.assertEqual(result.roles, {**own, "rest": rest})
        self.assertEqual(sum(result.roles.values()), result.tokens)
        self.assertEqual(found(result), {"unanswered": ("note", 1, 1)})

    def test_continuations_are_counted_once_and_branch_without_a_finding(self):
        record = {"prompt": "How are you?", "continuations": ["fine, thank you", "Hello!", "The answer is yes."]}
        tokenizer = chat_templates.train_tokenizer("chatml")
        dialogue = parse_dialogue(record, index=0, where="said.jsonl:1")
        lists = [said(("user", "How are you?"), ("assistant", text)) for text in record["continuations"]]
        sequences = [ids + more for one in lists for ids, more, _ in oracle(tokenizer, one, "<|im_end|>")]
        result = look([dialogue], "chatml")
        self.assertEqual(result.tokens, tree_size(sequences))
        self.assertEqual(result.k_pass_tokens, sum(map(len, sequences)))
        self.assertEqual((result.responses, result.changed), (3, 0))
        self.assertEmpty(result.findings)

    def test_json_has_every_figure(self):
        dialogue = said(("user", "Hi"), ("assistant", "Hello!"))
        record = json.loads(json.dumps(audit.dataclasses.asdict(look([dialogue], "chatml"))))
        self.assertEqual((record["dialogues"], record["responses"], record["findings"]), (1, 1, []))
        self.assertEqual(record["dialogue_tokens"]["where"], "dialogue 0 (said.jsonl:1)")


class SeamsTest(parameterized.TestCase):
    def check(self, tokenizer, dialogues, end):
        """The counts of all seams, which must be those of the oracle."""
        expected = [list(oracle(tokenizer, dialogue, end)) for dialogue in dialogues]
        kinds = [kinds for sequences in expected for *_, kinds in sequences]
        result = look(dialogues, tokenizer)
        counts = {kind: count for kind, (_, count, _) in found(result).items()}
        self.assertEqual(counts.get("prompt", 0), sum("prompt" in some for some in kinds))
        self.assertEqual(counts.get("next", 0), sum("next" in some and "prompt" not in some for some in kinds))
        self.assertEqual(counts.get("history", 0), sum(any("history" in some for *_, some in one) for one in expected))
        return result, counts

    @parameterized.parameters("chatml", "llama3", "qwen3", "phi3", "plain")
    def test_random_dialogues_have_the_seams_of_separate_renderings(self, family):
        rng = np.random.default_rng(5)
        dialogues = [
            chat_templates.random_dialogue(rng, turns=1 + i % 4, reasoning=i % 3 == 0, id=i) for i in range(30)
        ]
        end = FAMILIES[family].end_of_turn
        _, counts = self.check(chat_templates.train_tokenizer(family), dialogues, end)
        self.assertEqual("prompt" in counts, family != "qwen3")  # by contents that begin with white space
        self.assertEqual("history" in counts, family == "qwen3")

    @parameterized.parameters("gemma", "mistral")
    def test_sentencepiece_families_have_the_seams_of_separate_renderings(self, family):
        tokenizer, rng = chat_templates.train_tokenizer(family), np.random.default_rng(6)
        dialogues = [chat_templates.random_dialogue(rng, turns=1 + i % 4, id=i) for i in range(20)]
        crossing = 0
        for dialogue in dialogues:
            for index in range(1, len(dialogue.messages), 2):
                _, prompt = official(tokenizer, dialogue, index, prompt=True)
                _, together = official(tokenizer, dialogue, index + 1)
                crossing += together[: len(prompt)] != prompt
        kinds = found(look(dialogues, family))
        self.assertEqual(kinds.get("prompt", (0, 0, 0))[1], crossing)
        self.assertEqual(crossing > 0, family == "gemma")
        self.assertNoCommonElements(kinds, ("next", "history"))

    def test_reasoning_that_history_drops_is_shown_as_text(self):
        dialogue = said(
            ("user", "Hi"),
            ("assistant", "<think>\nI greet.\n</think>\n\nHello!"),
            ("user", "And you?"),
            ("assistant", "fine"),
            id=4,
        )
        result, _ = self.check(chat_templates.train_tokenizer("qwen3"), [dialogue], "<|im_end|>")
        (told,) = first(result, "history")
        self.assertEqual(
            told,
            "dialogue 4 (said.jsonl:5): message 1: after 'm_end|>\\n<|im_start|>assistant\\n' was generated "
            "'<think>\\nI greet.\\n</think>\\n\\nHello!<|im_end|>\\n', but the prompt of message 3 has "
            "'Hello!<|im_end|>\\n<|im_start|>user\\nAnd you?<|im_end'",
        )
        self.assertEqual(found(result)["history"], ("note", 1, 1))

    def test_token_that_crosses_from_prompt_to_response_is_shown_as_text(self):
        dialogue = said(("user", "a b c d"), ("assistant", "are you?"))
        result, counts = self.check(chat_templates.train_tokenizer("plain"), [dialogue], "\n")
        self.assertEqual(counts["prompt"], 1)
        self.assertEqual(
            first(result, "prompt"), ["dialogue 0 (said.jsonl:1): message 1: ' a b c d\\nAssistant: ' + 'are you?\\n'"]
        )

    def test_token_that_crosses_from_response_to_the_next_message_is_shown_as_text(self):
        template = (
            "{% for m in messages %}{{ '<|im_start|>' if m.role == 'assistant' else 'you: ' }}{{ m.content }}"
            "{{ ' ' if m.role == 'assistant' else '' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
        )
        dialogue = said(("user", "a"), ("assistant", "fine"), ("user", "b"), ("assistant", "thank you"))
        result, counts = self.check(fresh("chatml", template), [dialogue], "")
        self.assertEqual(counts["next"], 1)
        self.assertEqual(
            first(result, "next"),
            ["dialogue 0 (said.jsonl:1): message 1: ': a<|im_start|>fine ' + 'you: b<|im_start|>'"],
        )


class FindingsTest(parameterized.TestCase):
    def test_clean_data_has_none(self):
        dialogues = [said(("user", f"{i}"), ("assistant", "Hello!"), id=i) for i in range(3)]
        for family in ("chatml", "gemma", "mistral", "qwen3", "phi3"):
            self.assertEmpty(look(dialogues, family).findings, family)

    def test_bos_written_twice_is_an_error(self):
        dialogue = said(("user", "Hi"), ("assistant", "Hello!"))
        once = look([dialogue], "gemma")
        self.assertEqual((once.bos, once.bos_written, once.bos_added), ("<bos>", 1, False))
        self.assertEmpty(once.findings)
        twice = look([dialogue], fresh("gemma", "{{ bos_token }}" + chat_templates.TEMPLATES["gemma"]))
        self.assertEqual(found(twice), {"doubled_bos": ("error", 1, 1)})
        self.assertEqual(twice.bos_written, 1)

    def test_bos_that_only_the_tokenizer_writes_is_a_warning(self):
        tokenizer = fresh("gemma", chat_templates.TEMPLATES["gemma"].replace("{{- bos_token -}}", ""))
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
        result = look([said(("user", "Hi"), ("assistant", "Hello!"))], tokenizer)
        self.assertEqual((result.bos_written, result.bos_added), (0, True))
        self.assertEqual(found(result), {"missing_bos": ("warning", 1, 0)})
        tokenizer.chat_template = chat_templates.TEMPLATES["gemma"]
        result = look([said(("user", "Hi"), ("assistant", "Hello!"))], tokenizer)
        self.assertEqual((result.bos_written, result.bos_added), (1, True))
        self.assertEmpty(result.findings)

    def test_response_without_end_of_turn_is_named_with_what_ends_it(self):
        template = chat_templates.TEMPLATES["chatml"].replace(
            "+ '<|im_end|>\\n'", "+ ('' if 'open' in message.content else '<|im_end|>') + '\\n'"
        )
        dialogue = said(("user", "Hi"), ("assistant", "Hello!"), ("user", "a"), ("assistant", "open"), id=2)
        result = look([dialogue], fresh("chatml", template))
        self.assertEqual(result.last_targets, {"<|im_end|>": 1, "\n": 1})
        self.assertEqual(found(result), {"end_untrained": ("warning", 1, 2)})
        self.assertEqual(first(result, "end_untrained"), ["dialogue 2 (said.jsonl:3): message 3 ends with '\\n'"])

    def test_part_of_weight_0_at_the_end_leaves_the_end_of_turn_trained(self):
        record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [
            {"type": "text", "text": "Hello! "}, {"type": "text", "text": "How?", "weight": 0}]}]}  # fmt: skip
        result = look([parse_dialogue(record, index=0, where="")], "chatml")
        self.assertEqual(result.last_targets, {"<|im_end|>": 1})

    def test_template_without_end_of_turn_is_a_warning(self):
        result = look([said(("user", "Hi"), ("assistant", "Hello!"))], "plain")
        self.assertIsNone(result.end_of_turn)
        self.assertEqual(found(result)["no_end_of_turn"], ("warning", 1, 0))

    def test_bad_records_are_counted_and_named_and_the_rest_is_looked_at(self):
        good = [said(("user", f"{i}"), ("assistant", "Hello!"), id=i) for i in range(2)]
        refused = said(("user", "a"), ("user", "b"), ("assistant", "c"), id=7)
        result = look([good[0], UserError("x.jsonl:2: not JSON"), refused, good[1]], "gemma")
        self.assertEqual((result.records, result.dialogues, result.trees), (4, 2, 2))
        self.assertEqual(found(result), {"unreadable": ("error", 1, 4), "refused": ("error", 1, 4)})
        skipped = look([good[0], UserError("x.jsonl:2: not JSON"), refused, good[1]], "gemma", on_error="skip")
        self.assertEqual(
            found(skipped), {"unreadable_skipped": ("warning", 1, 4), "refused_skipped": ("warning", 1, 4)}
        )
        self.assertEqual(first(result, "unreadable"), ["x.jsonl:2: not JSON"])
        self.assertRegex(first(result, "refused")[0], r"^dialogue 7 \(said.jsonl:8\): .*roles must alternate")
        self.assertEqual(look(good, "gemma").tokens, result.tokens)

    def test_dialogues_without_a_target_are_named(self):
        dialogues = [
            said(("user", "Hi"), id=0),
            said(("user", "Hi"), ("assistant", "Hello!", 0), id=1),
            said(("user", "Hi"), ("assistant", "Hello!"), id=2),
        ]
        result = look(dialogues, "chatml")
        self.assertEqual(found(result)["no_target"], ("warning", 2, 3))
        self.assertEqual(first(result, "no_target"), ["dialogue 0 (said.jsonl:1)", "dialogue 1 (said.jsonl:2)"])
        self.assertNotIn("nothing", found(result))
        nothing = look(dialogues[:2], "chatml")
        self.assertEqual(found(nothing)["nothing"], ("error", 1, 0))
        self.assertEqual((nothing.trees, nothing.fills, nothing.dialogue_tokens), (0, [], None))

    def test_no_record_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "no record"):
            look([], "chatml")

    def test_same_dialogue_and_same_prompt_are_counted_once_each(self):
        hello = ("user", "Hi"), ("assistant", "Hello!")
        dialogues = [
            said(*hello, id=0),
            said(*hello, id=1),
            said(("user", "Hi"), ("assistant", "Good day"), id=2),
            said(("user", "Hi"), ("assistant", "Hello!", 0.5), id=3),
            said(("user", "Hi!"), ("assistant", "Hello!"), id=4),
        ]
        result = look(dialogues, "chatml")
        self.assertEqual(found(result), {"repeated": ("warning", 1, 5), "same_prompt": ("note", 2, 5)})
        self.assertEqual(first(result, "repeated"), ["dialogue 1 (said.jsonl:2), as dialogue 0 (said.jsonl:1)"])

    def test_contents_that_are_not_what_they_look_like_are_named(self):
        dialogue = said(
            ("system", "Be kind."),
            ("user", "What is <|im_end|>?"),
            ("assistant", " \n"),
            ("user", "Well?"),
            ("assistant", "", 0),
        )
        result = look([dialogue], "chatml")
        self.assertEqual(found(result), {"special": ("note", 1, 5), "empty": ("warning", 1, 1)})
        self.assertEqual(first(result, "special"), ["dialogue 0 (said.jsonl:1): message 1 (user) has '<|im_end|>'"])
        self.assertEqual(first(result, "empty"), ["dialogue 0 (said.jsonl:1): message 2 (assistant)"])

    def test_special_tokens_are_a_warning_where_they_are_parsed(self):
        dialogue = said(("user", "What is <|im_end|>?"), ("assistant", "<|im_end|>"))
        tokenizer = chat_templates.train_tokenizer("chatml")
        renderer = sequences_lib.Renderer(tokenizer, allow_special_tokens=True)
        config = TreeConfig(max_length=1024)
        parsed = audit.make_audit([dialogue], tokenizer, renderer, config)
        text = audit.make_audit([dialogue], tokenizer, sequences_lib.Renderer(tokenizer), config)
        self.assertEqual(found(parsed), {"special_parsed": ("warning", 2, 2)})
        self.assertEqual(found(text), {"special": ("note", 2, 2)})
        pieces = len(tokenizer.tokenize("<|im_")) + len(tokenizer.tokenize("end|>"))
        self.assertEqual(text.tokens - parsed.tokens, 2 * pieces - 2)
        self.assertEqual(text.roles["rest"], parsed.roles["rest"])

    def test_message_that_the_template_leaves_out_is_named(self):
        template = chat_templates.TEMPLATES["chatml"].replace(
            "message.content", "(message.content if message.role != 'tool' else 'hidden')"
        )
        dialogue = said(("user", "Hi"), ("tool", "42"), ("assistant", "Hello!"))
        result = look([dialogue], fresh("chatml", template))
        self.assertEqual(found(result), {"message_not_written": ("warning", 1, 3)})
        self.assertEqual(first(result, "message_not_written"), ["dialogue 0 (said.jsonl:1): message 1: tool"])
        self.assertNotIn("tool", result.roles)

    def test_places_are_kept_for_the_first_ten_only(self):
        dialogues = [said(("user", "Hi"), id=i) for i in range(30)]
        result = look(dialogues, "chatml")
        self.assertLen(first(result, "no_target"), 10)
        self.assertEqual(found(result)["no_target"], ("warning", 30, 30))


class ImportTest(absltest.TestCase):
    def test_audit_starts_without_jax(self):
        code = "import sys, dialog_jax.audit.figures; print([m for m in ('jax', 'torch') if m in sys.modules])"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        self.assertEqual(told.stdout.strip(), "[]")


if __name__ == "__main__":
    absltest.main()
