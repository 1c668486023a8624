"""Dialogues to sequences: for each supervised response, the tokens that inference sees and those it has to generate.

A response's *prompt* is what the chat template renders of the messages before it, with the generation prompt; the
*response* is what the template adds when the message joins them, up to and including the end-of-turn token (or, with
`responses=verbatim`, what is recorded). This holds for any template, because only its renderings are used. Where the
K prompts of a dialogue are prefixes of its full rendering, the text is tokenized once and cut K times; elsewhere only
what differs is tokenized again.

Knows templates and tokenizers; knows no objective, tree or row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from jaxtyping import Int32

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.rendering import tokenizers, written
from dialog_jax.rendering import virtual_tokens as virtual_tokens_lib
from dialog_jax.rendering.chat_template import PROBE, ChatTemplate
from dialog_jax.rendering.encoder import Encoder, Tokenized
from dialog_jax.rendering.rendered_sequence import RenderedSequence
from dialog_jax.rendering.responses import ResponseFinder
from dialog_jax.rendering.special_tokens import EscapedDialogue, SpecialTokenEscaper
from dialog_jax.rendering.template_process import TemplateStopped
from dialog_jax.rendering.token_spans import NewSpans, SpanFinder
from dialog_jax.rendering.virtual_tokens import VirtualTokens

_SHARED_PREFIXES_KEPT = 4096
_CHARACTERS_PER_TOKEN = 6  # of max_length: how much of a text is tokenized at once; the rest is tokenized turn by turn


class Renderer:
    """Renders dialogues with a tokenizer and its chat template.

    Args:
      tokenizer: a fast tokenizer whose `chat_template` is set.
      chat_template_kwargs: further variables of the template, for example `{"enable_thinking": False}`.
      allow_special_tokens: parse special tokens that the texts of a dialogue spell; otherwise they are ordinary text.
      template_time: an ISO date or time that a template which reads the clock takes for the current one; empty for now.
      responses: `rendered` as the template renders them, `verbatim` as they are recorded.
      virtual_tokens: of a soft prompt; they stand in front of the tokens of every sequence and prompt.

    Raises:
      UserError: the template cannot render one user and one assistant message.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerFast,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
        template_time: str = "",
        responses: str = "rendered",
        virtual_tokens: VirtualTokens = virtual_tokens_lib.NONE,
    ):
        self.responses = responses
        self.virtual_tokens = virtual_tokens
        self.stop_tokens = tokenizers.read_stop_tokens(tokenizer)
        """Ids at which generation stops by the files of the tokenizer and its model; empty if they name none."""
        self.allow_special_tokens = allow_special_tokens
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._escaper = SpecialTokenEscaper(tokenizer, allow_special_tokens=allow_special_tokens)
        self._template = ChatTemplate(tokenizer, chat_template_kwargs, self._escaper, template_time)
        self._encoder = Encoder(tokenizer, self._template.frame_response(), self._escaper, self.stop_tokens)
        self._finder = ResponseFinder(self._template, self._encoder, responses)
        self._shared_prefixes: dict[str, Int32[np.ndarray, " n"]] = {}

    def __reduce__(self) -> tuple[Callable[..., "Renderer"], tuple[Any, ...]]:
        """Returns the pickled form: the arguments, from which another process makes its own renderer."""
        make = functools.partial(
            Renderer,
            chat_template_kwargs=self.chat_template_kwargs,
            allow_special_tokens=self.allow_special_tokens,
            template_time=self.template_time,
            responses=self.responses,
            virtual_tokens=self.virtual_tokens,
        )
        return make, (self.tokenizer,)

    def with_responses(self, responses: str) -> "Renderer":
        """Returns a renderer that differs in `responses` only."""
        return self._replace(responses=responses)

    def with_virtual_tokens(self, virtual_tokens: VirtualTokens) -> "Renderer":
        """Returns a renderer that differs in `virtual_tokens` only."""
        return self._replace(virtual_tokens=virtual_tokens)

    def _replace(self, **changes: Any) -> "Renderer":
        make, arguments = self.__reduce__()
        return make(*arguments, **changes)

    @property
    def template_time(self) -> str:
        """The ISO time that the template takes for the current one; empty if it reads no clock."""
        return self._template.time

    @property
    def end_of_turn(self) -> int | None:
        """The id of the special token that the template writes after a response; None if it writes none."""
        return self._encoder.end_of_turn

    def render_text(self, dialogue: Dialogue, count: int, *, add_generation_prompt: bool = False) -> str:
        """Returns the template's rendering of the first `count` messages; raises what `ChatTemplate.text` does."""
        escaped = self._escaper.escape_dialogue(dialogue)
        return self._escaper.unescape(self._template.text(escaped, count, add_generation_prompt=add_generation_prompt))

    def render_texts(self, dialogue: Dialogue) -> list[str]:
        """Returns the rendering of all messages, and of each supervised response the prompt and the rendering with it.

        Raises:
          UserError: the template refuses one of them.
        """
        dialogue = self._escaper.escape_dialogue(dialogue)
        texts = [self._template.text(dialogue, len(dialogue.messages))]
        texts += [text for _, prompt, rendered in self._template.turns(dialogue) for text in (prompt, rendered)]
        return [self._escaper.unescape(text) for text in texts]

    def render(
        self,
        dialogues: Sequence[Dialogue],
        *,
        max_length: int = 0,
        full: bool = False,
        locate: Callable[[Message], bool] | None = None,
    ) -> list[Iterator[RenderedSequence]]:
        """Returns for each dialogue an iterator over the sequences of its assistant messages of weight > 0, in order.

            <user> Hi <end> <assistant> Hello <end> \\n <user> Bye <end> <assistant> Ciao <end> \\n
            |-------- prompt 0 -------| |response 0|
            |--------------------------- prompt 1 ----------------------------| |response 1|

        With a soft prompt, its tokens stand in front of each prompt.

        Args:
          dialogues: a batch, tokenized together.
          max_length: sequences of more tokens than this are left out; 0 for no limit. Above the length of a soft
            prompt, which counts.
          full: append the rendering of all messages, for objectives that train on every token.
          locate: whether a message's span is needed in `message_spans`.

        Raises:
          UserError: the template refuses a dialogue. While the iterators are read: no response continues its prompt,
            the template does not render weighted parts as they are, or (with `locate`) a message changes more than
            its own part of the text. `ResponseLost`: the template writes nothing of what a response says.
        """
        virtual = self.virtual_tokens.count
        assert not max_length or max_length > virtual, (max_length, virtual)
        max_length -= virtual if max_length else 0
        dialogues = [self._escaper.escape_dialogue(dialogue) for dialogue in dialogues]
        texts = [self._template.text(dialogue, len(dialogue.messages)) for dialogue in dialogues]
        beginnings = self._encoder.tokenize([text[: max_length * _CHARACTERS_PER_TOKEN or None] for text in texts])
        sequences = [
            self._sequences(dialogue, text, beginning, max_length, full, locate)
            for dialogue, text, beginning in zip(dialogues, texts, beginnings, strict=True)
        ]
        return [(one.prepend(self.virtual_tokens) for one in each) for each in sequences] if virtual else sequences

    def encode_prompt(self, dialogue: Dialogue) -> Int32[np.ndarray, " n"]:
        """Returns the token ids of all messages and the generation prompt, which a reply to the dialogue continues.

        With a soft prompt, its tokens come first.
        """
        dialogue = self._escaper.escape_dialogue(dialogue)
        text = self._template.text(dialogue, len(dialogue.messages), add_generation_prompt=True)
        return self.virtual_tokens.prepend(self._encoder.encode(text))

    def encode_bare_prompt(self, dialogue: Dialogue) -> tuple[Int32[np.ndarray, " n"], bool]:
        """Returns (the token ids of `ChatTemplate.bare_prompt`, whether an empty user message precedes it).

        With a soft prompt, its tokens come first.
        """
        dialogue = self._escaper.escape_dialogue(dataclasses.replace(dialogue, messages=(), parents=()))
        text, follows_empty_message = self._template.bare_prompt(dialogue)
        return self.virtual_tokens.prepend(self._encoder.encode(text)), follows_empty_message

    def encode_shared_prefix(self, dialogue: Dialogue) -> Int32[np.ndarray, " n"]:
        """Returns the token ids of what precedes the content of the first message that is not a system message.

        It is the same for all dialogues with the same system prompt and tools. Only the tokens of a soft prompt, or
        none, if the template refuses to render such a beginning by itself.
        """
        return self.virtual_tokens.prepend(self._encode_system_prompt(self._escaper.escape_dialogue(dialogue)))

    def _encode_system_prompt(self, dialogue: Dialogue) -> Int32[np.ndarray, " n"]:
        """Returns `encode_shared_prefix` of an escaped dialogue, without a soft prompt."""
        first = next((i for i, message in enumerate(dialogue.messages) if message.role != "system"), None)
        if first is None:
            return np.zeros(0, np.int32)
        beginning = (*dialogue.messages[:first], Message(role=dialogue.messages[first].role, content=PROBE))
        key = repr((beginning, dialogue.tools, dialogue.chat_template_kwargs))
        if key not in self._shared_prefixes:
            if len(self._shared_prefixes) == _SHARED_PREFIXES_KEPT:
                self._shared_prefixes.clear()
            try:
                text = self._template.text(dataclasses.replace(dialogue, messages=beginning, parents=()), first + 1)
            except TemplateStopped:
                raise
            except UserError:
                text = ""
            before, probe, _ = text.partition(PROBE)
            self._shared_prefixes[key] = self._encoder.encode(before if probe else "")
        return self._shared_prefixes[key]

    def _sequences(
        self,
        dialogue: Dialogue,
        full_text: str,
        beginning: Tokenized,
        max_length: int,
        full: bool,
        locate: Callable[[Message], bool] | None,
    ) -> Iterator[RenderedSequence]:
        indices = [i for i, message in enumerate(dialogue.messages) if locate is not None and locate(message)]
        finder = SpanFinder(self._template, self._encoder, dialogue)
        new_spans = NewSpans(finder, indices)
        roles = [message.role for message in dialogue.messages]
        plain = self._escaper.unescape_dialogue(dialogue) if isinstance(dialogue, EscapedDialogue) else dialogue
        checked = 0  # number of messages that were looked for in a prompt
        too_long = self._encoder.find_longer(beginning, max_length) if max_length else ""
        references = [beginning]
        for index, prompt, rendered in self._template.turns(dialogue):
            if too_long and prompt.startswith(too_long):
                return  # the rendering of all messages begins so, too, and hence all prompts between
            prompt_tokens = self._encoder.tokenize_like(prompt, references)
            start = len(prompt_tokens.ids)
            response = self._finder.find(dialogue, index, prompt, rendered)
            text = prompt + response.text
            complete = self._tokenize_response(dialogue, index, prompt_tokens, text, beginning)
            tokenized = complete.cut(text, start + self._encoder.response_length(complete.ids[start:]))
            if max_length and len(tokenized.ids) > max_length:
                continue
            if np.array_equal(tokenized.ids, beginning.ids[: len(tokenized.ids)]):  # share memory
                tokenized = tokenized._replace(ids=beginning.ids[: len(tokenized.ids)])
            references = [beginning, complete]
            message_spans = new_spans.find(tokenized.cut(prompt, start), index, is_prompt=True)
            new_spans.end_sequence(tokenized.ids, index)
            part_spans = finder.find_response_parts(tokenized, index, start, len(prompt))
            turn = roles[:index].count("assistant")
            end = int(tokenized.ends[-1]) if len(tokenized.ends) else 0
            is_verbatim = self._finder.is_verbatim(dialogue, index, prompt, rendered, text[len(prompt) : end])
            unwritten = written.find_unwritten(
                plain,
                index,
                checked,
                prompt=self._escaper.unescape(prompt),
                response=self._escaper.unescape(text[len(prompt) : end]),
                end=self._finder.find_end(dialogue),
                reads_tools=bool(checked) or self._template.reads_tools(dialogue, index, prompt),
            )
            checked = index
            yield RenderedSequence(
                tokenized.ids,
                start,
                index,
                turn,
                message_spans,
                part_spans,
                response.changes_history,
                is_verbatim,
                tuple(unwritten),
            )
        if full:
            tokenized = self._encoder.tokenize_like(full_text, [beginning])
            if not max_length or len(tokenized.ids) <= max_length:
                message_spans = new_spans.find(tokenized, len(roles), is_prompt=False)
                others = written.find_in_prompt(
                    plain.messages, range(checked, len(roles)), self._escaper.unescape(full_text)
                )
                yield RenderedSequence(
                    tokenized.ids, len(tokenized.ids), -1, -1, message_spans, unwritten=tuple(others)
                )

    def _tokenize_response(
        self, dialogue: Dialogue, index: int, prompt: Tokenized, text: str, beginning: Tokenized
    ) -> Tokenized:
        """Returns the prompt's tokens and those of the response of message `index`, which ends `text`."""
        start = len(prompt.ids)
        tokenized = self._encoder.tokenize_like(text, [beginning, prompt])
        if np.array_equal(tokenized.ids[:start], prompt.ids):
            return tokenized
        # A token crosses from prompt to response: inference fixes the prompt's tokens first.
        response = text[len(prompt.text) :]
        continued = prompt.append(text, self._encoder.tokenize_continuation(response))
        if not self._encoder.decodes_equal(continued.ids, tokenized.ids):
            raise UserError(
                f"{dialogue.name}: the response of message {index} has no tokens that continue its prompt: tokens "
                f"cross from {self._escaper.unescape(prompt.text[-20:])!r} to "
                f"{self._escaper.unescape(response[:20])!r}. Pass a chat template that ends the "
                "generation prompt where a token ends."
            )
        return continued
