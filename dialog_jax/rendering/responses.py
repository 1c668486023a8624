"""The text of a response: what the model has to generate after the prompt that inference shows.

With `rendered`, what the chat template writes when the message joins its history. With `verbatim`, the recorded content
and the template's end of turn. Texts may be escaped. Knows no tokens.
"""

import dataclasses
from typing import NamedTuple

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering import reasoning
from dialog_jax.rendering.chat_template import PROBE, ChatTemplate, ResponseFrame
from dialog_jax.rendering.encoder import Encoder
from dialog_jax.rendering.template_process import TemplateStopped


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
      encoder: knows with which of a template's special tokens a response ends.
      kind: `rendered` or `verbatim`.
    """

    def __init__(self, template: ChatTemplate, encoder: Encoder, kind: str):
        self._template = template
        self._encoder = encoder
        self._escaper = encoder.escaper
        self._kind = kind
        # By the further variables of a dialogue, and whether a template for dialogues with tools renders it.
        self._frames: dict[tuple[str, bool], tuple[ResponseFrame, str]] = {}

    def find_end(self, dialogue: Dialogue) -> str:
        """Returns what the template writes after the content of a response, up to the end of the response."""
        try:
            return self._get_frame(dialogue)[1]
        except TemplateStopped:
            raise
        except UserError:  # with the variables of the dialogue, the template refuses a plain one
            return self._encoder.response_end

    def find(self, dialogue: Dialogue, index: int, prompt: str, rendered: str) -> Response:
        """Returns the response of message `index`.

        Args:
          prompt: the rendering of the messages before it, with the generation prompt.
          rendered: the rendering that ends with it.

        Raises:
          UserError: the template does not render a continuation of the prompt, the message has fields that cannot be
            written verbatim, or reasoning both in a field and in its content.
        """
        if self._kind == "rendered":
            response = self._find_rendered(dialogue, index, prompt, rendered)
        else:
            response = Response(self._write_verbatim(dialogue, index, prompt, rendered))
        message = dialogue.messages[index]
        has_two = reasoning.get_field(message) and message.content.lstrip().startswith(reasoning.OPENING)
        if has_two and response.text.count(reasoning.CLOSING) > message.content.count(reasoning.CLOSING):
            raise UserError(
                f"{dialogue.name}: message {index} has reasoning in a field of its own and between {reasoning.OPENING} "
                f"and {reasoning.CLOSING} in its content, and both would be written. Remove one of them."
            )
        return response

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
        message = dialogue.messages[index]
        frame, response_end = self._get_frame(dialogue)
        in_field = reasoning.get_field(message)
        has_tags = self._template.contains(reasoning.CLOSING)
        prefill = frame.prefill if prompt.endswith(frame.prefill) else ""
        if message.fields.get("tool_calls") or (in_field and not has_tags):
            beginning = prompt.removesuffix(prefill)
            if prefill and not rendered.startswith(prompt) and rendered.startswith(beginning):
                text = rendered[len(beginning) :]
            else:
                text = self._find_rendered(dialogue, index, prompt, rendered).text
            end = text.rfind(response_end)
            text = text if end < 0 else text[: end + len(response_end)]
            lost = [part for part in (message.content, in_field) if part.strip() not in text]
            if lost == [in_field] and has_tags:
                text, lost = reasoning.write_block(in_field) + text, []
            if lost:
                what = "tool_calls" if message.fields.get("tool_calls") else "reasoning"
                raise UserError(
                    f"{dialogue.name}: message {index} cannot be written verbatim: its {what} can only be written by "
                    f"the chat template, which leaves out {self._escaper.unescape(lost[0])[:60]!r}. Write all of it "
                    "into the content as the model has to generate it, or pass another chat template."
                )
            return _subtract(prefill, text)
        text = (reasoning.write_block(in_field) if in_field else "") + message.content
        return frame.lead + _subtract(prefill, text) + response_end

    def _get_frame(self, dialogue: Dialogue) -> tuple[ResponseFrame, str]:
        """Returns (what the template writes around a response of a dialogue, the end of the response in it)."""
        with_tools = bool(dialogue.tools) and self._template.has_tool_template
        key = repr(dict(dialogue.chat_template_kwargs)), with_tools
        if key not in self._frames:
            frame = self._template.frame_response(dialogue.chat_template_kwargs, with_tools=with_tools)
            self._frames[key] = frame, self._encoder.find_ending(frame).text
        return self._frames[key]


def _subtract(prefill: str, text: str) -> str:
    """Returns a text without what the prompt already has of it, white space around that aside."""
    if prefill and text.startswith(prefill):
        return text[len(prefill) :]
    stripped = text.lstrip()
    for beginning in (prefill.lstrip(), prefill.strip()):
        if beginning and stripped.startswith(beginning):
            return stripped[len(beginning) :]
    return text


def _describe_difference(prompt: str, rendered: str) -> str:
    """Returns a description of the first difference of two texts, with the text around it."""
    pairs = enumerate(zip(prompt, rendered, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(rendered)))
    before = prompt[max(0, place - 30) : place]
    one, two = prompt[place : place + 30], rendered[place : place + 30]
    return f"after {before!r} the prompt has {one!r}, the rendering {two!r}"
