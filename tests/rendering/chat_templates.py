"""Chat templates of the families people fine-tune, tokenizers to go with them, and awkward dialogues.

Written for the tests from what each family's format is, so that they render what the published templates render of
plain dialogues; the tokenizers are trained here on a few sentences and share only their kind with the published ones.
"""

import functools
import json
import string
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dialog_jax.dialogues.dialogue import Dialogue, Message

# SmolLM2: a default system prompt, contents as they are.
_CHATML = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

# Llama 3: contents are trimmed, nothing stands between the messages.
_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'ipython' if message.role == 'tool' else message.role -%}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

# Gemma: no system role, strict alternation, the assistant is called model, contents are trimmed.
_GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{ raise_exception('System role not supported') }}
{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

# Mistral: a system message goes in front of the first user message, strict alternation, no generation prompt at all:
# the assistant's text follows [/INST], and </s> ends it.
_MISTRAL = """\
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content + '\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- endif -%}
{{ bos_token }}
{%- for message in turns -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('After the optional system message, roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if message.role == 'user' -%}
{{ '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' -%}
{{ ' ' + message.content | trim + eos_token }}
{%- else -%}
{{ raise_exception('Only user and assistant roles are supported, with the exception of an initial system message') }}
{%- endif -%}
{%- endfor -%}
"""

# Qwen3: reasoning stays only after the last user query; the last assistant message always has a think block; tools are
# listed in the system message, and their answers are user turns.
_QWEN3 = """\
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' -%}
{{ messages[0].content + '\\n\\n' }}
{%- endif -%}
{{ '# Tools\\n\\nYou may call one or more functions.\\n\\n<tools>' }}
{%- for tool in tools -%}
{{ '\\n' }}{{ tool | tojson }}
{%- endfor -%}
{{ '\\n</tools>\\n\\nAnswer a call as <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' -%}
{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif -%}
{%- set last = namespace(query=messages | length - 1, found=false) -%}
{%- for message in messages[::-1] -%}
{%- if not last.found and message.role == 'user' and message.content is string
       and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) -%}
{%- set last.found = true -%}
{%- set last.query = messages | length - loop.index -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message.content if message.content is string else '' -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' -%}
{%- if message.reasoning_content is string -%}
{%- set reasoning = message.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- else -%}
{%- set reasoning = '' -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.query and (loop.last or reasoning) -%}
{{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else -%}
{{ content }}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{{ '\\n' if content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' -%}
{{ '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' }}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
"""

# No special token at all: a turn ends where its line does.
_PLAIN = """\
{%- for message in messages -%}
{{ message.role | capitalize + ': ' + message.content + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'Assistant: ' }}
{%- endif -%}
"""

# Phi 3: what is not asked to be continued is closed with the end-of-text token.
_PHI3 = """\
{%- for message in messages -%}
{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor -%}
{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}
"""

TEMPLATES: dict[str, str] = {
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "gemma": _GEMMA,
    "mistral": _MISTRAL,
    "qwen3": _QWEN3,
    "plain": _PLAIN,
    "phi3": _PHI3,
}


class Family(NamedTuple):
    """How a family's tokenizer is made, and what its template can say."""

    special: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    end_of_turn: str
    """What the model writes when its turn is over: not always eos."""
    added: tuple[str, ...] = ()
    """Tokens of one id that are text like any other: not special."""
    sentencepiece: bool = False
    prepends_space: bool = False
    """Whether a space is put in front of a text that does not begin with a special token."""
    system_role: bool = True


FAMILIES: dict[str, Family] = {
    "chatml": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|im_end|>"
    ),
    "llama3": Family(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": Family(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<pad>",
        "<end_of_turn>",
        sentencepiece=True,
        system_role=False,
    ),
    "mistral": Family(
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        "</s>",
        "</s>",
        sentencepiece=True,
        prepends_space=True,
    ),
    "qwen3": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_end|>",
        added=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    ),
    "plain": Family(("<|endoftext|>",), None, "<|endoftext|>", "<|endoftext|>", "\n"),
    "phi3": Family(
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        None,
        "<|endoftext|>",
        "<|endoftext|>",
        "<|end|>",
    ),
}

_CORPUS = (
    "Hello! How are you today? I am fine, thank you. And you?\n",
    "You are a helpful assistant. Answer in one sentence, please.\n\n",
    "system\nuser\nassistant\nmodel\nUser: Assistant: System: Tool: ",
    "What is the capital of France? The capital of France is Paris.\n",
    "In 2024 there were 366 days, in 2023 only 365; 12 x 12 = 144.\n",
    "  def f(x):\n    return x + 1\n\n\tprint(f(41))  # 42\n",
    "Let me think. First, second, third. So the answer is: yes.\n",
    "Don't worry, it's fine; we'll see what they've done... maybe!\n",
    "The café in Zürich, naïve and déjà vu. Привет! 你好。 こんにちは 🙂👍\n",
    '{"name": "price", "arguments": {"item": "apple", "count": 3}}\n',
)

# What SentencePiece-like tokenizers have a token for; everything else is bytes.
_ALPHABET = "▁\n" + string.ascii_letters + string.digits + string.punctuation + "éüП你🙂"

# fmt: off
_PIECES = (
    "Hello", "how are you?", "fine, thank you", "The answer is 42.", "3.14159", "2024-05-01", "don't", "it's",
    "naïve café", "Привет", "你好", "🙂", "👩‍👩‍👧", "  two  spaces ", "\n", "\n\n", "\ttab", " ", "x", "...",
    "—", "a\nb", "<b>", "{}", "User:",
)
# fmt: on


@functools.cache
def train_tokenizer(family: str, *, vocab_size: int = 512) -> transformers.PreTrainedTokenizerFast:
    """The family's tokenizer with its template, trained on the sentences above; the same whenever it is made.

    Shared between callers, who must not change it.
    """
    made = FAMILIES[family]
    if made.sentencepiece:
        tokenizer = _sentencepiece(made, vocab_size - len(made.added))
    else:
        tokenizer = _byte_level(made, vocab_size - len(made.added))
    # normalized=False, or the normalizer that SentencePiece models have would be looked for in their text.
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in made.special])
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in made.added])
    named = {"bos_token": made.bos, "eos_token": made.eos, "pad_token": made.pad}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=TEMPLATES[family],
        clean_up_tokenization_spaces=False,
        **{name: text for name, text in named.items() if text is not None},
    )


def _byte_level(made: Family, vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(made.special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def _sentencepiece(made: Family, vocab_size: int) -> tokenizers.Tokenizer:
    """BPE over characters with U+2581 for the space, and bytes for characters that are not in the vocabulary."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    scratch = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    scratch.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    # The alphabet is given: left to the trainer, which of the rare characters are in it changes from run to run.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*made.special, *byte_tokens],
        initial_alphabet=list(_ALPHABET),
        limit_alphabet=len(_ALPHABET),
        show_progress=False,
    )
    scratch.train_from_iterator(_CORPUS, trainer)
    learned = json.loads(scratch.to_str())["model"]
    # A second tokenizer, since in the first the byte tokens are special and would be found in text.
    merges = [tuple(merge) for merge in learned["merges"]]
    model = models.BPE(vocab=learned["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    strip = []
    if made.prepends_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = [decoders.Strip(content=" ", left=1)]
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def random_dialogue(
    rng: np.random.Generator,
    *,
    turns: int,
    system: bool = False,
    reasoning: bool = False,
    weights: bool = False,
    id: int = 0,
) -> Dialogue:
    """A dialogue of `turns` user and assistant messages whose contents try a renderer's patience.

    Args:
      system: starts with a system message; not every family takes one (`FAMILIES[...].system_role`).
      reasoning: some responses have `reasoning_content`, some a think block inside their content, some neither.
      weights: responses have weights of 0, 0.5, 1 or 2.
    """
    messages = [Message(role="system", content=_content(rng))] if system else []
    for _ in range(turns):
        messages.append(Message(role="user", content=_content(rng)))
        content, fields = _content(rng), {}
        kind = rng.integers(3) if reasoning else 0
        if kind == 1:
            fields = {"reasoning_content": _content(rng)}
        elif kind == 2:
            content = f"<think>\n{_content(rng)}\n</think>\n\n{content}"
        weight = float(rng.choice([0.0, 0.5, 1.0, 2.0])) if weights else 1.0
        messages.append(Message(role="assistant", content=content, weight=weight, fields=fields))
    return Dialogue(id=id, messages=tuple(messages), where=f"random[{id}]")


def _content(rng: np.random.Generator) -> str:
    """One to six pieces, some run together; now and then nothing but white space."""
    pieces = rng.choice(_PIECES, size=rng.integers(1, 7))
    return str(rng.choice(["", " "])).join(str(piece) for piece in pieces)
