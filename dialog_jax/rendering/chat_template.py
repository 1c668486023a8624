"""Dialogues to text, by the chat template of a tokenizer: the prompts that inference shows and what follows them.

Knows nothing of tokens. Texts are those of transformers' own `apply_chat_template`, which may also change messages.
"""

import contextlib
import dataclasses
import datetime
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import transformers

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.rendering import refused_fields, template_process, template_rendering
from dialog_jax.rendering.special_tokens import EscapedDialogue, SpecialTokenEscaper
from dialog_jax.rendering.template_process import TemplateStopped
from dialog_jax.rendering.template_rendering import Job, Rendering

PROBE = "Qx7 zebra"
"""Replaces a message's content to find what the template writes around it; no template contains this text."""
_TURNS_PER_REQUEST = 8
_CHARACTERS_PER_REQUEST = 1 << 22  # approximate length of the rendered texts; a request has at least one turn


_NEXT_PROBE = "Qx9 okapi"
"""Replaces the content of the message after it."""
_TOOL = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {"type": "object"}}}


class TemplateRefused(UserError):
    """The template refuses a dialogue."""


class ResponseFrame(NamedTuple):
    """What a template writes around the content of an assistant message.

    prompt     <user> Hello <end> <assistant> <think>
    last       <user> Hello <end> <assistant> Qx7 zebra <end> <eos>
    followed   <user> Hello <end> <assistant> Qx7 zebra <end> <user> Qx9 okapi <end>
    """

    prefill: str
    """What the generation prompt has in addition to what history has before a content: `<think>`."""
    lead: str
    """What history has before a content in addition to the generation prompt; the model writes it."""
    after: str
    """What follows the content of the last message: `<end> <eos>`."""
    following: str
    """What follows a content up to that of a user message: `<end> <user>`; empty if the template refuses the latter."""
    header: str = ""
    """What follows a user's content, if the template begins a response whether or not it is asked to: `<end>
    <assistant>`. Then it may follow the content of the last message, too."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
      tokenizer: its `chat_template` is set.
      kwargs: further variables of the template, for example `{"enable_thinking": False}`.
      escaper: the one that escaped the dialogues; the rendered text is then escaped, too. None for plain dialogues.
      time: an ISO date or time that the template takes for the current one; empty for now.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerFast,
        kwargs: Mapping[str, Any] | None = None,
        escaper: SpecialTokenEscaper | None = None,
        time: str = "",
    ):
        self._tokenizer = tokenizer
        self._escaper = escaper or SpecialTokenEscaper(tokenizer, allow_special_tokens=True)
        self._variables = {**tokenizer.special_tokens_map, **(kwargs or {})}
        self.time = ""
        """The time that the template takes for the current one; empty if it reads no clock."""
        if template_rendering.CLOCK in str(tokenizer.chat_template):
            self.time = time or datetime.datetime.now().isoformat(timespec="seconds")
            self._variables[template_rendering.TIME] = self.time
        name = pathlib.Path(tokenizer.name_or_path).name
        self._name = f"{name}: the chat template" if name else "the chat template"

    def contains(self, text: str) -> bool:
        """Returns whether the template itself contains a text."""
        return text in str(self._tokenizer.chat_template)

    def text(self, dialogue: Dialogue, count: int, *, add_generation_prompt: bool = False) -> str:
        """Returns the template's rendering of the first `count` messages.

        Raises:
          TemplateRefused: the template refuses them; names the dialogue and repeats the template's reason.
          TemplateStopped: it was stopped.
        """
        (text,) = self._render_texts(dialogue, [Job(count, add_generation_prompt)])
        return text

    def turns(self, dialogue: Dialogue) -> Iterator[tuple[int, str, str]]:
        """Yields (message index, its prompt, the rendering that ends with it) of the responses of weight above 0.

        Raises:
          UserError: what `text` raises, after the earlier turns have been yielded.
        """
        messages = enumerate(dialogue.messages)
        indices = [index for index, message in messages if message.role == "assistant" and message.weight > 0]
        size = 1 + sum(len(message.content) for message in dialogue.messages)
        count = max(1, min(_TURNS_PER_REQUEST, _CHARACTERS_PER_REQUEST // (2 * size)))
        for start in range(0, len(indices), count):
            group = indices[start : start + count]
            texts = self._render_texts(dialogue, [job for index in group for job in (Job(index, True), Job(index + 1))])
            for index in group:
                yield index, next(texts), next(texts)

    def bare_prompt(self, dialogue: Dialogue) -> tuple[str, bool]:
        """Returns (the generation prompt behind no message, False), for the variables of a dialogue.

        prompt    <bos><user> Qx7 zebra <end> <assistant>
        history   <bos><user> Qx7 zebra <end>
        returned  <bos><assistant>

        If the template writes nothing after a history, (the prompt behind an empty user message without tools, True).

        Raises:
          UserError: the template refuses a user message alone.
        """
        probe = dataclasses.replace(dialogue, messages=(Message(role="user", content=PROBE),), parents=())
        history, prompt = self._render_texts(probe, [Job(1), Job(1, True)])
        header = prompt.removeprefix(history) if prompt.startswith(history) else ""
        if header.strip():
            bos = self._variables.get("bos_token") or ""  # of some tokenizers, with it begins every message
            has_bos = history.startswith(bos) and not header.startswith(bos)
            return (bos if has_bos else "") + header, False
        empty = dataclasses.replace(probe, tools=None, messages=(Message(role="user", content=""),))
        return self.text(empty, 1, add_generation_prompt=True), True

    def reads_tools(self, dialogue: Dialogue, index: int, prompt: str) -> bool:
        """Returns whether the prompt of message `index` is another one without the dialogue's tools, or refused."""
        if not dialogue.tools:
            return False
        try:
            return self.text(dataclasses.replace(dialogue, tools=None), index, add_generation_prompt=True) != prompt
        except TemplateStopped:
            raise
        except UserError:
            return True

    @property
    def has_tool_template(self) -> bool:
        """Whether dialogues with tools have a template of their own."""
        return isinstance(self._tokenizer.chat_template, Mapping) and "tool_use" in self._tokenizer.chat_template

    def frame_response(
        self, chat_template_kwargs: Mapping[str, Any] | None = None, *, with_tools: bool = False
    ) -> ResponseFrame:
        """Returns what the template writes around the content of an assistant message.

        Args:
          chat_template_kwargs: further variables, as a dialogue may have them.
          with_tools: whether the dialogue has tools.

        Raises:
          UserError: the template cannot render one user and one assistant message.
        """
        contents = ("user", "Hello"), ("assistant", PROBE), ("user", _NEXT_PROBE)
        messages = tuple(Message(role=role, content=content) for role, content in contents)
        probe = Dialogue(
            id="probe",
            messages=messages,
            tools=(_TOOL,) if with_tools else None,
            chat_template_kwargs=chat_template_kwargs or {},
        )
        jobs = [Job(1, True), Job(2), Job(3)]
        try:
            rendering = self._render(probe, jobs)
            if not rendering.texts:  # some templates are for dialogues with tools only
                with_tool = dataclasses.replace(probe, tools=(_TOOL,))
                if (other := self._render(with_tool, jobs)).texts:
                    probe, rendering = with_tool, other
            question = self._render(probe, [Job(1)]).texts
        except TemplateStopped as error:
            raise TemplateStopped(f"{self._name} was stopped: {error}. Pass another chat template.") from None
        if len(rendering.texts) < 2:
            raise UserError(
                f"{self._name} cannot render a user and an assistant message: {rendering.refusal}. Correct it, or pass "
                "another chat template."
            )
        prompt, last = rendering.texts[:2]
        before, content, after = last.rpartition(PROBE)
        if not content:
            raise UserError(
                f"{self._name} does not render the content of an assistant message. Pass another chat template."
            )
        following = ""
        if len(rendering.texts) == 3:
            before, _, rest = rendering.texts[2].partition(PROBE)
            following = rest.partition(_NEXT_PROBE)[0]
        prefill = prompt.removeprefix(before) if prompt.startswith(before) else ""
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        header = prompt.rpartition(contents[0][1])[2] if question == [prompt] else ""
        return ResponseFrame(prefill, lead, after, following, header)

    def _render_texts(self, dialogue: Dialogue, jobs: Sequence[Job]) -> Iterator[str]:
        """Yields the texts of the jobs."""
        if not jobs[0].messages:
            raise UserError(
                f"{dialogue.name}: begins with an assistant message, to which no prompt leads. Put a message before "
                'it, or give it "train": false.'
            )
        try:
            rendering = self._render(dialogue, jobs)
        except TemplateStopped as error:
            raise TemplateStopped(
                f"{dialogue.name}: the chat template was stopped: {error}. Pass another chat template, or shorten the "
                "dialogue if it is very long."
            ) from None
        yield from rendering.texts
        if len(rendering.texts) < len(jobs):
            raise self._make_refusal(dialogue, jobs[len(rendering.texts)], rendering.refusal)

    def _make_refusal(self, dialogue: Dialogue, job: Job, reason: str) -> TemplateRefused:
        """Returns the error of a job that the template refuses, with the field in which it is if that is known."""
        plain = self._escaper.unescape_dialogue(dialogue) if isinstance(dialogue, EscapedDialogue) else dialogue

        def is_refused(other: Dialogue) -> bool:
            return not self._run(other, [job]).texts

        change = ""
        with contextlib.suppress(TemplateStopped):
            change = refused_fields.find_change(plain, job.messages, is_refused) if is_refused(plain) else ""
        roles = ", ".join(message.role for message in dialogue.messages[: job.messages])
        remedy = f"It accepts them {change}; change the dialogue" if change else "Change the dialogue"
        return TemplateRefused(
            f"{dialogue.name}: the chat template refuses its first {job.messages} messages ({roles}): {reason}. "
            f"{remedy}, pass another chat template, or leave out what it refuses with data.on_error=skip."
        )

    def _render(self, dialogue: Dialogue, jobs: Sequence[Job]) -> Rendering:
        """Returns what the template renders; of an escaped dialogue, escaped and compared with the plain rendering."""
        if not isinstance(dialogue, EscapedDialogue):
            return self._run(dialogue, jobs)
        plain = self._run(self._escaper.unescape_dialogue(dialogue), jobs)
        escaped = self._run(dialogue, jobs)
        equal = [self._escaper.unescape(one) == two for one, two in zip(escaped.texts, plain.texts, strict=False)]
        if all(equal) and len(escaped.texts) >= len(plain.texts):
            return Rendering(escaped.texts[: len(plain.texts)], plain.refusal)
        return Rendering(
            escaped.texts[: [*equal, False].index(False)],
            "they spell special tokens, and the template does more with these than write them. Remove them, or "
            "set allow_special_tokens to have them parsed",
        )

    def _run(self, dialogue: Dialogue, jobs: Sequence[Job]) -> Rendering:
        tools = [dict(tool) for tool in dialogue.tools] if dialogue.tools else None
        try:
            template = self._tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # there are several templates, and none of them is the default
            return Rendering([], str(error))
        messages = [message.as_dict() for message in dialogue.messages[: max(job.messages for job in jobs)]]
        variables = {"tools": tools, **self._variables, **dialogue.chat_template_kwargs}
        return template_process.render(template, messages, jobs, variables)
