"""Chooses the responses to train on by their scores, and writes a weight for each.

    dialog_jax score  --config.model=MODEL --config.data.train=my.jsonl --out=scores.jsonl \\
                      --context=none
    dialog_jax select --scores=scores.jsonl --criterion=ifd --keep=0.3 --out=weights.jsonl
    dialog_jax train  --config.model=MODEL --config.data.train=my.jsonl --output_dir=runs/ifd \\
                      --config.data.weights=weights.jsonl

Writes one line of JSON per dialogue, with the weight of each response and the value that it was chosen by:

    {"id": "a1", "content": "93f1c2d47a60b58e",
     "turns": [{"turn": 0, "message": 1, "weight": 1.0, "value": 0.87}]}

Dialogues stay whole: a response that is not kept has weight 0 and is history of those that follow. Training multiplies
these weights with those of the data, leaves out dialogues of which nothing is kept, and stops if the data is not what
was scored. Held-out dialogues keep the weights of the data.

    perplexity     exp(nats per token); low is kept
    ifd            nats with full history / nats behind the bare generation prompt; high is kept,
                   above 1 never
    history_gain   nats per token behind the last user message - with full history; high is kept
    rho            nats per token of the model of the first file - of the second; high is kept
    length         tokens; high is kept
    longest        the baseline of the longest responses
    random         the baseline of random ones, from --seed

docs/select.md has the sources.
"""

import pathlib

import numpy as np
from absl import flags

from dialog_jax.commands import entry
from dialog_jax.dialogues import weight_file
from dialog_jax.errors import UserError
from dialog_jax.evaluation import selection
from dialog_jax.evaluation.selection import Scores, Selection

_SCORES = flags.DEFINE_list("scores", [], "The file that dialog_jax score wrote; for rho two of them, base and tuned.")
_OUT = flags.DEFINE_string("out", None, "The .jsonl file to write; an existing one is replaced.")
_CRITERION = flags.DEFINE_enum("criterion", None, list(selection.CRITERIA), "What responses are chosen by.")
_KEEP = flags.DEFINE_float("keep", None, "Share of the responses to keep.")
_THRESHOLD = flags.DEFINE_float("threshold", None, "Smallest value to keep; the largest one if low is preferred.")
_WEIGH = flags.DEFINE_bool(
    "weigh", False, "Keep all, with weights that grow evenly from the worst to the best and have the mean 1."
)
_PREFER = flags.DEFINE_enum("prefer", "", ["", "high", "low"], "Which values are kept; empty for the criterion's own.")
_SEED = flags.DEFINE_integer("seed", 0, "Of random, and of the order of equal values.")


def describe(name: str, scores: Scores, chosen: Selection, prefer: str) -> str:
    """Returns what was chosen, and by which values."""
    criterion = selection.CRITERIA[name]
    is_kept = chosen.weight > 0
    counts = [len(record["turns"]) for record in scores.values()]
    kept_per_dialogue = [part.sum() for part in np.split(is_kept, np.cumsum(counts)[:-1])]
    empty = sum(not count for count in kept_per_dialogue)
    lines = [
        f"{is_kept.sum():,} of {len(is_kept):,} responses are kept ({is_kept.mean():.1%}), "
        f"{chosen.tokens[is_kept].sum():,} of {chosen.tokens.sum():,} tokens",
        f"{empty:,} of {len(scores):,} dialogues have none of them and are left out of training",
    ]
    values = chosen.value[np.isfinite(chosen.value)]
    kept_values = chosen.value[is_kept]
    quartiles = ", ".join(f"{value:.4g}" for value in np.quantile(values, [0.25, 0.5, 0.75])) if len(values) else "none"
    lines.append(
        f"{name} ({criterion.meaning}): {prefer or criterion.prefer} is kept, from {kept_values.min():.4g} to "
        f"{kept_values.max():.4g}; quartiles of all {quartiles}"
    )
    if count := (chosen.value > criterion.limit).sum():
        lines.append(f"{count:,} responses have a value above {criterion.limit:g} and are never kept")
    if count := (~np.isfinite(chosen.value)).sum():
        lines.append(f"{count:,} responses have no value, since they have no tokens or no loss, and are not kept")
    if count := sum(record.get("turns_cut", 0) for record in scores.values()):
        lines.append(f"{count:,} responses were too long to be scored and are not kept")
    return "\n".join(lines)


def main() -> None:
    out = entry.require_file_path(_OUT, "weights.jsonl")
    if not _SCORES.value:
        raise UserError("--scores is missing. Pass it, for instance --scores=scores.jsonl.")
    if out.resolve() in {pathlib.Path(path).expanduser().resolve() for path in _SCORES.value}:
        raise UserError(f"--out={out} is one of --scores, which it would replace. Name another file.")
    name = entry.required(_CRITERION, "ifd")
    if (_KEEP.value is not None) + (_THRESHOLD.value is not None) + _WEIGH.value != 1:
        raise UserError("needs one of --keep=SHARE, --threshold=VALUE and --weigh.")
    if _KEEP.value is not None and not 0 < _KEEP.value <= 1:
        raise UserError(f"--keep is {_KEEP.value:g}; it must be above 0 and at most 1, a share of the responses.")
    if _PREFER.value and name in selection.BASELINES:
        raise UserError(f"--prefer={_PREFER.value} has no effect on the baseline {name}. Leave it out.")
    files = [selection.read_scores(path) for path in _SCORES.value]
    chosen = selection.choose(
        name, files, keep=_KEEP.value, threshold=_THRESHOLD.value, prefer=_PREFER.value, seed=_SEED.value
    )
    weight_file.write_file(out, selection.make_lines(files[0], chosen))
    print(f"{out}: {describe(name, files[0], chosen, _PREFER.value)}")
    print(f"to train on them, add to the flags of train: --config.data.weights={out}")
