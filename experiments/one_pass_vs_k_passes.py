"""What do K passes over a dialogue cost, and what does one pass with the same loss and gradient cost?

Question:  a human dialogue, truncated to its first K turns, is run forward and backward in one pass over its tree, and
           in K passes, one for each response behind its prompt, with the same code. How do tokens, FLOPs, time and
           memory grow with K, for a template that keeps history unchanged and for one that strips reasoning from it?
           And is the one pass exact, compared with `evaluation.k_passes`, which shares only the decoder with it?
Command:   python experiments/one_pass_vs_k_passes.py
Hardware:  two cores of an AMD EPYC with AVX-512, shared with other work that paused during measurements.
Time:      43 min, mostly the K passes of 16 and 32 turns, each run once for timing and once for comparison.
Result:    32 turns: 1,663 tokens and 11.5 s in one pass, 26,660 tokens and 179.8 s in K passes; tokens grow as K^1.11
           and K^1.99, seconds as K^1.00 and K^1.82. Over all 536 dialogues that are long enough, K passes read 16.3
           times as many tokens. Reasoning stripped: 3,988 tokens and 48.4 s, against 28,331 tokens and 194.4 s. There
           the one pass saves less time than tokens, because attention also computes pairs that the mask discards, and
           its row is longer than that of any of the passes, which costs memory: 4.1 GB of temporaries against 1.9.
           One pass differs from K passes by at most 1.6e-7 in the loss and 2.8e-6 in the gradient.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import report
from absl import flags
from matplotlib.figure import Figure
from report import Options

from dialog_jax.batching import batches
from dialog_jax.batching.batches import Batch
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.errors import UserError
from dialog_jax.evaluation import k_pass_losses, k_passes
from dialog_jax.inference import loading
from dialog_jax.model import decoder
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training import loss, metrics
from dialog_jax.trees import dataset
from dialog_jax.trees.dialogue_trees import TreeConfig

TURNS = (1, 2, 4, 8, 16, 32)
_REASONING = pathlib.Path(__file__).parent / "templates" / "reasoning.jinja"
_MULTIPLE = 64  # rows are padded to a multiple of this, in tokens and targets
_FITTED_FROM = 4  # turns; with fewer, the system prompt dominates
_REPEATED_FOR = 5.0  # seconds
_NO_LIMIT = 2**20  # tokens
_WAYS = {"one_pass": ("one pass", report.BLUE), "k_passes": ("K passes", report.ORANGE)}
_COSTS = {
    "tokens": ("tokens", 1, ",.0f"),
    "flops": ("TFLOPs", 1e12, ".2f"),
    "seconds": ("seconds", 1, ".1f"),
    "temporary_bytes": ("GB", 1e9, ".2f"),
}


def truncate(dialogue: Dialogue, turns: int) -> Dialogue:
    """Returns the dialogue up to its response number `turns`, counting from 1."""
    return dataclasses.replace(dialogue, messages=dialogue.messages[: _responses(dialogue)[turns - 1] + 1])


def separate_responses(dialogue: Dialogue) -> list[Dialogue]:
    """Returns one dialogue per response, which ends with it and has weight 0 on earlier responses."""
    history = [dataclasses.replace(message, weight=0.0) for message in dialogue.messages]
    return [
        dataclasses.replace(dialogue, messages=(*history[:index], dialogue.messages[index]))
        for index in _responses(dialogue)
    ]


def with_reasoning(dialogue: Dialogue) -> Dialogue:
    """Returns the dialogue with reasoning before every response, built from the previous message and the response."""
    messages: list[Message] = []
    for message in dialogue.messages:
        if message.role == "assistant" and messages:
            words = message.content.split()
            heard = messages[-1].content.split("</think>")[-1].strip()
            thought = f"I was told: {heard}\nI could answer in {len(words)} words, from {' '.join(words[:2])!r} on."
            message = dataclasses.replace(message, content=f"<think>\n{thought}\n</think>\n\n{message.content}")
        messages.append(message)
    return dataclasses.replace(dialogue, messages=tuple(messages))


def _responses(dialogue: Dialogue) -> list[int]:
    return [index for index, message in enumerate(dialogue.messages) if message.role == "assistant"]


def fill_rows(dialogues: Sequence[Dialogue], renderer: Renderer) -> list[Batch]:
    """Returns a batch of one row per dialogue, padded to a multiple of `_MULTIPLE`."""
    trees = dataset.prepare(dialogues, renderer, TreeConfig(max_length=_NO_LIMIT))
    filled = []
    for number in range(len(trees)):
        length = -(-trees.size(number) // _MULTIPLE) * _MULTIPLE
        filled.append(batches.fill_rows(trees, [[number]], max_length=length))
    return filled


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def add_gradient(model, parameters, gradient, batch):
    """Returns (weighted loss of a batch, `gradient` plus its gradient), computed as in training."""

    def weighted(parameters):
        hidden = decoder.hidden_states(model, parameters, batch.tokens, batch.position, batch.subtree_end, remat="dots")
        targets = loss.Targets(batch.source, batch.target, batch.weight)
        return loss.weighted_loss(hidden, decoder.unembedding(model, parameters), targets)[0]

    value, batch_gradient = jax.value_and_grad(weighted)(parameters)
    return value, jax.tree.map(jnp.add, gradient, batch_gradient)


def measure_cost(model, parameters: dict, many: Sequence[Batch], name: str) -> tuple[dict[str, Any], float, dict]:
    """Returns (cost of running the batches one after another, sum of their losses, sum of their gradients).

    `seconds` is the minimum over the runs that start within `_REPEATED_FOR`, without compilation. `temporary_bytes` is
    the memory that XLA reserves for the largest batch besides parameters and gradient.
    """

    def run() -> tuple[float, dict, float]:
        value, gradient = 0.0, jax.block_until_ready(jax.tree.map(jnp.zeros_like, parameters))
        started = time.perf_counter()
        for batch in many:
            of_batch, gradient = compiled[batch.tokens.shape, batch.source.shape](parameters, gradient, batch)
            value += float(of_batch)
        jax.block_until_ready(gradient)
        return value, gradient, time.perf_counter() - started

    compiled, temporary = {}, 0
    for batch in many:
        shape = batch.tokens.shape, batch.source.shape
        if shape not in compiled:
            compiled[shape] = add_gradient.lower(model, parameters, parameters, batch).compile()
            memory = compiled[shape].memory_analysis()
            assert memory is not None
            temporary = max(temporary, memory.temp_size_in_bytes)
    print(f"{name}: compiled", flush=True)
    seconds: list[float] = []
    while sum(seconds) < _REPEATED_FOR:
        value, gradient, taken = run()
        seconds.append(taken)
    print(f"{name}: {min(seconds):.2f} s, minimum of {len(seconds)} runs", flush=True)
    figures = {
        "tokens": sum(int((batch.segment > 0).sum()) for batch in many),
        "flops": sum(
            metrics.count_flops(
                model,
                tokens=int((batch.segment > 0).sum()),
                attention_pairs=int((batch.position + 1)[batch.segment > 0].sum()),
                targets=int((batch.weight > 0).sum()),
            )
            for batch in many
        ),
        "seconds": min(seconds),
        "temporary_bytes": temporary,
    }
    return figures, value, gradient


def measure(model: loading.Model, dialogue: Dialogue, name: str) -> dict[str, Any]:
    """Returns the costs of one pass and of K passes, and the difference of one pass from `evaluation.k_passes`."""
    config, parameters = model.config, model.parameters
    of_k, _, _ = measure_cost(
        config, parameters, fill_rows(separate_responses(dialogue), model.renderer), f"{name}, K passes"
    )
    of_one, value, gradient = measure_cost(
        config, parameters, fill_rows([dialogue], model.renderer), f"{name}, one pass"
    )
    nll, expected = k_pass_losses.compute_nll_and_gradient(
        config, parameters, k_passes.make_passes(dialogue, model.tokenizer)
    )
    total = math.fsum(math.fsum(each) for each in nll)
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected))
    return {
        "turns": len(_responses(dialogue)),
        "one_pass": of_one,
        "k_passes": of_k,
        "loss_difference": abs(value - total) / total,
        "gradient_difference": float(apart / optax.tree.norm(expected)),
    }


def exponent(turns: Sequence[int], values: Sequence[float]) -> float:
    """Returns the least-squares slope of log(value) over log(turns), from `_FITTED_FROM` turns on."""
    used = [(math.log(k), math.log(value)) for k, value in zip(turns, values, strict=True) if k >= _FITTED_FROM]
    if len(used) < 2:
        return math.nan
    x, y = np.array(used).T
    return float(np.polyfit(x, y, 1)[0])


def select_median(dialogues: Sequence[Dialogue], renderer: Renderer) -> Dialogue:
    """Returns the dialogue whose tree has the median number of tokens."""
    trees = dataset.prepare(dialogues, renderer, TreeConfig(max_length=_NO_LIMIT))
    tokens, _ = trees.sizes()
    return dialogues[int(np.argsort(tokens, kind="stable")[len(tokens) // 2])]


def _table(measured: Sequence[Mapping[str, Any]]) -> str:
    turns = [record["turns"] for record in measured]
    cells = [[str(k)] for k in turns] + [["exponent"]]
    for what, (_, scale, style) in _COSTS.items():
        for way in _WAYS:
            values = [record[way][what] for record in measured]
            for line, value in zip(cells, values, strict=False):
                line.append(format(value / scale, style))
            cells[-1].append(f"{exponent(turns, values):.2f}")
    for line, record in zip(cells, measured, strict=False):
        line += [f"{record['loss_difference']:.1e}", f"{record['gradient_difference']:.1e}"]
    cells[-1] += ["", ""]
    costs = [f"{word}, {name}" for name, _, _ in _COSTS.values() for word, _ in _WAYS.values()]
    return report.table(["turns K", *costs, "loss differs", "gradient differs"], cells)


def _table_of_all(dialogues: Sequence[Dialogue], renderer: Renderer, turns: Sequence[int]) -> str:
    """Returns a table of mean numbers of tokens over many dialogues."""
    cells, means = [], []
    for count in turns:
        shorter = [truncate(dialogue, count) for dialogue in dialogues]
        trees = dataset.prepare(shorter, renderer, TreeConfig(max_length=_NO_LIMIT))
        separate = sum(len(sequence.tokens) for sequences in renderer.render(shorter) for sequence in sequences)
        means.append((trees.report.tokens / len(shorter), separate / len(shorter)))
        one, many = means[-1]
        cells.append([str(count), f"{one:,.0f}", f"{many:,.0f}", f"{many / one:.1f}"])
    fitted = [f"{exponent(turns, column):.2f}" for column in zip(*means, strict=True)]
    return report.table(["turns K", "one pass", "K passes", "ratio"], [*cells, ["exponent", *fitted, ""]])


def _draw(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    with report.style():
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        for axes, what in zip(panels, ("tokens", "seconds"), strict=True):
            for (template, records), line in zip(measured.items(), ("-", "--"), strict=True):
                turns = [record["turns"] for record in records]
                for way, (word, color) in _WAYS.items():
                    values = [record[way][what] for record in records]
                    label = f"{word}, {template}: $K^{{{exponent(turns, values):.2f}}}$"
                    axes.loglog(turns, values, line, color=color, marker="o", markersize=3.5, label=label)
            axes.set(xlabel="turns K", ylabel=_COSTS[what][0], title=f"{_COSTS[what][0]}, forward and backward")
            axes.set_xticks(turns, [str(k) for k in turns])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=9)
        return figure


def main(options: Options, turns: Sequence[int] = TURNS) -> None:
    started = time.perf_counter()
    model = loading.load_model(options.model)
    tokenizer = load_tokenizer(options.model, chat_template=str(_REASONING))
    stripping = model._replace(tokenizer=tokenizer, renderer=Renderer(tokenizer))
    long = [dialogue for dialogue in read_dialogues(options.train) if len(_responses(dialogue)) >= turns[-1]]
    if not long:
        raise UserError(f"{options.train} has no dialogue of {turns[-1]} responses; give --train another file.")
    long = [truncate(dialogue, turns[-1]) for dialogue in long]
    dialogue = select_median(long, model.renderer)
    with jax.default_matmul_precision("highest"):
        measured = {
            "history kept": [measure(model, truncate(dialogue, k), f"{k} turns, history kept") for k in turns],
            "reasoning stripped": [
                measure(stripping, truncate(with_reasoning(dialogue), k), f"{k} turns, reasoning stripped")
                for k in turns
            ],
        }
    report.write(
        options,
        _draw(measured),
        [
            f"Measured on {dialogue.name}, the median in tokens of the {len(long):,} dialogues with at least "
            f"{turns[-1]} responses. K passes run one response after another with the same code as the one pass. "
            f"Rows are padded to multiples of {_MULTIPLE} tokens. Seconds are the minimum over the runs that start "
            f"within {_REPEATED_FOR:.0f} s, without compilation. TFLOPs are those that are needed, without padding, "
            "from the model's shape (`metrics.count_flops`). GB are temporaries: the memory that XLA reserves for the "
            "largest row besides parameters and gradient (`memory_analysis`). The last two columns are the relative "
            "differences of loss and gradient (in norm) between one pass and `evaluation.k_passes`. The last line "
            f"is the exponent p of cost ~ K^p, fitted from {_FITTED_FROM} turns on.",
            "## The template of the model keeps history unchanged",
            _table(measured["history kept"]),
            "## A template that strips reasoning from history: the tree branches at every turn",
            "The same dialogue with reasoning inserted before every response.",
            _table(measured["reasoning stripped"]),
            "## Tokens, mean over all of these dialogues, history kept",
            _table_of_all(long, model.renderer, turns),
        ],
        seconds=time.perf_counter() - started,
    )


def _write_reasoning(source: str, out: str) -> None:
    with open(out, "w", encoding="utf-8") as file:
        for dialogue in map(with_reasoning, read_dialogues(source)):
            messages = [message.as_dict() for message in dialogue.messages]
            file.write(json.dumps({"id": dialogue.id, "messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string(
        "write_reasoning",
        "",
        "Only write the dialogues of --train with reasoning to this .jsonl, for dialog_jax check.",
    )
    report.run_script(
        lambda options: _write_reasoning(options.train, _OUT.value) if _OUT.value else main(options),
        "one_pass_vs_k_passes",
    )
