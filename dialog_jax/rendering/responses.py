"""The text of a response: what the model has to generate after the prompt that inference shows.

With `rendered`, what the chat template writes when the message joins its history. With `verbatim`, the recorded content
and the template's end of turn. Texts may be escaped. Knows no tokens.
"""

import dataclasses
from typing import NamedTuple

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.rendering.chat_template import PROBE, ChatTemplate, ResponseFrame
from dialog_jax.rendering.special_tokens import SpecialTokenEscaper
from dialog_jax.rendering.template_process import TemplateStopped
from dialog_jax.rendering.written import REASONING_FIELDS

_OPENING, _CLOSING = "<think>", "</think>"


class Response(NamedTuple):
    """What follows a prompt."""

    text: str
    """Up to the end of what is rendered; the response may end earlier."""
    changes_history: bool = False
    """Whether the rendering with the response does not begin with the prompt."""


class ResponseFinder:
    """Finds the responses of dialogues.

    Args:
      template: renders them.
      frame: what the template writes around a response.
      response_end: what it writes after a response's content, up to the end of the response.
      escaper: the one that escaped the dialogues.
      kind: `rendered` or `verbatim`.
    """

    def __init__(
        self, template: ChatTemplate, frame: ResponseFrame, response_end: str, escaper: SpecialTokenEscaper, kind: str
    ):
        self._template = template
        self._frames = {"{}": frame}  # by the further variables of a dialogue
        self._response_end = response_end
        self._escaper = escaper
        self._kind = kind

    def find(self, dialogue: Dialogue, index: int, prompt: str, rendered: str) -> Response:
        """Returns the response of message `index`.

        Args:
          prompt: the rendering of the messages before it, with the generation prompt.
          rendered: the rendering that ends with it.

        Raises:
          UserError: the template does not render a continuation of the prompt, or the message has fields that cannot be
            written verbatim.
        """
        if self._kind == "rendered":
            return self._find_rendered(dialogue, index, prompt, rendered)
        return Response(self._write_verbatim(dialogue, index, prompt, rendered))

    def is_verbatim(self, dialogue: Dialogue, index: int, prompt: str, rendered: str, response: str) -> bool:
        """Returns whether a response is what `verbatim` makes of message `index`."""
        try:
            verbatim = self._write_verbatim(dialogue, index, prompt, rendered)
        except TemplateStopped:
            raise
        except UserError:
            return False
        return verbatim.rstrip() == response.rstrip()  # white space may belong to the token before it

    def _find_rendered(self, dialogue: Dialogue, index: int, prompt: str, rendered: str) -> Response:
        """Returns what the template writes after the prompt.

        If what it renders begins otherwise than the prompt, the response is what follows the last place that ends the
        way the prompt ends. That is found by another content in the message before, which marks the end of history:

            prompt      [INST] Be brief. Largest planet? [/INST]       ends with " [/INST]" after the content
            rendered    [INST] Largest planet? [/INST] Jupiter <eos>
            probed      [INST] Qx7 zebra [/INST] Jupiter <eos>         the response is " Jupiter <eos>"
        """
        if rendered.startswith(prompt):
            return Response(rendered[len(prompt) :])
        prompt_end, header, rest = self._probe_history(dialogue, index)
        # The place has to be there without the probe, too.
        if prompt_end.strip() and prompt.endswith(prompt_end) and rendered.endswith(rest):
            if rest.startswith(prompt_end):
                return Response(rest.removeprefix(prompt_end), changes_history=True)
            end, found, response = rest.partition(header) if header.strip() else ("", "", "")
            if found and prompt_end.removesuffix(header).startswith(end):  # the rendering leaves out the message's end
                return Response(response, changes_history=True)
        difference = _describe_difference(self._escaper.unescape(prompt), self._escaper.unescape(rendered))
        raise UserError(
            f"{dialogue.name}: with message {index} the chat template does not begin with the prompt that "
            f"inference shows: {difference}. Responses cannot be trained as they would be generated; "
            f"{'set data.responses=verbatim to train what is recorded, ' if self._kind == 'rendered' else ''}"
            "merge assistant messages that follow each other, set chat_template_kwargs (such as enable_thinking) or "
            "pass another chat template."
        )

    def _probe_history(self, dialogue: Dialogue, index: int) -> tuple[str, str, str]:
        """Returns what follows the content of the message before message `index`.

        Of three texts: its prompt, what only the generation prompt has of that, and the rendering with the message. All
        are empty if the content is not rendered, or the template refuses another one.
        """
        messages = list(dialogue.messages[: index + 1])
        messages[index - 1] = dataclasses.replace(messages[index - 1], content=PROBE, parts=())
        probed = dataclasses.replace(dialogue, messages=tuple(messages), parents=())
        try:
            history = self._template.text(probed, index)
            prompt = self._template.text(probed, index, add_generation_prompt=True)
            rendered = self._template.text(probed, index + 1)
        except TemplateStopped:
            raise
        except UserError:
            return "", "", ""
        header = prompt.removeprefix(history) if prompt.startswith(history) else ""
        _, in_prompt, prompt_end = prompt.rpartition(PROBE)
        _, in_rendered, rest = rendered.rpartition(PROBE)
        return (prompt_end, header, rest) if in_prompt and in_rendered else ("", "", "")

    def _write_verbatim(self, dialogue: Dialogue, index: int, prompt: str, rendered: str) -> str:
        """Returns the recorded content of a message, less what the prompt has of it, and the end of the response.

        What only a template can write, tool calls and reasoning of a format of its own, is taken from its rendering, if
        that has the content and the reasoning, too.
        """
        message, frame = dialogue.messages[index], self._get_frame(dialogue)
        reasoning = _get_reasoning(message)
        has_tags = self._template.contains(_CLOSING)
        prefill = frame.prefill if prompt.endswith(frame.prefill) else ""
        if message.fields.get("tool_calls") or (reasoning and not has_tags):
            beginning = prompt.removesuffix(prefill)
            if prefill and not rendered.startswith(prompt) and rendered.startswith(beginning):
                text = rendered[len(beginning) :]
            else:
                text = self._find_rendered(dialogue, index, prompt, rendered).text
            end = text.rfind(self._response_end)
            text = text if end < 0 else text[: end + len(self._response_end)]
            lost = [part for part in (message.content, reasoning) if part.strip() not in text]
            if lost == [reasoning] and has_tags:
                text, lost = _write_reasoning(reasoning) + text, []
            if lost:
                what = "tool_calls" if message.fields.get("tool_calls") else "reasoning"
                raise UserError(
                    f"{dialogue.name}: message {index} cannot be written verbatim: its {what} can only be written by "
                    f"the chat template, which leaves out {self._escaper.unescape(lost[0])[:60]!r}. Write all of it "
                    "into the content as the model has to generate it, or pass another chat template."
                )
            return _subtract(prefill, text)
        text = (_write_reasoning(reasoning) if reasoning else "") + message.content
        return frame.lead + _subtract(prefill, text) + self._response_end

    def _get_frame(self, dialogue: Dialogue) -> ResponseFrame:
        """Returns what the template writes around a response of a dialogue, with its variables."""
        key = repr(dict(dialogue.chat_template_kwargs))
        if key not in self._frames:
            self._frames[key] = self._template.frame_response(dialogue.chat_template_kwargs)
        return self._frames[key]


def _get_reasoning(message: Message) -> str:
    """Returns the reasoning that a message has in a field of its own, or an empty text."""
    values = (message.fields.get(field) for field in REASONING_FIELDS)
    return next((value for value in values if isinstance(value, str) and value), "")


def _write_reasoning(reasoning: str) -> str:
    """Returns reasoning as a block in front of an answer."""
    stripped = reasoning.strip("\n")
    return f"{_OPENING}\n{stripped}\n{_CLOSING}\n\n"


def _subtract(prefill: str, text: str) -> str:
    """Returns a text without what the prompt already has of it, white space at the end of that aside."""
    for beginning in (prefill, prefill.rstrip()):
        if beginning and text.startswith(beginning):
            return text[len(beginning) :]
    return text


def _describe_difference(prompt: str, rendered: str) -> str:
    """Returns a description of the first difference of two texts, with the text around it."""
    pairs = enumerate(zip(prompt, rendered, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(rendered)))
    before = prompt[max(0, place - 30) : place]
    one, two = prompt[place : place + 30], rendered[place : place + 30]
    return f"after {before!r} the prompt has {one!r}, the rendering {two!r}"
