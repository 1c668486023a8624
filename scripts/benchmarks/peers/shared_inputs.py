"""Dialogues -> the files that all contestants read: messages, and for peers token ids with labels.

What is trained on is found here by another way than `dialog_jax.data`: a response is what the rendering of the messages
up to it adds to the prompt, up to its end-of-turn token, located among the characters of the whole dialogue. That holds
only for templates that render history the way it was generated, which is checked.
"""

import json
import pathlib
from typing import Any

import transformers

from dialog_jax.errors import UserError

IGNORED = -100  # PyTorch's label of a token without loss
COMPARED = 16


def write(
    out: pathlib.Path, *, model: str, data: str, dialogues: int, max_length: int, first: int, spread: int
) -> dict[str, Any]:
    """Writes the inputs into the directory `out` and returns figures of them.

    * `dialogues.jsonl`: the first records of `data`, as they are.
    * `tokens.jsonl`: `{"input_ids": [...], "labels": [...]}` of each, uncut.
    * `spread_tokens.jsonl`: for who pads, the longest dialogue `first` times, and then `spread` of all lengths, from
      the longest to the shortest: few steps on them cost what an epoch grouped by length costs.
    * `compared.jsonl`, `compared_tokens.jsonl`: the same of the first 16 that fit `max_length`, on which every
      contestant computes its loss before any update.

    Args:
      model: a model directory, for its tokenizer and chat template.
      max_length: in tokens.
      first: how many dialogues the steps read that are not measured.
      spread: how many those read that are.

    Raises:
      UserError: fewer dialogues than asked for, or a template for which this way of finding responses is wrong.
    """
    with open(data, encoding="utf-8") as file:
        lines = [line for _, line in zip(range(dialogues), file, strict=False)]
    if len(lines) < dialogues:
        raise UserError(f"{data} has {len(lines)} dialogues, {dialogues} are needed; lower --dialogues.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    tokens = [labelled(json.loads(line)["messages"], tokenizer) for line in lines]
    compared = [number for number, one in enumerate(tokens) if len(one["input_ids"]) <= max_length][:COMPARED]
    out.mkdir(parents=True, exist_ok=True)
    (out / "dialogues.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "compared.jsonl").write_text("".join(lines[number] for number in compared), encoding="utf-8")
    _write_tokens(out / "tokens.jsonl", tokens)
    chosen = [tokens[number] for number in of_all_lengths([len(one["input_ids"]) for one in tokens], spread)]
    _write_tokens(out / "spread_tokens.jsonl", [chosen[0]] * first + chosen)
    _write_tokens(out / "compared_tokens.jsonl", [tokens[number] for number in compared])
    return {
        "dialogues": dialogues,
        "tokens": sum(len(one["input_ids"]) for one in tokens),
        "targets": sum(targets(one["labels"]) for one in tokens),
        "longer_than_max_length": sum(len(one["input_ids"]) > max_length for one in tokens),
        "compared_dialogues": len(compared),
        "compared_targets": sum(targets(tokens[number]["labels"]) for number in compared),
    }


def of_all_lengths(lengths: list[int], count: int) -> list[int]:
    """The places of `count` lengths, the longest first: the middle one of each of as many equal parts of all."""
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [longest_first[(2 * part + 1) * len(lengths) // (2 * count)] for part in range(count)]


def targets(labels: list[int]) -> int:
    """How many tokens have loss; the first token of a dialogue has none in any case."""
    return sum(label != IGNORED for label in labels[1:])


def labelled(messages: list[dict[str, str]], tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The tokens of a dialogue and their labels: token ids on responses with their end of turn, -100 elsewhere.

    Raises:
      UserError: a prompt is no prefix of the whole dialogue, in characters or in tokens.
    """

    def render(part: list[dict[str, str]], prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt))

    whole = render(messages, False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:number], True)
        end = len(prompt) + len(message["content"]) + len(tokenizer.eos_token)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if whole[len(prompt) : end] != message["content"] + tokenizer.eos_token or ids[: len(before)] != before:
            raise UserError(
                f"message {number} ({message['content'][:40]!r}): what precedes it in the whole dialogue is not its "
                "prompt; peers that read a dialogue once cannot train on it faithfully. Choose another template."
            )
        for place in range(len(before), len(ids)):
            if starts[place] < end:
                labels[place] = ids[place]
            else:
                break
    return {"input_ids": ids, "labels": labels}


def _write_tokens(path: pathlib.Path, tokens: list[dict[str, list[int]]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in tokens), encoding="utf-8")
