"""Responses of templates built like the published ones, as literals and against `apply_chat_template` itself.

The templates are short and written for these tests; each has the structure of its family: where system text, reasoning
and tool calls go, how turns begin and end, and what history drops.
"""

import dataclasses
import json
import pathlib
import tempfile

import numpy as np
import tokenizers
import transformers
from absl.testing import absltest, parameterized

from dialog_jax.dialogues.dialogue import Dialogue, Message, Part
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from tests.rendering import chat_templates

_ROLE = "<|im_start|>{{ m.role }}\n"
_CUT_THINK = "{% set c = m.content.split('</think>')[-1] %}"
# fmt: off
TEMPLATES = {
    "qwen3": chat_templates.TEMPLATES["qwen3"],
    "llama3": chat_templates.TEMPLATES["llama3"],
    "phi3": chat_templates.TEMPLATES["phi3"],
    "gemma": chat_templates.TEMPLATES["gemma"],
    "mistral": chat_templates.TEMPLATES["mistral"],
    "llama2": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "{{ '<s>[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') "
        "+ m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}"
    ),
    "nemo": (  # the system text is in the last user message
        "<s>{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set turns = messages[1:] if system else messages %}{% for m in turns %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (system + '\n\n' if loop.last and system else '') + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    ),
    "nemo_last_user": (  # the same where an answer follows
        "<s>{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (system + '\n\n' if m == users[-1] and system else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt }}"
    ),
    "olmo": (
        "<|endoftext|>{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|assistant|>\n' + m.content + '<|endoftext|>' + ('' if loop.last else '\n') }}"
        "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt }}"
    ),
    "granite": (
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
        "<|end_of_text|>\n{% endfor %}{{ '<|start_of_role|>assistant<|end_of_role|>' if add_generation_prompt }}"
    ),
    "command": (  # two special tokens end a response
        "{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}"
        "{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}"
        "{% else %}{{ '<|USER_TOKEN|>' + m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' if add_generation_prompt }}"
    ),
    "command_r7b": (  # and the next response is begun, whether or not it is asked for
        "{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}"
        "{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}"
        "{% else %}{{ '<|USER_TOKEN|>' + m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "for_tools": (  # refuses dialogues without tools
        "{{ tools | map(attribute='function') | map(attribute='name') | join(', ') }}\n"
        "{% for m in messages %}" + _ROLE + "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    ),
    "phi4": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{{ '<|im_start|>assistant<|im_sep|>' if add_generation_prompt }}"
    ),
    "glm4": (  # no token ends a response; the next header does
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt }}"
    ),
    "eos_at_the_end": (  # turns end with a line break; only a finished text ends with a special token
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt else '<|endoftext|>' }}"
    ),
    "always_a_header": (  # add_generation_prompt is ignored
        "{% for m in messages %}" + _ROLE + "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' if messages[-1].role == 'user' or not add_generation_prompt }}"
    ),
    "smollm3": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{{ m.content.lstrip('\n') }}<|im_end|>\n{% else %}" + _ROLE + "{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    ),
    "deepseek_v3": (
        "<|bos|>{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content + '<|eos|>' }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{{ '<|Assistant|>' if add_generation_prompt }}"
    ),
    "deepseek_r1": (  # the prompt begins the reasoning, which is cut out of every message
        "<|bos|>{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% else %}" + _CUT_THINK + "{{ '<|Assistant|>' + c + '<|eos|>' }}{% endif %}{% endfor %}"
        "{{ '<|Assistant|><think>\n' if add_generation_prompt }}"
    ),
    "qwq": (  # the prompt begins the reasoning, which is cut out of history
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
        + _CUT_THINK + _ROLE + "{{ c }}<|im_end|>\n{% else %}" + _ROLE + "{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}"
        "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"
    ),
    "harmony": (  # earlier analysis is dropped once a final answer follows the last user message
        "{% set last = namespace(final=-1) %}{% for m in messages %}"
        "{% if m.role == 'assistant' and not m.tool_calls %}{% set last.final = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.thinking and (loop.index0 > last.final or loop.last) %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{% if m.tool_calls %}{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' + "
        "m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
        "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and not "
        "add_generation_prompt else '<|end|>') }}{% endif %}"
        "{% elif m.role == 'tool' %}{{ '<|start|>tool<|message|>' + m.content | tojson + '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{{ '<|start|>assistant' if add_generation_prompt }}"
    ),
}
_SPECIAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<bos>",
    "<start_of_turn>", "<end_of_turn>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "[gMASK]", "<sop>", "<|bos|>", "<|eos|>", "<|User|>",
    "<|Assistant|>", "<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)
_ENDS = {
    "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|end|>", "gemma": "<end_of_turn>", "mistral": "</s>",
    "llama2": " </s>", "nemo": "</s>", "nemo_last_user": "</s>", "zephyr": "</s>", "olmo": "<|endoftext|>",
    "granite": "<|end_of_text|>", "command": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "phi4": "<|im_end|>",
    "command_r7b": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "glm4": "",
    "eos_at_the_end": "\n<|endoftext|>", "always_a_header": "<|im_end|>", "smollm3": "<|im_end|>",
    "deepseek_v3": "<|eos|>", "harmony": "<|return|>",
}
# fmt: on
_EOS = {"mistral": "</s>", "command_r7b": "<|END_OF_TURN_TOKEN|>"}
_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def make_tokenizer(template, *, eos="<|endoftext|>"):
    tokenizer = chat_templates.train_tokenizer.__wrapped__("plain")
    added = [tokenizers.AddedToken(text, special=True, normalized=False) for text in _SPECIAL]
    tokenizer.backend_tokenizer.add_tokens(added)
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in _ADDED])
    bos = "<bos>" if template == "gemma" else "<|begin_of_text|>" if template == "llama3" else "<s>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=TEMPLATES.get(template, template),
        eos_token=_EOS.get(template, eos),
        bos_token=bos,
    )


def make_dialogue(*messages, **fields):
    made = [m if isinstance(m, Message) else Message(role=m[0], content=m[1]) for m in messages]
    return Dialogue(id=3, messages=tuple(made), where="data.jsonl:4", **fields)


def render(tokenizer, dialogue, **options):
    (sequences,) = Renderer(tokenizer, **options).render([dialogue])
    return list(sequences)


def prompts_and_responses(tokenizer, sequences):
    return [(tokenizer.decode(one.tokens[: one.start]), tokenizer.decode(one.tokens[one.start :])) for one in sequences]


class FamiliesTest(parameterized.TestCase):
    @parameterized.parameters(*_ENDS)
    def test_prompt_is_what_inference_shows_and_response_what_follows_up_to_the_stop(self, family):
        tokenizer = make_tokenizer(family)
        contents = ("Hi", "Hello you.", "1 + 1?", "2", "Bye", "<b>Ciao</b>, 12.")
        dialogue = make_dialogue(*zip(("user", "assistant") * 3, contents, strict=True))
        messages = [message.as_dict() for message in dialogue.messages]
        found = prompts_and_responses(tokenizer, render(tokenizer, dialogue))
        self.assertLen(found, 3)
        for index, (prompt, response) in zip((1, 3, 5), found, strict=True):
            shown = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, tokenize=False)
            rendered = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
            self.assertEqual(prompt, shown)
            self.assertStartsWith(rendered, shown + response)
            self.assertEndsWith(response, contents[index] + _ENDS[family])

    @parameterized.parameters(*_ENDS)
    def test_tokens_are_those_of_the_texts_by_themselves(self, family):
        tokenizer = make_tokenizer(family)
        dialogue = make_dialogue(("user", "Hi"), ("assistant", "Hello"), ("user", "So?"), ("assistant", "Yes"))
        for sequence in render(tokenizer, dialogue):
            ((prompt, response),) = prompts_and_responses(tokenizer, [sequence])
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            self.assertEqual(sequence.tokens[: sequence.start].tolist(), ids)
            both = tokenizer.encode(prompt + response, add_special_tokens=False)
            if both[: len(ids)] != ids:  # a token crosses into the response, which is tokenized behind a special token
                both = ids + tokenizer.encode("<s>" + response, add_special_tokens=False)[1:]
            self.assertEqual(sequence.tokens.tolist(), both)

    @parameterized.parameters("command", "command_r7b")
    def test_command_response_ends_with_both_tokens(self, family):
        tokenizer = make_tokenizer(family)
        (sequence,) = render(tokenizer, make_dialogue(("user", "Hi"), ("assistant", "Hello!")))
        self.assertEqual(
            tokenizer.decode(sequence.tokens[sequence.start :]),
            "<|START_RESPONSE|>Hello!<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        )
        self.assertEqual(Renderer(tokenizer).end_of_turn, tokenizer.convert_tokens_to_ids("<|END_OF_TURN_TOKEN|>"))

    def test_the_end_of_turn_before_a_header_that_is_always_written_need_not_be_named(self):
        tokenizer = make_tokenizer("command_r7b")
        tokenizer.eos_token = "<|endoftext|>"
        ((_, response),) = prompts_and_responses(
            tokenizer, render(tokenizer, make_dialogue(("user", "Hi"), ("assistant", "Hello!")))
        )
        self.assertEqual(response, "<|START_RESPONSE|>Hello!<|END_RESPONSE|><|END_OF_TURN_TOKEN|>")

    def test_a_template_that_needs_tools_is_accepted(self):
        tool = {"type": "function", "function": {"name": "tide"}}
        tokenizer = make_tokenizer("for_tools")
        dialogue = make_dialogue(("user", "Hi"), ("assistant", "Hello"), tools=(tool,))
        ((prompt, response),) = prompts_and_responses(tokenizer, render(tokenizer, dialogue))
        self.assertEqual(prompt, "tide\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        self.assertEqual(response, "Hello<|im_end|>")


class StopTest(parameterized.TestCase):
    def response(self, template, **options):
        tokenizer = make_tokenizer(template)
        dialogue = make_dialogue(("user", "Hi"), ("assistant", "Hello"), ("user", "So?"), ("assistant", "Yes"))
        found = prompts_and_responses(tokenizer, render(tokenizer, dialogue, **options))
        return [response for _, response in found]

    @parameterized.parameters(
        ("<|end|><|eos|>\n", "<|end|><|eos|>"),
        ("<|end|>\n<|eos|>\n", "<|end|>\n<|eos|>"),
        ("<|end|> over <|eos|>\n", "<|end|> over <|eos|>"),
        ("<|end|>\n", "<|end|>"),
        ("</s><s>", "</s><s>"),
        ("", ""),
    )
    def test_all_special_tokens_before_the_next_header_are_trained(self, written, end):
        template = (
            "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '" + written.replace("\n", "\\n") + "' }}"
            "{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
        )
        self.assertEqual(self.response(template), ["Hello" + end, "Yes" + end])

    def test_what_only_a_finished_text_has_is_trained_if_nothing_before_it_stops_generation(self):
        with tempfile.TemporaryDirectory() as directory:
            make_tokenizer("phi3").save_pretrained(directory)
            stops = {name: make_tokenizer("phi3").convert_tokens_to_ids(name) for name in ("<|end|>", "<|endoftext|>")}
            for names, end in (
                (["<|end|>", "<|endoftext|>"], "<|end|>"),
                (["<|endoftext|>"], "<|end|>\n<|endoftext|>"),
                ([], "<|end|>"),
            ):
                config = {"eos_token_id": [stops[name] for name in names]}
                pathlib.Path(directory, "generation_config.json").write_text(json.dumps(config))
                tokenizer = load_tokenizer(directory)
                dialogue = make_dialogue(("user", "Hi"), ("assistant", "Hello"))
                ((_, response),) = prompts_and_responses(tokenizer, render(tokenizer, dialogue))
                self.assertEqual(response, "Hello" + end)


class ChangedHistoryTest(parameterized.TestCase):
    """Renderings that do not begin with their prompt."""

    def test_system_text_in_the_last_message_is_in_the_prompt_and_the_response_is_what_follows(self):
        tokenizer = make_tokenizer("nemo")
        dialogue = make_dialogue(
            ("system", "You answer in one word."), ("user", "Largest planet?"), ("assistant", "Jupiter"),
            ("user", "Smallest [/INST]?"), ("assistant", "Mercury [/INST] it is"),
        )  # fmt: skip
        sequences = render(tokenizer, dialogue)
        self.assertEqual(
            prompts_and_responses(tokenizer, sequences),
            [
                ("<s>[INST] You answer in one word.\n\nLargest planet?[/INST]", " Jupiter</s>"),
                (
                    "<s>[INST] Largest planet?[/INST] Jupiter</s>"
                    "[INST] You answer in one word.\n\nSmallest [/INST]?[/INST]",
                    " Mercury [/INST] it is</s>",
                ),
            ],
        )
        self.assertTrue(all(sequence.changes_history for sequence in sequences))

    def test_a_rendering_that_begins_with_its_prompt_is_not_noted(self):
        dialogue = make_dialogue(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
        (sequence,) = render(make_tokenizer("nemo_last_user"), dialogue)
        self.assertFalse(sequence.changes_history)

    def harmony_dialogue(self, final):
        call = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
        return make_dialogue(
            ("user", "High tide?"),
            Message(role="assistant", content="", fields={"tool_calls": [call], "thinking": "I look."}),
            ("tool", "at noon"),
            final,
        )

    def test_analysis_that_is_dropped_once_an_answer_follows_stays_in_the_prompt(self):
        tokenizer = make_tokenizer("harmony")
        sequences = render(tokenizer, self.harmony_dialogue(("assistant", "At noon.")))
        user = "<|start|>user<|message|>High tide?<|end|>"
        analysis = "<|channel|>analysis<|message|>I look.<|end|>"
        call = '<|start|>assistant to=tide<|message|>{"port": "Brest"}<|call|>'
        tool = '<|start|>tool<|message|>"at noon"<|end|>'
        self.assertEqual(
            prompts_and_responses(tokenizer, sequences),
            [
                (f"{user}<|start|>assistant", f"{analysis}{call}"),
                (
                    f"{user}<|start|>assistant{analysis}{call}{tool}<|start|>assistant",
                    "<|channel|>final<|message|>At noon.<|return|>",
                ),
            ],
        )
        self.assertEqual([sequence.changes_history for sequence in sequences], [False, True])

    def test_the_last_header_alone_does_not_decide_where_a_response_begins(self):
        # The response has a header of its own kind between its analysis and its answer.
        final = Message(role="assistant", content="At noon.", fields={"thinking": "So noon."})
        tokenizer = make_tokenizer("harmony")
        *_, (_, response) = prompts_and_responses(tokenizer, render(tokenizer, self.harmony_dialogue(final)))
        self.assertEqual(
            response,
            "<|channel|>analysis<|message|>So noon.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>At noon.<|return|>",
        )

    def test_a_message_may_end_differently_once_a_response_follows(self):
        template = (
            "{% for m in messages %}" + _ROLE + "{{ m.content }}{{ '<|im_end|>\n' if m.role != 'tool' or loop.last }}"
            "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
        )
        dialogue = make_dialogue(("user", "Hi"), ("assistant", "I look"), ("tool", "noon"), ("assistant", "At noon."))
        tokenizer = make_tokenizer(template)
        *_, sequence = render(tokenizer, dialogue)
        ((prompt, response),) = prompts_and_responses(tokenizer, [sequence])
        self.assertEndsWith(prompt, "noon<|im_end|>\n<|im_start|>assistant\n")
        self.assertEqual(response, "At noon.<|im_end|>")
        self.assertTrue(sequence.changes_history)

    @parameterized.parameters("deepseek_r1", "qwq")
    def test_a_prompt_that_ends_inside_the_response_is_refused_with_the_remedy(self, family):
        dialogue = make_dialogue(("user", "1 + 1?"), ("assistant", "<think>\nEasy.</think>2"))
        if family == "qwq":  # where the message begins as the prompt does, the response continues it
            tokenizer = make_tokenizer(family)
            ((_, response),) = prompts_and_responses(tokenizer, render(tokenizer, dialogue))
            self.assertEqual(response, "Easy.</think>2<|im_end|>")
            dialogue = make_dialogue(("user", "1 + 1?"), ("assistant", "2"))
        with self.assertRaisesRegex(
            UserError, r"dialogue 3 \(data.jsonl:4\): with message 1 .*data.responses=verbatim"
        ):
            render(make_tokenizer(family), dialogue)

    def test_messages_that_are_merged_are_refused(self):
        special = (
            "{% for m in messages %}{% if loop.first or m.role != messages[loop.index0 - 1].role %}"
            "{{ '<|' + m.role + '|>' }}{% endif %}{{ m.content }}{% if loop.last or "
            "m.role != messages[loop.index0 + 1].role %}<|end|>{% endif %}{% endfor %}"
            "{{ '<|assistant|>' if add_generation_prompt }}"
        )
        plain = special.replace("<|end|>", "").replace("<|' + m.role + '|>", "' + m.role + ': ")
        plain = plain.replace("<|assistant|>", "assistant: ")
        for template, last in ((special, "c"), (plain, "c"), (plain, "c assistant: d")):
            dialogue = make_dialogue(("user", "a"), ("assistant", "b"), ("assistant", last))
            with self.assertRaisesRegex(UserError, "with message 2 .*merge assistant messages"):
                render(make_tokenizer(template), dialogue)


class VerbatimTest(parameterized.TestCase):
    def responses(self, family, *messages, **options):
        tokenizer = make_tokenizer(family)
        sequences = render(tokenizer, make_dialogue(*messages), responses="verbatim", **options)
        return prompts_and_responses(tokenizer, sequences)

    def test_reasoning_that_the_prompt_begins_is_trained_from_there(self):
        found = self.responses(
            "deepseek_r1", ("user", "1 + 1?"), ("assistant", "<think>\nEasy.</think>\n\n2"), ("user", "Sure?"),
            ("assistant", "Yes."),
        )  # fmt: skip
        self.assertEqual(
            found,
            [
                ("<|bos|><|User|>1 + 1?<|Assistant|><think>\n", "Easy.</think>\n\n2<|eos|>"),
                ("<|bos|><|User|>1 + 1?<|Assistant|>\n\n2<|eos|><|User|>Sure?<|Assistant|><think>\n", "Yes.<|eos|>"),
            ],
        )

    @parameterized.parameters(
        ("<think>\nEasy.\n</think>\n\n2", "Easy.\n</think>\n\n2"),
        ("<think>Easy.</think>2", "Easy.</think>2"),
        ("<think>\n\nEasy.</think>2", "\nEasy.</think>2"),
        ("\n<think>\nEasy.\n</think>\n\n2", "Easy.\n</think>\n\n2"),
        (" <think>Easy.</think>2", "Easy.</think>2"),
        ("Easy.\n</think>\n\n2", "Easy.\n</think>\n\n2"),
        ("2", "2"),
        ("  2 \n", "  2 \n"),
        ("", ""),
        ("<think>\n", ""),
        ("\n2", "\n2"),
        ("assistant\n2", "assistant\n2"),
        ("<|eos|>2", "<|eos|>2"),
    )
    def test_what_is_recorded_is_trained_less_what_the_prompt_has(self, content, response):
        ((_, found),) = self.responses("deepseek_r1", ("user", "?"), ("assistant", content))
        self.assertEqual(found, response + "<|eos|>")
        ((_, found),) = self.responses("qwq", ("user", "?"), ("assistant", content))
        self.assertEqual(found, response + "<|im_end|>")

    @parameterized.parameters(
        ("llama3", " Hi \n", " Hi \n<|eot_id|>"),  # trimmed when rendered
        ("gemma", "Hi", "Hi<end_of_turn>"),
        ("qwen3", "Hi", "Hi<|im_end|>"),  # rendered with an empty think block
        ("qwen3", "<think>a</think>Hi", "<think>a</think>Hi<|im_end|>"),  # rendered with other line breaks
        ("phi3", "Hi", "Hi<|end|>"),
        ("nemo", "Hi", " Hi</s>"),  # the space is the template's in history, too
        ("command", "Hi", "<|START_RESPONSE|>Hi<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("harmony", "Hi", "<|channel|>final<|message|>Hi<|return|>"),
        ("eos_at_the_end", "Hi", "Hi\n<|endoftext|>"),
        ("glm4", "Hi", "Hi"),
    )
    def test_content_is_unchanged_between_what_the_template_writes_around_it(self, family, content, response):
        ((_, found),) = self.responses(family, ("user", "?"), ("assistant", content))
        self.assertEqual(found, response)

    def test_an_empty_block_of_the_prompt_is_not_written_twice(self):
        message = ("assistant", "<think>\n\n</think>\n\nHi")
        ((prompt, response),) = self.responses(
            "qwen3", ("user", "?"), message, chat_template_kwargs={"enable_thinking": False}
        )
        self.assertEndsWith(prompt, "assistant\n<think>\n\n</think>\n\n")
        self.assertEqual(response, "Hi<|im_end|>")

    def test_reasoning_in_a_field_is_written_in_think_tags_if_the_template_knows_them(self):
        message = Message(role="assistant", content="2", fields={"reasoning_content": "Easy."})
        ((_, response),) = self.responses("deepseek_r1", ("user", "?"), message)
        self.assertEqual(response, "Easy.\n</think>\n\n2<|eos|>")
        ((_, response),) = self.responses("qwen3", ("user", "?"), message)
        self.assertEqual(response, "<think>\nEasy.\n</think>\n\n2<|im_end|>")

    @parameterized.product(family=("deepseek_r1", "qwen3", "llama3"), responses=("verbatim", "rendered"))
    def test_reasoning_in_a_field_and_in_the_content_is_not_written_twice(self, family, responses):
        content = "<think>\nEasy.\n</think>\n\n2"
        message = Message(role="assistant", content=content, fields={"reasoning_content": "Easy."})
        tokenizer, dialogue = make_tokenizer(family), make_dialogue(("user", "?"), message)
        if family == "llama3":  # does not read the field
            ((_, response),) = prompts_and_responses(tokenizer, render(tokenizer, dialogue, responses=responses))
            self.assertEqual(response, content + "<|eot_id|>")
        elif (family, responses) != ("deepseek_r1", "rendered"):  # which is refused anyway
            with self.assertRaisesRegex(UserError, "dialogue 3 .* message 1 has reasoning in a field .*Remove one"):
                render(tokenizer, dialogue, responses=responses)

    @parameterized.parameters(
        ("deepseek_r1", "2", True), ("deepseek_r1", "<think>\nEasy.", True), ("deepseek_r1", "Easy.</think>2", False),
        ("qwq", "2", True), ("qwen3", "2", False), ("llama3", "2", False),
    )  # fmt: skip
    def test_an_answer_inside_the_reasoning_that_the_prompt_begins_is_noted(self, family, content, is_noted):
        dialogue = make_dialogue(("user", "Is it <think>?"), ("assistant", content))
        (sequence,) = render(make_tokenizer(family), dialogue, responses="verbatim")
        places = [one.describe(1) for one in sequence.unwritten if one.kind == "reasoning_end"]
        self.assertEqual(places, ["message 1: its prompt ends with <think>"] if is_noted else [])

    @parameterized.parameters("rendered", "verbatim")
    def test_each_dialogue_ends_as_the_template_ends_it_with_its_variables_and_tools(self, responses):
        head = "{% for m in messages %}" + _ROLE + "{{ m.content }}"
        tail = "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
        plain = head + "{{ '<|endoftext|>' if alt else '<|im_end|>\n' }}" + tail
        tokenizer = make_tokenizer(plain)
        tokenizer.chat_template = {"default": plain, "tool_use": head + "<|end|><|eot_id|>\n" + tail}
        tool = {"type": "function", "function": {"name": "tide"}}
        message = Message(
            role="assistant", content="ab", parts=(Part(text="a", weight=0.5), Part(text="b", weight=1.0))
        )
        for changes, end in (
            ({}, "<|im_end|>"),
            ({"chat_template_kwargs": {"alt": True}}, "<|endoftext|>"),
            ({"tools": (tool,)}, "<|end|><|eot_id|>"),
        ):
            dialogue = dataclasses.replace(make_dialogue(("user", "?"), message), **changes)
            (sequence,) = render(tokenizer, dialogue, responses=responses)
            ((_, response),) = prompts_and_responses(tokenizer, [sequence])
            self.assertEqual(response, "ab" + end)
            self.assertTrue(sequence.is_verbatim)
            self.assertEqual([one.kind for one in sequence.unwritten], ["tools"] if "tools" in changes else [])
            texts = [tokenizer.decode(sequence.tokens[slice(*span)]) for span in sequence.part_spans]
            self.assertEqual(texts, ["a", "b"])

    def test_reasoning_and_tool_calls_of_another_format_are_the_templates(self):
        message = Message(role="assistant", content="2", fields={"thinking": "Easy."})
        ((_, response),) = self.responses("harmony", ("user", "?"), message)
        self.assertEqual(
            response,
            "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>",
        )
        call = {"type": "function", "function": {"name": "tide", "arguments": {}}}
        message = Message(role="assistant", content="", fields={"tool_calls": [call]})
        ((_, response),) = self.responses("harmony", ("user", "?"), message)
        self.assertEqual(response, " to=tide<|message|>{}<|call|>")

    @parameterized.parameters(
        ({}, "<call>tide</call><|im_end|>"),
        ({"reasoning_content": "I look."}, "I look.\n</think>\n\n<call>tide</call><|im_end|>"),
    )
    def test_tool_calls_behind_a_prompt_that_begins_reasoning_are_the_templates(self, fields, expected):
        template = (
            "{% for m in messages %}" + _ROLE + "{{ m.content.split('</think>')[-1] }}"
            "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|im_end|>\n"
            "{% endfor %}{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"
        )
        call = {"type": "function", "function": {"name": "tide", "arguments": {}}}
        message = Message(role="assistant", content="", fields={"tool_calls": [call], **fields})
        ((prompt, response),) = self.responses(template, ("user", "?"), message)
        self.assertEndsWith(prompt, "<|im_start|>assistant\n<think>\n")
        self.assertEqual(response, expected)

    @parameterized.parameters(
        ("harmony", "I call.", {"tool_calls": [{"function": {"name": "tide", "arguments": {}}}]}, "I call."),
        ("llama3", "2", {"reasoning_content": "Easy."}, "Easy."),
    )
    def test_what_neither_the_content_nor_the_template_can_write_is_refused(self, family, content, fields, lost):
        message = Message(role="assistant", content=content, fields=fields)
        with self.assertRaisesRegex(
            UserError, rf"dialogue 3 \(data.jsonl:4\): message 1 cannot be written verbatim: .*{lost}.*Write all of it"
        ):
            self.responses(family, ("user", "?"), message)

    def test_parts_keep_their_places_although_the_prompt_has_the_beginning_of_the_first(self):
        tokenizer = make_tokenizer("deepseek_r1")
        parts = tuple(Part(text=text, weight=0.5) for text in ("<think>\n12</think>", "abc"))
        message = Message(role="assistant", content="<think>\n12</think>abc", parts=parts)
        (sequence,) = render(tokenizer, make_dialogue(("user", "?"), message), responses="verbatim")
        texts = [tokenizer.decode(sequence.tokens[slice(*span)]) for span in sequence.part_spans]
        self.assertEqual(texts, ["12</think>", "abc"])
        self.assertEqual(sequence.part_spans[0][0], sequence.start)

    def test_responses_that_differ_from_what_is_recorded_are_noted(self):
        for family, content, same in (
            ("llama3", "Hi", True), ("llama3", "Hi ", False), ("qwen3", "Hi", False), ("phi3", "Hi", True),
            ("mistral", "Hi", True), ("command", "Hi", True), ("deepseek_v3", "<think>\na</think>Hi", True),
        ):  # fmt: skip
            dialogue = make_dialogue(("user", "?"), ("assistant", content))
            (rendered,) = render(make_tokenizer(family), dialogue)
            (verbatim,) = render(make_tokenizer(family), dialogue, responses="verbatim")
            self.assertEqual(rendered.is_verbatim, same, (family, content))
            self.assertTrue(verbatim.is_verbatim)
            self.assertEqual(np.array_equal(rendered.tokens, verbatim.tokens), same)


if __name__ == "__main__":
    absltest.main()
