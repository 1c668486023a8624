"""Chat templates rendered in this process: messages in, texts out, without limits of time and memory.

Knows messages as dictionaries; knows no tokens and no process. Everything else calls `template_process.render`.
"""

import datetime
import functools
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import tokenizers
import transformers
from transformers.utils import chat_template_utils

from dialog_jax.errors import UserError
from dialog_jax.rendering import call_arguments

LONGEST = 64 << 20
"""Largest number of characters of a rendered text."""
CLOCK = "strftime_now"
"""The function of a template that formats the current time."""
TIME = "time_of_strftime_now"
"""Name of the variable that fixes the time: an ISO date or time."""
_LARGEST_SHOWN = 500  # characters of a template's reason
_LARGEST_LINE = 120  # characters of a template's line in an error
# What running a template can raise, deliberately or not.
_REFUSALS = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
_MARK = "\ue000text\ue000"  # follows each text of one call
# A template with another one in a macro. Jinja removes the line break after the first tag (trim_blocks); the empty
# output before the second tag keeps white space at the inner template's end (lstrip_blocks).
_MACRO_TEMPLATE = """\
{%% macro one_rendering(messages, add_generation_prompt) %%}
%s{{ '' }}{%% endmacro %%}
{%%- for job in rendered_jobs -%%}
{{ one_rendering(messages[:job[0]], job[1]) }}{{ rendered_mark }}
{%%- endfor -%%}"""
_DICT_ATTRIBUTES = frozenset(dir(dict))
_PLAIN = frozenset([str, int, float, bool, dict, list])
_equal_in_macro: dict[str, bool] = {}  # by template: whether it renders the same in a macro, once known


class Job(NamedTuple):
    """A text to render: of the first `messages` messages, perhaps with the generation prompt."""

    messages: int
    add_generation_prompt: bool = False


class Rendering(NamedTuple):
    """The texts of some jobs, in order, up to the first that the template refuses."""

    texts: list[str]
    refusal: str = ""
    """Why the job after the last text was refused; empty if none was."""


def render_jobs(
    template: str, messages: Sequence[Mapping[str, Any]], jobs: Sequence[Job], variables: Mapping[str, Any]
) -> Rendering:
    """Returns the texts of the jobs, rendered in this process, without limits of time and memory.

    Args:
      template: Jinja text.
      messages: as the template sees them.
      variables: further variables of the template, among them `tools`, the special tokens and `TIME`.
    """

    def render(changed: call_arguments.Messages) -> tuple[str, bool]:
        rendering = _render_plain(template, changed, jobs, variables)
        return "\n".join(rendering.texts), len(rendering.texts) < len(jobs)

    return _render_plain(template, call_arguments.adapt_arguments(template, messages, render), jobs, variables)


def _render_plain(
    template: str, messages: Sequence[Mapping[str, Any]], jobs: Sequence[Job], variables: Mapping[str, Any]
) -> Rendering:
    """Returns the texts of the jobs for messages that stay as they are."""
    texts = _render_in_macro(template, messages, jobs, variables)
    if texts:
        return Rendering(texts)
    for job in jobs:
        try:
            texts.append(_apply(template, messages[: job.messages], job.add_generation_prompt, variables))
        except jinja2.TemplateSyntaxError as error:
            return Rendering(texts, f"it is not Jinja at line {error.lineno}: {error.message}")
        except _REFUSALS as error:
            return Rendering(texts, _describe_error(error, template))
    return Rendering(texts)


def _describe_error(error: Exception, template: str) -> str:
    """Returns what a template says, or the error in it, with its line.

    Roles must alternate.
    can only concatenate str (not "int") to str (TypeError at line 7 of the template: {{ message.name + 1 }})
    """
    reason = (str(error) or type(error).__name__)[:_LARGEST_SHOWN]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    if type(error) is jinja2.TemplateError or not lines or not lines[-1]:  # raise_exception in the template
        return reason
    source = template.splitlines()[lines[-1] - 1 : lines[-1]]
    code = " ".join(source).strip()[:_LARGEST_LINE]
    return f"{reason} ({type(error).__name__} at line {lines[-1]} of the template: {code})"


def _render_in_macro(
    template: str, messages: Sequence[Mapping[str, Any]], jobs: Sequence[Job], variables: Mapping[str, Any]
) -> list[str]:
    """Returns the texts of the jobs from one call of the template's macro for each; empty where that is not reliable.

    A call of `apply_chat_template` for each job would copy all messages before it each time.
    """
    if len(jobs) == 1 or not _equal_in_macro.get(template, True):
        return []
    # Jinja removes a line break at the end of a template, too.
    try:
        texts = _apply(
            _MACRO_TEMPLATE % template.removesuffix("\n"),
            messages,
            False,
            {**variables, "rendered_jobs": [list(job) for job in jobs], "rendered_mark": _MARK},
        ).split(_MARK)
    except _REFUSALS:
        return []
    if len(texts) != len(jobs) + 1:  # a message contains the mark
        return []
    if template not in _equal_in_macro:
        _equal_in_macro[template] = texts[:-1] == [
            _apply(template, messages[: job.messages], job.add_generation_prompt, variables) for job in jobs
        ]
    return texts[:-1] if _equal_in_macro[template] else []


def _apply(
    template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    _speed_up_sandbox(template)
    # transformers turns all other variables into plain data, so a function must be a global of its environment.
    now = datetime.datetime.fromisoformat(variables[TIME]) if TIME in variables else datetime.datetime.now()
    chat_template_utils._compile_jinja_template(template).environment.globals[CLOCK] = now.strftime
    text = _make_tokenizer().apply_chat_template(
        [dict(message) for message in messages],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    assert isinstance(text, str)
    if len(text) > LONGEST:
        raise UserError(f"it wrote {len(text):,} characters, the limit is {LONGEST:,}")
    return text


@functools.lru_cache(maxsize=128)
def _speed_up_sandbox(template: str) -> None:
    """Shortens the two things that take most of the time of a rendering, without changing what a template may do.

    Whether an attribute is safe depends on its name and the type of its object, and is checked once for each. What is
    no attribute of a dictionary is looked up as a key at once, not after an error.
    """
    environment = chat_template_utils._compile_jinja_template(template).environment
    is_safe, get_attribute = environment.is_safe_attribute, environment.getattr
    safe: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(value: Any, name: str, attribute: Any) -> bool:
        key = type(value), name
        if key not in safe:
            safe[key] = is_safe(value, name, attribute)
        return safe[key]

    def get(value: Any, name: str) -> Any:
        if type(value) is dict and name not in _DICT_ATTRIBUTES:
            return value[name] if name in value else environment.undefined(obj=value, name=name)
        if safe.get((type(value), name)):
            attribute = getattr(value, name, None)
            if type(attribute) in _PLAIN:  # methods are wrapped by the sandbox
                return attribute
        return get_attribute(value, name)

    environment.is_safe_attribute, environment.getattr = is_safe_attribute, get


@functools.cache
def _make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer without tokens, for its `apply_chat_template`."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
