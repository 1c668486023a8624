"""Scores dialogues: how many nats a model needs for each response, given what stands before it.

    dialog_jax score --model=runs/quickstart/model --data=assets/chitchat/validation.jsonl --out=scores.jsonl

Writes one line of JSON a dialogue, in the order of the input:

    {"id": "a1", "tokens": 19, "nll": 61.2, "turns": [{"turn": 0, "message": 1, "tokens": 19, "nll": 61.2}]}

`id` is the dialogue's own, or its index; `turn` counts its assistant messages from 0, and `message` is the index in
`messages`; `nll` is -log p in nats, summed over the `tokens` of the response, its end of turn included. Scored is every
assistant message that has not "train": false or weight 0; other weights change nothing. Where a response does not fit
the model's context with what stands before it, it is left out and counted in "turns_cut". The file appears when it is
complete. The end prints nats a token, perplexity and tokens a second.

With --top_k=N --top_k_out=FILE.safetensors a second file holds the model's N likeliest tokens, with their
log-probabilities, in the place of every token that is scored: what a student needs to train on the same dialogues with
this model as its teacher (`data.teacher`). Dialogues then need different ids.

`--passes=one` reads a dialogue once for all of its responses. `--passes=k` reads each response with its own history, as
slowly and simply as it can be done; the two must agree to rounding, which dialog_jax check looks into.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax.numpy as jnp
import rich.console
from absl import flags

from dialog_jax.commands import entry
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.errors import UserError
from dialog_jax.evaluation import k_passes, scoring
from dialog_jax.evaluation.scoring import Score
from dialog_jax.inference import loading
from dialog_jax.rendering import chat_template as chat_template_lib
from dialog_jax.rendering import template_process
from dialog_jax.rendering.tokenizers import fingerprint
from dialog_jax.training import compilation_cache
from dialog_jax.trees import teacher
from dialog_jax.trees.teacher import Signal

_MODEL = flags.DEFINE_string(
    "model", None, "A Hugging Face model directory, a .gguf file, or a hub name.", required=True
)
_DATA = flags.DEFINE_string(
    "data", None, "A .jsonl, .json or .parquet file of dialogues, or a hub data set.", required=True
)
_OUT = flags.DEFINE_string("out", None, "The .jsonl file to write; one that is there is replaced.", required=True)
_SPLIT = flags.DEFINE_string("split", "train", "Which split of a hub data set; files have none.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What the model computes in.")
_CHAT_TEMPLATE = flags.DEFINE_string("chat_template", "", "A Jinja file or its text; empty for the tokenizer's own.")
_CHAT_TEMPLATE_KWARGS = flags.DEFINE_string(
    "chat_template_kwargs", "{}", 'Further variables of the template, as JSON: {"enable_thinking": false}.'
)
_ALLOW_SPECIAL_TOKENS = flags.DEFINE_boolean(
    "allow_special_tokens", False, "Parse special tokens that the texts of a dialogue spell; else they are text."
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "How many of the likeliest tokens --top_k_out holds.", lower_bound=0)
_TOP_K_OUT = flags.DEFINE_string("top_k_out", "", "A .safetensors file to write them to, for training a student.")
_PASSES = flags.DEFINE_enum(
    "passes", "one", ["one", "k"], "One forward pass a dialogue, or k: one a response, naively, to compare with."
)

_WARNINGS_SHOWN = 20


def write_scores(scores: Iterable[Score], out: pathlib.Path, *, context: int, console: rich.console.Console) -> str:
    """Writes the file, whole or not at all, and returns what to tell of it. Warnings go to the console."""
    totals: collections.Counter[str] = collections.Counter()
    nll = 0.0
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as lines, console.status("scoring") as status:
            for score in scores:
                lines.write(json.dumps(score.record, ensure_ascii=False) + "\n")
                totals["dialogues"] += 1
                totals["turns"] += len(score.record["turns"])
                totals["tokens"] += score.record["tokens"]
                totals["read"] += score.tokens_read
                nll += score.record["nll"]
                if warning := _warning(score, context):
                    totals["warnings"] += 1
                    if totals["warnings"] <= _WARNINGS_SHOWN:
                        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
                status.update(f"{totals['dialogues']:,} dialogues scored")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    if totals["warnings"] > _WARNINGS_SHOWN:
        unnamed = totals["warnings"] - _WARNINGS_SHOWN
        console.print(f"warning: {unnamed:,} more; their lines have turns_cut, or no turns", soft_wrap=True)
    told = [f"{out}: {totals['dialogues']:,} dialogues, {totals['turns']:,} responses of {totals['tokens']:,} tokens"]
    if totals["tokens"]:
        mean = nll / totals["tokens"]
        perplexity = math.exp(mean) if mean < 700 else math.inf
        told.append(f"{mean:.4f} nats a token, perplexity {perplexity:,.2f}")
    told.append(f"{totals['read']:,} tokens read in {seconds:.1f} s: {totals['read'] / seconds:,.0f} tokens/s")
    return "\n".join(told)


def _recorded(scores: Iterable[Score], add: Callable[[str | int, Sequence[Signal]], None]) -> Iterator[Score]:
    """The scores, after `add` was given the signals of each."""
    for score in scores:
        add(score.record["id"], score.signals)
        yield score


def _warning(score: Score, context: int) -> str:
    if cut := score.record.get("turns_cut"):
        return f"{score.name}: {cut:,} responses exceed the model's context of {context:,} tokens and are not scored"
    if not score.record["turns"]:
        return f"{score.name}: nothing to score; no assistant message has a weight above 0"
    return ""


def main() -> None:
    compilation_cache.enable(entry.print_message)
    dtype = jnp.dtype(_DTYPE.value)
    for flag, file in (("out", _OUT.value), ("top_k_out", _TOP_K_OUT.value)):
        if file and pathlib.Path(file).is_dir():
            raise UserError(f"--{flag}={file} is a directory; name a file.")
    if bool(_TOP_K.value) != bool(_TOP_K_OUT.value):
        raise UserError("--top_k and --top_k_out need each other: how many tokens, and a file for them.")
    files = [pathlib.Path(file).resolve() for file in (_DATA.value, _OUT.value, _TOP_K_OUT.value) if file]
    if len(set(files)) < len(files):
        raise UserError("--data, --out and --top_k_out are files of their own; two of them are the same.")
    if _TOP_K.value and _PASSES.value == "k":
        raise UserError("--passes=k gives no likeliest tokens; leave it out, or --top_k.")
    dialogues = read_dialogues(_DATA.value, split=_SPLIT.value)
    kwargs = chat_template_lib.parse_template_kwargs(_CHAT_TEMPLATE_KWARGS.value)
    model = loading.load_model(
        _MODEL.value,
        dtype=dtype,
        chat_template=_CHAT_TEMPLATE.value,
        chat_template_kwargs=kwargs,
        allow_special_tokens=_ALLOW_SPECIAL_TOKENS.value,
    )
    if _PASSES.value == "k":
        scores = k_passes.score_dialogues(
            dialogues,
            template_process.limit_template(model.tokenizer),
            model.config,
            model.parameters,
            chat_template_kwargs=kwargs,
            allow_special_tokens=_ALLOW_SPECIAL_TOKENS.value,
            compute_dtype=dtype,
        )
    else:
        scores = scoring.score_dialogues(
            dialogues, model.renderer, model.config, model.parameters, compute_dtype=dtype, top_k=_TOP_K.value
        )
    console = rich.console.Console(stderr=True, highlight=False)
    with contextlib.ExitStack() as stack:
        if _TOP_K.value:
            add = stack.enter_context(
                teacher.write_file(
                    pathlib.Path(_TOP_K_OUT.value),
                    top_k=_TOP_K.value,
                    tokenizer=fingerprint(model.tokenizer),
                    vocabulary=model.config.vocab_size,
                )
            )
            scores = _recorded(scores, add)
        print(write_scores(scores, pathlib.Path(_OUT.value), context=model.config.max_length, console=console))
