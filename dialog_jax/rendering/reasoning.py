"""Reasoning of messages: in a field of its own, or in the content between tags. Knows no template and no tokens."""

import re

from dialog_jax.dialogues.dialogue import Message

FIELDS = ("reasoning_content", "reasoning", "thinking")  # in the order of transformers
OPENING, CLOSING = "<think>", "</think>"
"""The tags in which reasoning of a field is written."""
_TAG = re.compile(r"<(/?)(?:seed:)?(?:think|thinking|thought|reasoning)>|\[(/?)THINK\]")
_TAG_LENGTH = 32  # characters at the end of a prompt that may be an opening tag and white space


def get_field(message: Message) -> str:
    """Returns the reasoning that a message has in a field of its own, or an empty text."""
    values = (message.fields.get(field) for field in FIELDS)
    return next((value for value in values if isinstance(value, str) and value), "")


def write_block(reasoning: str) -> str:
    """Returns reasoning as a block in front of an answer."""
    stripped = reasoning.strip("\n")
    return f"{OPENING}\n{stripped}\n{CLOSING}\n\n"


def split_message(message: Message) -> tuple[list[str], str]:
    """Returns (texts of reasoning, the rest of the content): those in fields and those in tags."""
    fields = (message.fields.get(field) for field in FIELDS)
    in_tags, answer = split_tags(message.content)
    return [value for value in fields if isinstance(value, str)] + in_tags, answer


def split_tags(content: str) -> tuple[list[str], str]:
    """Returns (texts of reasoning, the rest) of a content.

    "<think>Add.</think>42"    ["Add."], "42"
    "Add.</think>42"           ["Add."], "42", since a prompt may have the opening tag
    """
    texts: list[str] = []
    answer, place, is_open = "", 0, False
    for match in _TAG.finditer(content):
        text = content[place : match.start()]
        if is_open or (_is_closing(match) and not place):
            texts.append(text)
        else:
            answer += text
        place, is_open = match.end(), not _is_closing(match)
    if is_open:
        return [*texts, content[place:]], answer
    return texts, answer + content[place:]


def find_open_tag(prompt: str, response: str) -> str:
    """Returns the tag with which a prompt begins reasoning that its response does not end; otherwise an empty text."""
    end = prompt[-_TAG_LENGTH:].rstrip()
    opening = next((match for match in _TAG.finditer(end) if match.end() == len(end)), None)
    if opening is None or any(map(_is_closing, (opening, *_TAG.finditer(response)))):
        return ""
    return opening[0]


def _is_closing(tag: re.Match[str]) -> bool:
    return bool(tag[1] or tag[2])
