"""Dialogues to text, by the chat template of a tokenizer: the prompts that inference shows and what follows them.

Knows nothing of tokens. The template is run by transformers' own `apply_chat_template`, with all it does to messages.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import transformers

from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.errors import UserError
from dialog_jax.rendering import sandbox
from dialog_jax.rendering.special_tokens import EscapedDialogue, SpecialTokenEscaper

PROBE = "Qx7 zebra"  # stands for a message's content, to find what is around it; any text no template contains
_TURNS_TOGETHER = 4  # rendered in one call
_MARK = "\ue000turn\ue000"  # between the renderings of one call
# A template around the given one. A call of its own for each prompt would copy all messages before it each time.
# The line break behind the first tag goes with it (trim_blocks); the empty output before the second keeps white space
# at the template's end (lstrip_blocks).
_TOGETHER = """\
{%% macro one_rendering(messages, add_generation_prompt) %%}
%s{{ '' }}{%% endmacro %%}
{%%- for count in rendered_counts -%%}
{{ one_rendering(messages[:count], true) }}{{ rendered_mark }}
{{- one_rendering(messages[:count + 1], false) }}{{ rendered_mark }}
{%%- endfor -%%}"""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
      tokenizer: its `chat_template` is set.
      kwargs: further variables of the template, for example `{"enable_thinking": False}`.
      escaper: of the dialogues, if they are guarded; then what is rendered is guarded likewise.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerFast,
        kwargs: Mapping[str, Any] | None = None,
        escaper: SpecialTokenEscaper | None = None,
    ):
        self._tokenizer = tokenizer
        self._escaper = escaper or SpecialTokenEscaper(tokenizer, allow_special_tokens=True)
        self._kwargs = dict(kwargs or {})
        self._alike: dict[str, bool] = {}  # whether a template renders together what it renders one by one

    def text(self, dialogue: Dialogue, count: int, *, add_generation_prompt: bool = False) -> str:
        """The template's rendering of the first `count` messages.

        Raises:
          UserError: the template refuses them; names the dialogue and repeats the template's reason.
        """
        if not count:
            raise UserError(
                f"{dialogue.name}: begins with an assistant message, to which no prompt leads. Put a message before "
                'it, or give it "train": false.'
            )
        try:
            return self._apply(dialogue, count, add_generation_prompt=add_generation_prompt)
        except sandbox.REFUSALS as error:
            roles = ", ".join(message.role for message in dialogue.messages[:count])
            raise UserError(
                f"{dialogue.name}: the chat template refuses its first {count} messages ({roles}): "
                f"{str(error) or type(error).__name__}. Change the dialogue, or pass another chat template."
            ) from error

    def after_response(self) -> str:
        """What is written behind the content of an assistant message that ends a dialogue.

        Raises:
          UserError: the template cannot render one user and one assistant message.
        """
        messages = Message(role="user", content="Hello"), Message(role="assistant", content=PROBE)
        _, found, after = self.text(Dialogue(id="probe", messages=messages), 2).rpartition(PROBE)
        if not found:
            raise UserError("The chat template does not render the content of an assistant message. Use another one.")
        return after

    def turns(self, dialogue: Dialogue) -> Iterator[tuple[int, str, str]]:
        """(message, its prompt, the rendering that ends with it) of each assistant message of weight above 0."""
        messages = enumerate(dialogue.messages)
        indices = [index for index, message in messages if message.role == "assistant" and message.weight > 0]
        for start in range(0, len(indices), _TURNS_TOGETHER):
            part = indices[start : start + _TURNS_TOGETHER]
            yield from self._turns_together(dialogue, part) or self._turns_alone(dialogue, part)

    def _turns_alone(self, dialogue: Dialogue, indices: list[int]) -> Iterator[tuple[int, str, str]]:
        for index in indices:
            yield index, self.text(dialogue, index, add_generation_prompt=True), self.text(dialogue, index + 1)

    def _turns_together(self, dialogue: Dialogue, indices: list[int]) -> list[tuple[int, str, str]]:
        """The same from one call; empty where that cannot be relied on, or the template refuses a part of it."""
        template = self._tokenizer.get_chat_template(tools=_tools(dialogue))
        if not indices[0] or not self._alike.get(template, True):
            return []
        try:
            together = self._apply(
                dialogue,
                indices[-1] + 1,
                chat_template=_TOGETHER % template.removesuffix("\n"),  # as Jinja does at the end of a template
                rendered_counts=indices,
                rendered_mark=_MARK,
            )
        except sandbox.REFUSALS:
            return []
        texts = together.split(_MARK)
        if len(texts) != 2 * len(indices) + 1:  # a message contains the mark
            return []
        turns = list(zip(indices, texts[0::2], texts[1::2], strict=False))
        if template not in self._alike:
            self._alike[template] = turns == list(self._turns_alone(dialogue, indices))
        return turns if self._alike[template] else []

    def _apply(self, dialogue: Dialogue, count: int, **kwargs: Any) -> str:
        """What the template renders; of a guarded dialogue, what stands for that.

        Raises:
          UserError: the template does something to the texts of special tokens but writing them.
        """
        if not isinstance(dialogue, EscapedDialogue):
            return self._run(dialogue, count, **kwargs)
        text = self._run(self._escaper.unescape_dialogue(dialogue), count, **kwargs)
        try:
            guarded = self._run(dialogue, count, **kwargs)
        except sandbox.REFUSALS:  # of marks, where it takes the text itself
            guarded = ""
        if self._escaper.unescape(guarded) != text:
            raise UserError(
                "they spell special tokens, and the template does more with these than to write them. Remove them, or "
                "set allow_special_tokens to have them parsed"
            )
        return guarded

    def _run(self, dialogue: Dialogue, count: int, **kwargs: Any) -> str:
        messages = [message.as_dict() for message in dialogue.messages[:count]]
        return sandbox.render(self._tokenizer, messages, tools=_tools(dialogue), **kwargs, **self._kwargs)


def _tools(dialogue: Dialogue) -> list[Any] | None:
    return [dict(tool) for tool in dialogue.tools] if dialogue.tools else None


def parse_template_kwargs(text: str) -> dict[str, Any]:
    """Returns the variables of a template that a flag --chat_template_kwargs gives as JSON.

    Raises:
      UserError: it is no JSON object.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--chat_template_kwargs is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f'--chat_template_kwargs is {text}; needed an object such as {{"enable_thinking": false}}')
    return found
