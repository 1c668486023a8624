"""Sequences against the tokenizer's own `apply_chat_template`, called once for each prompt and each response."""

import dataclasses
import itertools
import pickle
from unittest import mock

import numpy as np
import pytest
import tokenizers
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message, Part
from dialog_jax.rendering import sequences as sequences_lib
from dialog_jax.rendering import special_tokens, template_process
from dialog_jax.rendering.token_spans import MessageSpan
from dialog_jax.rendering.virtual_tokens import VirtualTokens
from tests.rendering import chat_templates
from tests.rendering.chat_templates import FAMILIES

_TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def said(*messages, id=0, tools=None):
    """A dialogue of (role, content) or (role, content, weight)."""
    made = [Message(role=role, content=content, weight=float(*weight or [1])) for role, content, *weight in messages]
    return Dialogue(id=id, messages=tuple(made), tools=tools, where=f"said.jsonl:{id + 1}")


def renderer_of(family, **kwargs):
    return sequences_lib.Renderer(chat_templates.train_tokenizer(family), chat_template_kwargs=kwargs)


def with_template(family, template):
    tokenizer = chat_templates.train_tokenizer.__wrapped__(family)
    tokenizer.chat_template = template
    return tokenizer


def render(renderer, dialogue, **options):
    (sequences,) = renderer.render([dialogue], **options)
    return list(sequences)


def official(tokenizer, dialogue, count, *, prompt=False, **kwargs):
    """(ids, text) of the first `count` messages, from transformers."""
    messages = [message.as_dict() for message in dialogue.messages[:count]]
    kwargs = dict(tools=list(dialogue.tools) if dialogue.tools else None, add_generation_prompt=prompt, **kwargs)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, **kwargs)["input_ids"]
    return ids, tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


class Law6(parameterized.TestCase):
    """Prompt and response are what inference sees and would have to write."""

    def check(self, tokenizer, dialogue, end_of_turn, sequences, **kwargs):
        responses = [i for i, m in enumerate(dialogue.messages) if m.role == "assistant"]
        supervised = [i for i in responses if dialogue.messages[i].weight > 0]
        self.assertEqual([sequence.message_index for sequence in sequences], supervised)
        for sequence in sequences:
            self.assertEqual(sequence.turn, responses.index(sequence.message_index))
            prompt, _ = official(tokenizer, dialogue, sequence.message_index, prompt=True, **kwargs)
            ids, text = official(tokenizer, dialogue, sequence.message_index + 1, **kwargs)
            self.assertEqual(sequence.tokens[: sequence.start].tolist(), prompt)
            decoded = tokenizer.decode(sequence.tokens, skip_special_tokens=False)
            self.assertStartsWith(text, decoded)
            self.assertEndsWith(decoded, end_of_turn)
            self.assertIn(text.removeprefix(decoded), ("", "\n", "\n<|endoftext|>"))
            if ids[: len(prompt)] == prompt:  # then inference would write what a tokenizer makes of the whole
                self.assertEqual(sequence.tokens.tolist(), ids[: len(sequence.tokens)])

    @parameterized.parameters(*itertools.product(FAMILIES, range(8)))
    def test_random_dialogues_are_rendered_as_inference_sees_them(self, family, seed):
        tokenizer, rng = chat_templates.train_tokenizer(family), np.random.default_rng(seed)
        dialogues = [
            chat_templates.random_dialogue(
                rng,
                turns=turns,
                system=FAMILIES[family].system_role and bool(rng.integers(2)),
                reasoning=family == "qwen3" and seed % 2 == 0,
                weights=seed % 4 == 3,
                id=turns,
            )
            for turns in range(1, 8)
        ]
        rendered = renderer_of(family).render(dialogues)
        for dialogue, sequences in zip(dialogues, rendered, strict=True):
            self.check(tokenizer, dialogue, FAMILIES[family].end_of_turn, list(sequences))

    @parameterized.parameters(*FAMILIES)
    def test_special_tokens_in_contents_that_are_allowed_do_not_end_the_response(self, family):
        end = FAMILIES[family].end_of_turn
        eos = FAMILIES[family].eos
        dialogue = said(
            ("user", f"What is {end}?"),
            ("assistant", f"It is {end} of course, or {eos}, say."),
            ("user", f"{eos}{end}"),
            ("assistant", f"{end}"),
            ("user", "Go on."),
            ("assistant", f"{eos} a"),
        )
        tokenizer = chat_templates.train_tokenizer(family)
        renderer = sequences_lib.Renderer(tokenizer, allow_special_tokens=True)
        self.check(tokenizer, dialogue, end, render(renderer, dialogue))

    @parameterized.parameters("chatml", "llama3", "plain", "phi3")
    def test_irregular_dialogues_are_rendered_as_inference_sees_them(self, family):
        for dialogue in (
            said(
                ("system", "Write."), ("assistant", "Once upon a time"), ("assistant", " there was"), ("user", "Stop")
            ),
            said(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d", 0), ("assistant", "e")),
            said(("assistant", "Hi!", 0), ("user", "a"), ("assistant", "")),
            said(("user", ""), ("assistant", "\n"), ("user", "\n"), ("assistant", " "), ("user", "trailing")),
        ):
            end = FAMILIES[family].end_of_turn
            self.check(chat_templates.train_tokenizer(family), dialogue, end, render(renderer_of(family), dialogue))

    def test_tool_calls_tool_answers_and_tools_reach_the_template(self):
        call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": 2}}}
        thought = {"reasoning_content": "I add."}
        dialogue = Dialogue(
            id=0,
            messages=(
                Message(role="system", content="Be kind."),
                Message(role="user", content="1 + 2?"),
                Message(role="assistant", content="", fields={"tool_calls": [call], **thought}),
                Message(role="tool", content="3"),
                Message(role="assistant", content="It is 3.", fields=thought),
                Message(role="user", content="Thanks"),
                Message(role="assistant", content="<think>\nnice\n</think>\n\nGladly."),
            ),
            tools=(_TOOL,),
        )
        tokenizer = chat_templates.train_tokenizer("qwen3")
        sequences = render(renderer_of("qwen3"), dialogue)
        self.check(tokenizer, dialogue, "<|im_end|>", sequences)
        first = tokenizer.decode(sequences[0].tokens)
        self.assertIn('"description": "Adds."', first)
        self.assertEndsWith(first, '{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call><|im_end|>')

    def test_reasoning_is_in_the_response_and_not_in_later_history(self):
        dialogue = said(
            ("user", "1 + 1?"), ("assistant", "<think>\nEasy.\n</think>\n\n2"), ("user", "Sure?"), ("assistant", "Yes")
        )
        tokenizer = chat_templates.train_tokenizer("qwen3")
        first, second = render(renderer_of("qwen3"), dialogue)
        self.assertEqual(tokenizer.decode(first.tokens[first.start :]), "<think>\nEasy.\n</think>\n\n2<|im_end|>")
        self.assertNotIn("Easy", tokenizer.decode(second.tokens))
        self.assertEqual(tokenizer.decode(second.tokens[second.start :]), "<think>\n\n</think>\n\nYes<|im_end|>")

    def test_chat_template_kwargs_are_in_prompt_and_response(self):
        dialogue = said(("user", "1 + 1?"), ("assistant", "2"), ("user", "Sure?"), ("assistant", "Yes"))
        tokenizer = chat_templates.train_tokenizer("qwen3")
        sequences = render(renderer_of("qwen3", enable_thinking=False), dialogue)
        self.check(tokenizer, dialogue, "<|im_end|>", sequences, enable_thinking=False)
        self.assertEqual(tokenizer.decode(sequences[1].tokens[sequences[1].start :]), "Yes<|im_end|>")

    def test_a_special_token_that_swallows_white_space_leaves_what_inference_sees(self):
        tokenizer = chat_templates.train_tokenizer.__wrapped__("phi3")
        tokenizer.backend_tokenizer.add_special_tokens(
            [tokenizers.AddedToken(text, normalized=False, rstrip=True) for text in FAMILIES["phi3"].special]
        )
        renderer = sequences_lib.Renderer(tokenizer)
        for contents in (("Hi", "Hello", "Bye", "Ciao"), (" Hi", " \n Hello ", "\n", "")):
            dialogue = said(*zip(("user", "assistant") * 2, contents, strict=True))
            for sequence in render(renderer, dialogue):
                prompt, _ = official(tokenizer, dialogue, sequence.message_index, prompt=True)
                ids, _ = official(tokenizer, dialogue, sequence.message_index + 1)
                self.assertEqual(sequence.tokens[: sequence.start].tolist(), prompt)
                self.assertEqual(sequence.tokens.tolist(), ids[:-1])  # less the <|endoftext|> behind <|end|>

    @parameterized.parameters("gemma", "mistral")
    def test_a_response_that_merges_with_its_prompt_gets_tokens_that_continue_it(self, family):
        # The plain template ends the prompt in a space, which these tokenizers join to the word after it.
        tokenizer = with_template(family, chat_templates.TEMPLATES["plain"])
        dialogue = said(("user", "Hi"), ("assistant", "you are"), ("user", "3?"), ("assistant", "3"))
        sequences = render(sequences_lib.Renderer(tokenizer), dialogue)
        self.check(tokenizer, dialogue, "\n", sequences)
        crossing, _ = official(tokenizer, dialogue, 2)
        self.assertNotEqual(sequences[0].tokens.tolist(), crossing)

    @parameterized.parameters(*FAMILIES)
    def test_no_token_of_the_beginning_of_text_is_doubled(self, family):
        tokenizer = chat_templates.train_tokenizer(family)
        if family not in ("llama3", "gemma", "mistral"):
            return
        for sequence in render(renderer_of(family), said(("user", "Hi"), ("assistant", "Hello"))):
            self.assertEqual(sequence.tokens.tolist().count(tokenizer.bos_token_id), 1)
            self.assertEqual(sequence.tokens[0], tokenizer.bos_token_id)

    @parameterized.parameters("chatml", "mistral", "phi3")
    def test_sequences_of_a_prefix_preserving_dialogue_share_memory(self, family):
        dialogue = said(*[("user", "Hi"), ("assistant", "Hello you.")] * 4)
        sequences = render(renderer_of(family), dialogue)
        self.assertLen(sequences, 4)
        for one, other in itertools.pairwise(sequences):
            self.assertTrue(np.shares_memory(one.tokens, other.tokens))


class OptionsTest(parameterized.TestCase):
    @parameterized.parameters("chatml", "qwen3", "plain")
    def test_limit_ends_before_the_first_sequence_that_is_longer(self, family):
        renderer = renderer_of(family)
        for seed in range(4):
            dialogue = chat_templates.random_dialogue(np.random.default_rng(seed), turns=8)
            if seed == 3:  # responses of one token
                dialogue = said(*[("user", "a"), ("assistant", "")] * 3)
            free = render(renderer, dialogue)
            lengths = [len(sequence.tokens) for sequence in free]
            for limit in {*lengths, *(length - 1 for length in lengths), 1, 2 * max(lengths)}:
                limited = render(renderer, dialogue, max_length=limit)
                fitting = free[: next((i for i, length in enumerate(lengths) if length > limit), None)]
                self.assertLen(limited, len(fitting))
                for got, wanted in zip(limited, fitting, strict=True):
                    np.testing.assert_array_equal(got.tokens, wanted.tokens)
                    self.assertEqual(got[1:], wanted[1:])

    def test_limit_counts_tokens_where_they_are_longer_than_usual(self):
        # One token for many characters: most of what fits lies behind the part that is tokenised at first.
        tokenizer = chat_templates.train_tokenizer.__wrapped__("chatml")
        tokenizer.add_tokens(["abracadabra" * 9])
        dialogue = said(*[("user", "abracadabra" * 90), ("assistant", "abracadabra" * 9)] * 5)
        renderer = sequences_lib.Renderer(tokenizer)
        free = render(renderer, dialogue)
        limited = render(renderer, dialogue, max_length=len(free[3].tokens), full=True)
        self.assertEqual([s.tokens.tolist() for s in limited], [s.tokens.tolist() for s in free[:4]])
        whole = render(renderer, dialogue, max_length=len(free[4].tokens) + 1, full=True)[-1]
        self.assertEqual(whole.tokens.tolist(), official(tokenizer, dialogue, 10)[0])

    @parameterized.parameters(*FAMILIES)
    def test_whole_ends_with_the_rendering_of_all_messages(self, family):
        dialogue = said(("user", "a"), ("assistant", "b"), ("user", "c"))
        first, whole = render(renderer_of(family), dialogue, full=True)
        ids, _ = official(chat_templates.train_tokenizer(family), dialogue, 3)
        self.assertEqual(whole.tokens.tolist(), ids)
        self.assertEqual((first.turn, whole.turn, whole.message_index, whole.start), (0, -1, -1, len(ids)))
        self.assertLen(render(renderer_of(family), dialogue, full=True, max_length=len(ids) - 1), 1)
        self.assertLen(render(renderer_of(family), dialogue, full=True, max_length=len(ids)), 2)

    def test_messages_of_weight_0_have_no_sequence_but_count_as_turns(self):
        dialogue = said(
            ("user", "a"),
            ("assistant", "b", 0),
            ("user", "c"),
            ("assistant", "d", 0.5),
            ("user", "e"),
            ("assistant", "f", 0),
        )
        (sequence,) = render(renderer_of("chatml"), dialogue)
        self.assertEqual((sequence.turn, sequence.message_index), (1, 3))

    @parameterized.parameters("chatml", "qwen3", "mistral")
    def test_virtual_tokens_come_first_and_shift_everything_else(self, family):
        parts = (Part(text="Hello", weight=0.5), Part(text=" you", weight=2.0))
        dialogue = said(
            ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello you"), ("user", "c"), ("assistant", "d")
        )
        messages = list(dialogue.messages)
        messages[2] = Message(role="assistant", content="Hello you", parts=parts)
        dialogue = Dialogue(id=0, messages=tuple(messages))
        without = renderer_of(family)
        renderer = sequences_lib.Renderer(chat_templates.train_tokenizer(family), virtual_tokens=VirtualTokens(900, 3))
        renderer = pickle.loads(pickle.dumps(renderer.with_responses("rendered")))
        ids, options = [900, 901, 902], {"full": True, "locate": lambda message: message.role != "system"}
        expected = render(without, dialogue, **options)
        sequences = render(renderer, dialogue, **options)
        for one, other in zip(sequences, expected, strict=True):
            self.assertEqual(one.tokens.tolist(), [*ids, *other.tokens.tolist()])
            self.assertEqual((one.start, one.virtual, other.virtual), (other.start + 3, 3, 0))
            for span, other_span in [
                *zip(one.message_spans, other.message_spans, strict=True),
                (MessageSpan(0, 0, 0, one.part_spans), MessageSpan(0, -3, -3, other.part_spans)),
            ]:
                self.assertEqual((span.start, span.stop), (other_span.start + 3, other_span.stop + 3))
                self.assertEqual(span.part_spans, tuple((a + 3, b + 3) for a, b in other_span.part_spans))
        self.assertTrue(any(one.part_spans for one in sequences))
        self.assertTrue(any(one.message_spans for one in sequences))
        for method in ("encode_prompt", "encode_shared_prefix"):
            self.assertEqual(
                getattr(renderer, method)(dialogue).tolist(), [*ids, *getattr(without, method)(dialogue).tolist()]
            )
        limit = len(expected[0].tokens)
        self.assertLen(render(renderer, dialogue, max_length=limit + 3), 1)
        self.assertEmpty(render(renderer, dialogue, max_length=limit + 2))

    def test_prompt_is_what_a_reply_continues(self):
        dialogue = said(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))
        for family in FAMILIES:
            ids, _ = official(chat_templates.train_tokenizer(family), dialogue, 3, prompt=True)
            self.assertEqual(renderer_of(family).encode_prompt(dialogue).tolist(), ids)

    @parameterized.parameters(*FAMILIES)
    def test_end_of_turn_is_the_family_s(self, family):
        ends = FAMILIES[family].end_of_turn
        wanted = None if family == "plain" else chat_templates.train_tokenizer(family).convert_tokens_to_ids(ends)
        self.assertEqual(renderer_of(family).end_of_turn, wanted)

    @parameterized.parameters(
        ("call()", "call()<|endoftext|>"), ("<|endoftext|> is it", "<|endoftext|> is it<|endoftext|>"), ("bye", "bye\n")
    )
    def test_a_response_without_end_of_turn_ends_with_another_special_token_or_the_text(self, content, response):
        # Some templates end a call of a tool otherwise than an answer.
        tokenizer = with_template(
            "chatml",
            "{% for m in messages %}<|im_start|>{{ m.content }}{{ '' if m.content == 'bye' else '<|endoftext|>' if "
            "m.end else '<|im_end|>' }}{{ '\\n' }}{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}",
        )
        last = Message(role="assistant", content=content, fields={"end": True})
        dialogue = Dialogue(id=0, messages=(*said(("user", "a"), ("assistant", "b"), ("user", "c")).messages, last))
        _, sequence = render(sequences_lib.Renderer(tokenizer), dialogue)
        self.assertEqual(tokenizer.decode(sequence.tokens[sequence.start :]), response)

    def test_special_text_in_a_response_that_ends_with_nothing_does_not_end_it(self):
        tokenizer = with_template(
            "chatml",
            "{% for m in messages %}<|im_start|>{{ m.content }}{{ '<|im_end|>' if m.role == 'user' or not m.open }}"
            "{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}",
        )
        last = Message(role="assistant", content="to <|endoftext|> be", fields={"open": True})
        (sequence,) = render(
            sequences_lib.Renderer(tokenizer), Dialogue(id=0, messages=(Message(role="user", content="a"), last))
        )
        self.assertEqual(tokenizer.decode(sequence.tokens[sequence.start :]), "to <|endoftext|> be")

    def test_end_of_turn_may_be_a_token_that_is_not_special(self):
        tokenizer = with_template(
            "plain", "{% for m in messages %}[{{ m.role }}]{{ m.content }}[done]\n{% endfor %}[assistant]"
        )
        tokenizer.add_tokens(["[done]"])
        renderer = sequences_lib.Renderer(tokenizer)
        self.assertEqual(renderer.end_of_turn, tokenizer.convert_tokens_to_ids("[done]"))


class PreambleTest(parameterized.TestCase):
    @parameterized.parameters("chatml", "llama3", "qwen3", "plain")
    def test_it_is_what_dialogues_of_one_system_prompt_have_in_common(self, family):
        system = [("system", "Rule 365.")] if FAMILIES[family].system_role else []
        first, second = (
            said(*system, ("user", "A"), ("assistant", "b")),
            said(*system, ("user", "12"), ("assistant", "b")),
        )
        renderer = renderer_of(family)
        preamble = renderer.encode_shared_prefix(first)
        np.testing.assert_array_equal(preamble, renderer.encode_shared_prefix(second))
        text = chat_templates.train_tokenizer(family).decode(preamble)
        for dialogue in (first, second):
            self.assertStartsWith(renderer.render_text(dialogue, len(dialogue.messages)), text)
            # The last token may be another where the content follows it.
            np.testing.assert_array_equal(preamble[:-1], renderer.encode_prompt(dialogue)[: len(preamble) - 1])
        prompts = [renderer.render_text(dialogue, len(dialogue.messages)) for dialogue in (first, second)]
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))
        self.assertEqual(text, "".join(letter for letter, _ in common))

    def test_another_system_prompt_or_tool_has_another(self):
        renderer = renderer_of("qwen3")
        plain = said(("system", "Rule 365."), ("user", "A"))
        other = said(("system", "Rule 366."), ("user", "A"))
        tool = dataclasses.replace(plain, tools=({"type": "function", "function": {"name": "add"}},))
        lengths = {len(renderer.encode_shared_prefix(dialogue)) for dialogue in (plain, tool)}
        self.assertLen(lengths, 2)
        self.assertFalse(np.array_equal(renderer.encode_shared_prefix(plain), renderer.encode_shared_prefix(other)))

    def test_what_the_template_refuses_has_none(self):
        self.assertEmpty(renderer_of("gemma").encode_shared_prefix(said(("assistant", "b"), ("user", "A"))))
        self.assertEmpty(renderer_of("chatml").encode_shared_prefix(said(("system", "b"))))


class LocateTest(parameterized.TestCase):
    """The spans of messages that are not responses, against a search for contents that stand once in the text."""

    @parameterized.parameters("chatml", "llama3", "gemma", "mistral", "phi3", "qwen3")
    def test_contents_and_their_end_of_turn_are_found(self, family):
        system = [("system", "Rule 365.")] if FAMILIES[family].system_role else []
        dialogue = said(
            *system,
            ("user", " What?"),
            ("assistant", "Paris"),
            ("user", "user"),
            ("assistant", "model", 0),
            ("user", "|e"),
        )
        tokenizer = chat_templates.train_tokenizer(family)
        sequences = render(
            renderer_of(family), dialogue, full=True, locate=lambda m: m.role != "assistant" or not m.weight
        )
        found, previous = {}, sequences[0].tokens[:0]
        for sequence in sequences:
            branches = (sequence.tokens[: len(previous)] != previous).any()
            previous = sequence.tokens
            for span in sequence.message_spans:
                self.assertTrue(span.message_index not in found or branches)
                found[span.message_index] = tokenizer.decode(sequence.tokens[span.start : span.stop]).strip()
        end = FAMILIES[family].end_of_turn
        behind = "" if family == "mistral" else end  # there [/INST] follows, after a space
        wanted = ["What?" + behind, None, "user" + behind, "model" + end, "|e" + behind]
        if system:
            wanted.insert(0, "Rule 365." + behind)
        self.assertEqual(found, {index: text for index, text in enumerate(wanted) if text is not None})

    def test_each_message_is_located_in_the_first_sequence_that_shows_it(self):
        dialogue = said(*[("user", "a"), ("user", "b"), ("assistant", "c")] * 3, ("user", "d"))
        sequences = render(renderer_of("chatml"), dialogue, full=True, locate=lambda m: m.role == "user")
        self.assertEqual(
            [[span.message_index for span in s.message_spans] for s in sequences], [[0, 1], [3, 4], [6, 7], [9]]
        )

    def test_an_empty_message_has_its_end_of_turn_only(self):
        dialogue = said(("user", ""), ("assistant", "x"))
        (sequence,) = render(renderer_of("chatml"), dialogue, locate=lambda m: m.role == "user")
        (span,) = sequence.message_spans
        decoded = chat_templates.train_tokenizer("chatml").decode(sequence.tokens[span.start : span.stop])
        self.assertEqual(decoded, "<|im_end|>")

    def test_tool_calls_are_part_of_a_located_response(self):
        call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
        dialogue = Dialogue(
            id=0,
            messages=(
                Message(role="user", content="?"),
                Message(
                    role="assistant", content="", weight=0.0, fields={"tool_calls": [call], "reasoning_content": "r"}
                ),
                Message(role="tool", content="1"),
                Message(role="assistant", content="1"),
            ),
        )
        (sequence,) = render(renderer_of("qwen3"), dialogue, locate=lambda m: m.role == "tool" or not m.weight)
        texts = [
            chat_templates.train_tokenizer("qwen3").decode(sequence.tokens[s.start : s.stop])
            for s in sequence.message_spans
        ]
        self.assertEqual(
            texts,
            [
                '<think>\nr\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
                "1",
            ],
        )

    def test_a_message_that_changes_other_parts_is_refused(self):
        tokenizer = with_template("chatml", "{{ messages[0].content | length }}" + chat_templates.TEMPLATES["chatml"])
        dialogue = said(("user", "Hi"), ("assistant", "x"))
        with self.assertRaisesRegex(ValueError, r"dialogue 0 \(said.jsonl:1\): message 0 \(user\).*Leave its role"):
            render(sequences_lib.Renderer(tokenizer), dialogue, locate=lambda m: m.role == "user")


class CostTest(parameterized.TestCase):
    """What is tokenized and rendered, counted."""

    def costs(self, family, turns, **options):
        """(characters tokenized, texts rendered) of a dialogue, the second time it is rendered."""
        parts = tuple(Part(text=text, weight=0.5) for text in ("123", "abc", "456"))
        pair = (
            Message(role="user", content="Hello you", weight=0.5),
            Message(role="assistant", content="123abc456", weight=0.5, parts=parts if options else ()),
        )
        dialogue = Dialogue(id=0, messages=pair * turns)
        renderer = renderer_of(family)
        render(renderer, dialogue, **options)
        encode, render_texts = special_tokens.SpecialTokenEscaper.encode, template_process.render
        characters, jobs = [], []

        def count_characters(escaper, texts):
            characters.extend(map(len, texts))
            return encode(escaper, texts)

        def count_jobs(template, messages, wanted, variables):
            jobs.extend(wanted)
            return render_texts(template, messages, wanted, variables)

        with (
            mock.patch.object(special_tokens.SpecialTokenEscaper, "encode", count_characters),
            mock.patch.object(template_process, "render", count_jobs),
        ):
            self.assertLen(render(renderer, dialogue, **options), turns + bool(options))
        return sum(characters), len(jobs)

    @parameterized.product(
        family=["chatml", "llama3", "gemma", "qwen3"],
        locate=[lambda message: message.role == "user", lambda message: message.weight != 1],
    )
    @pytest.mark.full
    def test_locating_messages_costs_no_more_with_turns_than_rendering_them(self, family, locate):
        few, many = (self.costs(family, turns, full=True, locate=locate) for turns in (8, 64))
        plain, _ = self.costs(family, 64)
        self.assertLess(many[0], 1.5 * plain)
        if family in ("chatml", "gemma"):  # in the others, responses do not continue what history renders
            self.assertLess(many[0], 1.5 * 8 * few[0])
        self.assertLess(many[1], 1.2 * 8 * few[1])

    @parameterized.parameters(*FAMILIES)
    def test_tokenizing_costs_no_more_per_turn_in_longer_dialogues(self, family):
        if family == "plain":  # no special token divides its texts
            return
        few, many = (self.costs(family, turns)[0] for turns in (8, 64))
        self.assertLess(many, 1.1 * 8 * few)

    def test_a_template_that_strips_reasoning_costs_each_response_twice(self):
        costs = {family: self.costs(family, 64)[0] for family in ("qwen3", "chatml")}
        self.assertLess(costs["qwen3"], 2 * costs["chatml"])


class PartsTest(parameterized.TestCase):
    """Parts are digits and letters, which no token mixes, or are cut out of the decoded text by hand."""

    def dialogue(self, *parts, role="assistant"):
        parts = tuple(Part(text=text, weight=0.5) for text in parts)
        weighted = Message(role=role, content="".join(part.text for part in parts), parts=parts)
        others = [Message(role="user", content="What?"), Message(role="assistant", content="Paris")]
        place = 1 if role == "assistant" else 0
        return Dialogue(id=0, messages=(*others[:place], weighted, *others[place + 1 :]), where="said.jsonl:1")

    @parameterized.parameters("chatml", "llama3", "gemma", "mistral", "phi3", "plain")
    def test_parts_of_a_response_are_found(self, family):
        texts = ("123", "abc", "456")
        (sequence,) = render(renderer_of(family), self.dialogue(*texts))
        tokenizer = chat_templates.train_tokenizer(family)
        found = [tokenizer.decode(sequence.tokens[start:stop]).strip() for start, stop in sequence.part_spans]
        self.assertEqual(found, list(texts))
        self.assertGreaterEqual(sequence.part_spans[0][0], sequence.start)
        self.assertLessEqual(sequence.part_spans[-1][1], len(sequence.tokens))

    def test_reasoning_and_answer(self):
        texts = ("<think>\nten and nine\n</think>", "\n\n19.")
        (sequence,) = render(renderer_of("qwen3"), self.dialogue(*texts))
        tokenizer = chat_templates.train_tokenizer("qwen3")
        self.assertEqual([tokenizer.decode(sequence.tokens[slice(*part)]) for part in sequence.part_spans], list(texts))
        self.assertEqual(tokenizer.decode(sequence.tokens[sequence.part_spans[-1][1] :]), "<|im_end|>")

    def test_a_token_that_crosses_parts_belongs_to_the_one_it_ends_in(self):
        tokenizer = chat_templates.train_tokenizer("chatml")
        ids = tokenizer("you you", add_special_tokens=False)["input_ids"]
        self.assertEqual(tokenizer.decode(ids[-1]), " you")
        (sequence,) = render(renderer_of("chatml"), self.dialogue("you y", "ou"))
        (_, first), (second, stop) = sequence.part_spans
        self.assertEqual((first, tokenizer.decode(sequence.tokens[second:stop])), (second, " you"))

    def test_parts_of_a_located_message_are_found(self):
        dialogue = self.dialogue("123", "abc", role="user")
        (sequence,) = render(renderer_of("chatml"), dialogue, locate=lambda m: m.role == "user")
        tokenizer = chat_templates.train_tokenizer("chatml")
        parts = sequence.message_spans[0].part_spans
        self.assertEqual([tokenizer.decode(sequence.tokens[slice(*part)]) for part in parts], ["123", "abc"])

    @parameterized.parameters(
        ("llama3", (" 123", "abc"), "does not render its content as it is"),
        ("qwen3", ("<think>ten</think>", "19"), "does not render its content as it is"),
    )
    def test_content_that_is_not_rendered_verbatim_is_refused(self, family, texts, reason):
        with self.assertRaisesRegex(ValueError, rf"dialogue 0 \(said.jsonl:1\): message 1 .*{reason}.*Write"):
            render(renderer_of(family), self.dialogue(*texts))

    def test_content_that_stands_twice_in_what_is_rendered_is_refused(self):
        doubled = chat_templates.TEMPLATES["chatml"].replace("message.content", "message.content + message.content")
        self.assertNotEqual(doubled, chat_templates.TEMPLATES["chatml"])
        with self.assertRaisesRegex(ValueError, "message 1 .*more than once"):
            render(sequences_lib.Renderer(with_template("chatml", doubled)), self.dialogue("12", "ab"))


class RefusalTest(parameterized.TestCase):
    @parameterized.parameters(
        ("gemma", [("assistant", "b")], "must alternate"),
        ("chatml", [("assistant", "b"), ("user", "c")], "begins with an assistant message"),
        ("gemma", [("assistant", "b", 0), ("user", "a"), ("assistant", "b")], "must alternate"),
        ("gemma", [("system", "s"), ("user", "a"), ("assistant", "b")], "System role not supported"),
        ("mistral", [("user", "a"), ("user", "b"), ("assistant", "c")], "must alternate"),
        ("mistral", [("user", "a"), ("assistant", "b"), ("assistant", "c")], "must alternate"),
    )
    def test_what_a_template_refuses_names_dialogue_line_reason_and_remedy(self, family, messages, reason):
        remedy = "Put a message before" if "begins" in reason else "hange the dialogue, pass another"
        with self.assertRaisesRegex(ValueError, rf"^dialogue 4 \(said.jsonl:5\).*{reason}.*{remedy}"):
            render(renderer_of(family), said(*messages, id=4))

    def test_a_response_that_does_not_begin_with_its_prompt_shows_the_first_difference(self):
        dialogue = said(("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), id=4)
        with self.assertRaisesRegex(
            ValueError, r"dialogue 4 \(said.jsonl:5\): with message 1 .*the prompt has .*rendering '.{0,3}hm"
        ):
            render(renderer_of("qwen3", enable_thinking=False), dialogue)

    def test_a_template_that_does_not_render_the_response_is_refused(self):
        with self.assertRaisesRegex(ValueError, "does not render the content of an assistant message"):
            sequences_lib.Renderer(
                with_template("chatml", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
            )


if __name__ == "__main__":
    absltest.main()
