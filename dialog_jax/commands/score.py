"""Scores dialogues: the negative log-likelihood of each response, in nats, given its history.

    dialog_jax score --config.model=runs/mine/model --config.data.train=my.jsonl --out=scores.jsonl

Writes one line of JSON per dialogue, in the order of the input:

    {"id": "a1", "content": "93f1c2d47a60b58e", "tokens": 19, "nll": 61.2,
     "turns": [{"turn": 0, "message": 1, "tokens": 19, "nll": 61.2}]}

`id` is that of the dialogue, or its index; `content` is a hash of its messages and tools; `turn` counts its assistant
messages from 0, and `message` is the index in `messages`; `nll` is summed over the `tokens` of the response, its end of
turn included. Every assistant message is scored unless it has "train": false or weight 0; other weights have no effect.
A response that exceeds the model's context together with its history is left out and counted in "turns_cut". With
--config.data.on_error=skip, records that are no valid dialogues or that the chat template refuses have no line and are
listed in scores.skipped.txt. The file appears when it is complete. The last lines of output are nats per token,
perplexity and tokens per second.

--context also scores the same tokens of each response behind less: "nll_last" behind the system message and the
dialogue from the last user message on, "nll_none" behind the bare generation prompt. Where the chat template has no
generation prompt, "nll_none" is behind an empty user message, and the turn says so ("none_follows"). --context=all
writes both; `dialog_jax select` chooses what to train on by them. The contexts of a dialogue are branches of one tree.

With --top_k=N --top_k_out=FILE.safetensors a second file holds the model's N likeliest tokens and their
log-probabilities at the place of every scored token: what a student needs to train on the same dialogues with this
model as its teacher (`data.teacher`). Dialogues then need different ids.

--passes=one reads a dialogue once for all of its responses. --passes=k reads each response with its own history,
naively; the two agree to rounding, which `dialog_jax check` verifies.
"""

import collections
import contextlib
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import rich.console
from absl import flags

from dialog_jax import atomic_files
from dialog_jax.commands import config_flag, config_inputs, entry
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.evaluation import contexts, k_pass_scores, k_passes, scoring
from dialog_jax.evaluation.scoring import Score
from dialog_jax.formats import tokenizer_files
from dialog_jax.rendering import template_process
from dialog_jax.rendering.template_process import TemplateStopped
from dialog_jax.rendering.tokenizers import fingerprint
from dialog_jax.training import compilation_cache, config_renderer, data_sources, trained_models
from dialog_jax.training.config import require_fields
from dialog_jax.training.data_sources import Source
from dialog_jax.trees import teacher_file
from dialog_jax.trees.teacher_file import Signal

_CONFIG = config_flag.define()
_DATA = config_inputs.define_data()
_ADAPTER = config_inputs.define_adapter()
_BASE = config_inputs.define_base()
_OUT = flags.DEFINE_string("out", None, "The .jsonl file to write; an existing one is replaced.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the weights and of the computation.")
_CONTEXT = flags.DEFINE_enum(
    "context",
    "full",
    list(contexts.CONTEXTS),
    "Behind what each response is scored: its full history, or also behind none, behind only the last user message, or "
    "behind all of these.",
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Number of likeliest tokens that --top_k_out holds.", lower_bound=0)
_TOP_K_OUT = flags.DEFINE_string(
    "top_k_out", "", "The .safetensors file to write these tokens to, for training a student."
)
_PASSES = flags.DEFINE_enum(
    "passes", "one", ["one", "k"], "`one` forward pass per dialogue, or `k`: one per response, naively, for comparison."
)

_WARNINGS_SHOWN = 20
_NLL = {"nll": "", "nll_last": " behind the last user message", "nll_none": " behind the bare generation prompt"}


def write_scores(scores: Iterable[Score], out: pathlib.Path, *, context: int, console: rich.console.Console) -> str:
    """Writes the file, complete or not at all; returns a summary. Warnings go to the console."""
    totals: collections.Counter[str] = collections.Counter()
    nll: collections.Counter[str] = collections.Counter()  # by field of a turn
    ids: collections.Counter[str | int] = collections.Counter()
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_files.replace(out) as unfinished,
        unfinished.open("w", encoding="utf-8") as lines,
        console.status("scoring") as status,
    ):
        for score in scores:
            lines.write(json.dumps(score.record, ensure_ascii=False) + "\n")
            ids[score.record["id"]] += 1
            totals["dialogues"] += 1
            totals["turns"] += len(score.record["turns"])
            totals["tokens"] += score.record["tokens"]
            totals["read"] += score.tokens_read
            for turn in score.record["turns"]:
                nll.update({name: turn[name] for name in _NLL if name in turn})
                totals["empty messages"] += "none_follows" in turn
            if warning := _warning(score, context):
                totals["warnings"] += 1
                if totals["warnings"] <= _WARNINGS_SHOWN:
                    console.print(f"warning: {warning}", markup=False, soft_wrap=True)
            status.update(f"{totals['dialogues']:,} dialogues scored")
    seconds = time.perf_counter() - started
    if totals["warnings"] > _WARNINGS_SHOWN:
        unnamed = totals["warnings"] - _WARNINGS_SHOWN
        console.print(f"warning: {unnamed:,} more; their lines have turns_cut, or no turns", soft_wrap=True)
    if repeated := [identifier for identifier, count in ids.items() if count > 1]:
        console.print(
            f"warning: {len(repeated):,} ids, such as {repeated[0]!r}, belong to several dialogues; dialog_jax select "
            "would stop with an error",
            markup=False,
            soft_wrap=True,
        )
    summary = [
        f"{out}: {totals['dialogues']:,} dialogues, {totals['turns']:,} responses of {totals['tokens']:,} tokens"
    ]
    if totals["tokens"]:
        for name, value in nll.items():
            mean = value / totals["tokens"]
            perplexity = math.exp(mean) if mean < 700 else math.inf
            summary.append(f"{mean:.4f} nats per token, perplexity {perplexity:,.2f}{_NLL[name]}")
    if totals["empty messages"]:
        summary.append(
            f"the chat template has no generation prompt; nll_none of {totals['empty messages']:,} responses is behind "
            f"an {contexts.EMPTY_MESSAGE}"
        )
    summary.append(f"{totals['read']:,} tokens read in {seconds:.1f} s: {totals['read'] / seconds:,.0f} tokens/s")
    return "\n".join(summary)


def _add_signals(scores: Iterable[Score], add: Callable[[str | int, Sequence[Signal]], None]) -> Iterator[Score]:
    """Yields the scores, after passing the signals of each to `add`."""
    for score in scores:
        add(score.record["id"], score.signals)
        yield score


def _leave_out_refused(
    dialogues: Iterable[Dialogue], make_passes: Callable[[Dialogue], Any], refused: list[str]
) -> Iterator[Dialogue]:
    """Yields the dialogues that the chat template renders; appends the errors of the others to `refused`."""
    for dialogue in dialogues:
        try:
            make_passes(dialogue)
        except TemplateStopped:
            raise
        except UserError as error:
            refused.append(str(error))
        else:
            yield dialogue


def _warning(score: Score, context: int) -> str:
    if cut := score.record.get("turns_cut"):
        return f"{score.name}: {cut:,} responses exceed the model's context of {context:,} tokens and are not scored"
    if not score.record["turns"]:
        return f"{score.name}: nothing to score; no assistant message has a weight above 0"
    return ""


def main() -> None:
    compilation_cache.enable(entry.print_message)
    out = entry.require_file_path(_OUT, "scores.jsonl")
    top_k_out = entry.require_file_path(_TOP_K_OUT) if _TOP_K_OUT.value else None
    config = config_inputs.read_config(_CONFIG, _ADAPTER)
    require_fields(config, "score", "model")
    source = data_sources.find_source(config, _DATA.value)
    _check_files(source, out, top_k_out)
    dtype = jnp.dtype(_DTYPE.value)
    options = config_renderer.renderer_options(config)
    model = trained_models.load_model(
        config.model, base=_BASE.value, dtype=dtype, **config_inputs.model_options(config)
    )
    skipped: list[str] = []
    refused = skipped if config.data.on_error == "skip" else None
    if _PASSES.value == "k":
        del options["chat_template"], options["template_time"]  # the tokenizer has them
        tokenizer = template_process.limit_template(
            tokenizer_files.reopen_tokenizer(model.tokenizer), model.renderer.template_time
        )
        options["stop_tokens"] = model.renderer.stop_tokens
        dialogues = source.read(skipped)
        if refused is not None:
            make_passes = functools.partial(k_passes.make_passes, tokenizer=tokenizer, **options)
            dialogues = _leave_out_refused(dialogues, make_passes, refused)
        scores = k_pass_scores.score_dialogues(
            dialogues,
            tokenizer,
            model.config,
            model.parameters,
            compute_dtype=dtype,
            contexts=contexts.CONTEXTS[_CONTEXT.value],
            **options,
        )
    else:
        scores = scoring.score_dialogues(
            source.read(skipped),
            model.renderer,
            model.config,
            model.parameters,
            compute_dtype=dtype,
            contexts=contexts.CONTEXTS[_CONTEXT.value],
            top_k=_TOP_K.value,
            skipped=refused,
        )
    console = rich.console.Console(stderr=True, highlight=False)
    with contextlib.ExitStack() as stack:
        if top_k_out:
            add = stack.enter_context(
                teacher_file.write_file(
                    top_k_out,
                    top_k=_TOP_K.value,
                    tokenizer=fingerprint(model.tokenizer),
                    vocabulary=model.config.vocab_size,
                    template_time=model.renderer.template_time,
                )
            )
            scores = _add_signals(scores, add)
        print(write_scores(scores, out, context=model.config.context, console=console))
    if skipped:
        file = out.with_name(f"{out.stem}.skipped.txt")
        atomic_files.write_text(file, "".join(f"{' '.join(error.splitlines())}\n" for error in skipped))
        print(f"{len(skipped):,} records skipped because of errors, all listed in {file}")


def _check_files(source: Source, out: pathlib.Path, top_k_out: pathlib.Path | None) -> None:
    """Raises UserError if the flags of output files contradict each other or the data."""
    if bool(_TOP_K.value) != bool(top_k_out):
        raise UserError("--top_k and --top_k_out need each other: the number of tokens, and a file for them.")
    if _TOP_K.value and _PASSES.value == "k":
        raise UserError("--passes=k does not give the likeliest tokens. Leave out --passes or --top_k.")
    outputs = [out, top_k_out] if top_k_out else [out]
    files = [file.resolve() for file in [*outputs, *map(pathlib.Path, source.files.paths)]]
    if len(set(files)) < len(files):
        raise UserError("--out, --top_k_out and the data are the same file; name different ones.")
