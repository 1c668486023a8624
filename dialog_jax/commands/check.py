"""Verifies on your model, template and data that one pass over a dialogue equals one pass for each of its responses.

    dialog_jax check --config.model=MODEL --config.data.train=my.jsonl --dialogues=8

Packs a random sample of dialogues into rows of data.max_length tokens and runs the update of training on them; then
runs every response separately after its prompt, as the tokenizer's chat interface renders the two. Compares the token
ids and positions that each response token attends to, the weights, the loss of every response, and the gradient: its
norm, its direction, and that of every parameter that would be trained. Everything is computed in float32 with the
objective `conditional`. The output is a table of the largest differences and their places, and a verdict.

What is trained is what the config says: everything, a part (`freeze`, `train_only`), or an adapter: that of --adapter
or of a run, or a new one (`lora.rank`, `soft_prompt.tokens`). Factors that are zero, as in a new adapter, have no
gradient or give none to others, and are drawn at random. Frozen matrices have the type that `frozen_dtype` says.

Exit code: 0 if the two agree, 2 if they do not or if nothing was compared, 1 if the check could not be run.
"""

from collections.abc import Sequence

import numpy as np
import rich.box
import rich.console
import rich.table
from absl import flags

from dialog_jax.commands import config_flag, config_inputs
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.evaluation import agreement
from dialog_jax.evaluation.differences import Agreement, Finding
from dialog_jax.inference import loading
from dialog_jax.training import data_sources, trainable, trained_models
from dialog_jax.training.config import require_fields

_CONFIG = config_flag.define()
_DATA = config_inputs.define_data()
_ADAPTER = config_inputs.define_adapter()
_BASE = config_inputs.define_base()
_DIALOGUES = flags.DEFINE_integer("dialogues", 8, "Number of dialogues, sampled at random.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sample.", lower_bound=0)

_DISAGREE = 2
_NAMED = 10  # of the dialogues that are left out
_WIDTH = 120  # characters, where the output goes to a file


def sample_dialogues(dialogues: Sequence[Dialogue], count: int, seed: int) -> list[Dialogue]:
    """Returns `count` of the dialogues, or all where there are fewer, in the order of the file."""
    indices = np.random.default_rng(seed).permutation(len(dialogues))[:count]
    return [dialogues[index] for index in sorted(indices)]


def show(outcome: Agreement, out: rich.console.Console) -> None:
    """Prints what was compared, what was left out, and the largest differences."""
    out.print(
        f"compared   dialogues {outcome.dialogues:,} ({outcome.branching:,} branch), responses {outcome.responses:,}, "
        f"their tokens {outcome.response_tokens:,}, rows {len(outcome.rows):,} of {outcome.row_length:,}"
    )
    if outcome.responses:
        times = outcome.k_pass_tokens / outcome.one_pass_tokens
        out.print(
            f"tokens     one pass {outcome.one_pass_tokens:,}, K passes {outcome.k_pass_tokens:,}: "
            f"{times:.2f} times as many"
        )
    for number, names in enumerate(outcome.rows):
        out.print(f"{f'row {number}':10} {', '.join(names)}")
    out.print(f"left out   {len(outcome.left_out) or 'none'}")
    for line in outcome.left_out[:_NAMED]:
        out.print(f"           {line}")
    if len(outcome.left_out) > _NAMED:
        out.print(f"           and {len(outcome.left_out) - _NAMED:,} more")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for heading in ("difference in", "compared", "largest", "allowed", "where, and what one pass | K passes have"):
        table.add_column(heading, justify="right" if heading in ("compared", "largest", "allowed") else "left")
    for what, finding in outcome.findings.items():
        table.add_row(*_row(what, finding), style="bold red" if finding.beyond else "")
    out.print(table, soft_wrap=False)


def verdict(outcome: Agreement) -> str:
    """Returns the last line of the output: whether one pass equals K passes."""
    if outcome.passed:
        count = f"dialogues {outcome.dialogues:,}, responses {outcome.responses:,}"
        left_out = f"left out {len(outcome.left_out):,}, see above" if outcome.left_out else "left out none"
        return f"PASSED: one pass equals K passes ({count}; {left_out})"
    beyond = [
        f"{what} ({finding.beyond:,} of {finding.compared:,})"
        for what, finding in outcome.findings.items()
        if finding.beyond
    ]
    return f"FAILED: {'one pass and K passes differ in ' + ', '.join(beyond) if beyond else 'nothing was compared'}"


def _row(what: str, finding: Finding) -> list[str]:
    allowed = f"{finding.tolerance:.0e}" if finding.tolerance else "none"
    if finding.largest is None:
        return [what, "0", "", allowed, ""]
    size, where, one_pass, k_passes = finding.largest
    if not size:
        return [what, f"{finding.compared:,}", "none", allowed, ""]
    size_text = f"{size:.1e}" if np.isfinite(size) else "differs"
    return [what, f"{finding.compared:,}", size_text, allowed, f"{where}\n{one_pass} | {k_passes}"]


def main() -> int:
    console = rich.console.Console(stderr=True, highlight=False)
    config = config_inputs.read_config(_CONFIG, _ADAPTER)
    require_fields(config, "check", "model")
    source = data_sources.find_source(config, _DATA.value)
    skipped: list[str] = []
    dialogues = list(source.read(skipped))
    model = trained_models.load_model(config.model, base=_BASE.value, **config_inputs.model_options(config))
    loading.check_context(model.config, config.data.max_length)
    parameters = trainable.divide(
        config, model.config, model.parameters, model.tokenizer(config.soft_prompt.text)["input_ids"]
    )
    sample = sample_dialogues(dialogues, _DIALOGUES.value, _SEED.value)
    with console.status("rendering") as status:
        outcome = agreement.compare(
            sample,
            model.renderer,
            model.config,
            parameters,
            max_length=config.data.max_length,
            report_progress=status.update,
        )
    out = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
    if not out.is_terminal:
        out.width = _WIDTH
    out.print(f"sample     {len(sample):,} of the {len(dialogues):,} dialogues of {source.name}, seed {_SEED.value}")
    if skipped:
        out.print(f"skipped    {len(skipped):,} records that are no valid dialogues; the first: {skipped[0]}")
    show(outcome, out)
    print(verdict(outcome))
    return 0 if outcome.passed else _DISAGREE
