"""Dialogues -> the files that all contestants read: messages and, for peers, token ids with labels.

Labels are computed independently of dialog_jax: a response is the text that the rendering of the whole dialogue has
after the rendered prompt, through the end-of-turn token. This requires a template that renders history as it was
generated, which is checked.
"""

import json
import pathlib
from typing import Any

import transformers

from dialog_jax.errors import UserError

IGNORED = -100  # PyTorch's label for tokens without loss
COMPARED = 16


def write_inputs(
    out: pathlib.Path, *, model: str, data: str, dialogues: int, max_length: int, warmup: int, measured: int
) -> dict[str, Any]:
    """Writes the inputs into the directory `out` and returns their figures.

    * `dialogues.jsonl`: the first records of `data`, unchanged.
    * `tokens.jsonl`: `{"input_ids": [...], "labels": [...]}` of each, not truncated.
    * `spread_tokens.jsonl`: for peers that pad. A sample over all lengths, longest first, so that a few steps cost as
      much per token as an epoch grouped by length; before it, the longest dialogue for the warm-up steps.
    * `compared.jsonl`, `compared_tokens.jsonl`: the first 16 dialogues that fit `max_length`, on which every contestant
      computes its loss before any update.

    Args:
      model: a model directory, for its tokenizer and chat template.
      max_length: in tokens.
      warmup: number of dialogues read by the warm-up steps.
      measured: number of dialogues read by the measured steps.

    Raises:
      UserError: there are fewer dialogues than requested, or the template does not render history as generated.
    """
    with open(data, encoding="utf-8") as file:
        lines = [line for _, line in zip(range(dialogues), file, strict=False)]
    if len(lines) < dialogues:
        raise UserError(f"{data} has {len(lines)} dialogues, {dialogues} are needed; lower --dialogues.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    tokens = [label_dialogue(json.loads(line)["messages"], tokenizer) for line in lines]
    compared = [number for number, one in enumerate(tokens) if len(one["input_ids"]) <= max_length][:COMPARED]
    out.mkdir(parents=True, exist_ok=True)
    (out / "dialogues.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "compared.jsonl").write_text("".join(lines[number] for number in compared), encoding="utf-8")
    _write_tokens(out / "tokens.jsonl", tokens)
    sample = [tokens[number] for number in sample_lengths([len(one["input_ids"]) for one in tokens], measured)]
    _write_tokens(out / "spread_tokens.jsonl", [sample[0]] * warmup + sample)
    _write_tokens(out / "compared_tokens.jsonl", [tokens[number] for number in compared])
    return {
        "dialogues": dialogues,
        "tokens": sum(len(one["input_ids"]) for one in tokens),
        "targets": sum(count_targets(one["labels"]) for one in tokens),
        "longer_than_max_length": sum(len(one["input_ids"]) > max_length for one in tokens),
        "compared_dialogues": len(compared),
        "compared_targets": sum(count_targets(tokens[number]["labels"]) for number in compared),
    }


def sample_lengths(lengths: list[int], count: int) -> list[int]:
    """Returns the indices of `count` lengths, longest first: the median of each of `count` equal parts."""
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [longest_first[(2 * part + 1) * len(lengths) // (2 * count)] for part in range(count)]


def count_targets(labels: list[int]) -> int:
    """Returns the number of tokens with loss; the first token of a dialogue never has one."""
    return sum(label != IGNORED for label in labels[1:])


def label_dialogue(
    messages: list[dict[str, str]], tokenizer: transformers.PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    """Returns the tokens of a dialogue and labels: token ids in responses, end of turn included, and -100 elsewhere.

    Raises:
      UserError: a prompt is not a prefix of the rendered dialogue, in characters or in tokens.
    """

    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    text = render(messages, False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:number], True)
        end = len(prompt) + len(message["content"]) + len(tokenizer.eos_token)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if text[len(prompt) : end] != message["content"] + tokenizer.eos_token or ids[: len(before)] != before:
            raise UserError(
                f"message {number} ({message['content'][:40]!r}): the rendered dialogue does not begin with its "
                "prompt, so peers that read a dialogue once cannot train on it faithfully. Choose another template."
            )
        for place in range(len(before), len(ids)):
            if starts[place] < end:
                labels[place] = ids[place]
            else:
                break
    return {"input_ids": ids, "labels": labels}


def _write_tokens(path: pathlib.Path, tokens: list[dict[str, list[int]]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in tokens), encoding="utf-8")
