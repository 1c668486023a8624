"""A rendered text in which the texts and values of a record are looked for. Knows no messages."""

import functools
import html
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_REMOVED = "\0"  # in the place of a text that is removed; no white space, so that what is around it stays apart


class RenderedText:
    """A rendered text in which others are looked for.

    Args:
      before: the text before it; a text that begins there and ends in the rendering is written, too.
    """

    def __init__(self, text: str, before: str = ""):
        self._text, self._before = text, before

    @functools.cached_property
    def _squeezed(self) -> str:
        """The text without white space, as it is and with HTML's escapes replaced."""
        squeezed = _squeeze(self._text)
        return squeezed + "\n" + _squeeze(html.unescape(self._text)) if "&" in squeezed else squeezed

    def has_text(self, text: str) -> bool:
        """Returns whether a text is written."""
        stripped = text.strip()
        if stripped in self._text:
            return True
        squeezed = _squeeze(stripped)
        if any(form in self._squeezed for form in _list_forms(squeezed, stripped)):
            return True
        beginning = _squeeze(self._before[-2 * len(text) :])[-len(squeezed) + 1 :] if len(squeezed) > 1 else ""
        return bool(beginning) and squeezed in beginning + self._squeezed

    def without(self, text: str, *, last: bool = False) -> "RenderedText":
        """Returns the rendering without one occurrence of a text that is written; if it is not, as it is.

        Args:
          last: remove the last occurrence, not the first.
        """
        unescaped = [html.unescape(self._text)] if "&" in self._text else []
        for rendered in (self._text, *unescaped):
            if span := _find(rendered, text, last):
                return RenderedText(rendered[: span[0]] + _REMOVED + rendered[span[1] :], self._before)
        before = self._before[-2 * len(text) :]
        span = _find(before + self._text, text, last=True)
        return self if span is None else RenderedText(_REMOVED + self._text[max(0, span[1] - len(before)) :])

    def has_json(self, text: str) -> bool:
        """Returns whether a text is written, or if it is JSON of an object or a list, everything in it."""
        if self.has_text(text):
            return True
        if text.lstrip()[:1] not in ("{", "["):
            return False
        try:
            return all(self.has_value(leaf) for leaf in iterate_leaves(json.loads(text), with_keys=True))
        except (ValueError, RecursionError):  # it is no JSON, or deeper than Python reads
            return False

    def has_value(self, value: Any) -> bool:
        """Returns whether a JSON value that is not a list or object is written; null always is."""
        if value is None:
            return True
        if isinstance(value, str):
            return self.has_text(value)
        return re.search(rf"(?<![\w.]){re.escape(str(value))}(?!\w|\.0*[1-9])", self._text, re.IGNORECASE) is not None


def iterate_leaves(value: Any, *, with_keys: bool = False) -> Iterator[Any]:
    """Yields every value in a JSON value that is not a list or object."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if with_keys:
                yield str(key)
            yield from iterate_leaves(entry, with_keys=with_keys)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from iterate_leaves(entry, with_keys=with_keys)
    else:
        yield value


def _find(rendered: str, text: str, last: bool) -> tuple[int, int] | None:
    """Returns where the first or the last occurrence of a text in another starts and stops, white space aside."""
    stripped = text.strip()
    place = rendered.rfind(stripped) if last else rendered.find(stripped)
    if place >= 0:
        return place, place + len(stripped)
    places = [place for place, character in enumerate(rendered) if not character.isspace()]
    squeezed = "".join(rendered[place] for place in places)
    for form in _list_forms(_squeeze(stripped), stripped):
        place = squeezed.rfind(form) if last else squeezed.find(form)
        if place >= 0:
            return places[place], places[place + len(form) - 1] + 1
    return None


def _list_forms(squeezed: str, text: str) -> Iterator[str]:
    """Yields a text without white space, and as it is in a string of JSON, of JSON in JSON, and of Python."""
    yield squeezed
    as_json = json.dumps(text, ensure_ascii=False)[1:-1]
    if as_json != text:
        yield _squeeze(as_json)
        yield _squeeze(json.dumps(as_json, ensure_ascii=False)[1:-1])
        yield _squeeze(repr(text)[1:-1])
    if not text.isascii():
        ascii_only = json.dumps(text)[1:-1]
        yield _squeeze(ascii_only)
        yield _squeeze(json.dumps(ascii_only)[1:-1])


def _squeeze(text: str) -> str:
    """Returns a text without white space."""
    return "".join(text.split())
