"""What do K passes over a dialogue cost, and what does one pass that gives the same loss and gradient?

A human dialogue of ChitChat is cut to its first K turns. One pass reads its tree; K passes read each response behind
its prompt, one after another, with the same code. Both are run forward and backward with the weights of
SmolLM2-135M-Instruct, for the model's own template, and for one that strips reasoning from history, where the tree
branches. Loss and gradient of the one pass are compared with `training.k_passes`, which shares no code with it.

Command:   python experiments/one_pass_vs_k_passes.py
Hardware:  not run yet.
Time:      not run yet.
Result:    not run yet.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags, logging

matplotlib.use("Agg")  # no window, and none needed

import matplotlib.pyplot as plt

from dialog_jax import chat
from dialog_jax.data import batches, dataset
from dialog_jax.data.batches import Batch
from dialog_jax.data.dialogues import Dialogue, Message, read_dialogues
from dialog_jax.data.objectives import ObjectiveConfig
from dialog_jax.data.rendering import Renderer
from dialog_jax.data.tokenizers import load_tokenizer
from dialog_jax.model import decoder
from dialog_jax.training import k_passes, loss, metrics

_MODEL = flags.DEFINE_string("model", "assets/smollm2-135m-instruct", "Model directory.")
_DATA = flags.DEFINE_string("data", "assets/chitchat/train.jsonl", "Dialogues.")
_TURNS = flags.DEFINE_list("turns", ["1", "2", "4", "8", "16", "32"], "Numbers of turns to measure now.")
_TEMPLATES = flags.DEFINE_list("templates", ["own", "reasoning"], "Which templates to measure now.")
_MEASURED = flags.DEFINE_string(
    "measured", "runs/one_pass_vs_k_passes.jsonl", "Where measurements are kept; what is there is not measured again."
)
_RESULTS = flags.DEFINE_string("results_dir", "experiments/results", "Where the table and the picture go.")
_WRITE_REASONING = flags.DEFINE_string(
    "write_reasoning", "", "Only write the dialogues with reasoning put in to this .jsonl, for scripts/check.py."
)

_NAME = "one_pass_vs_k_passes"
_REASONING = pathlib.Path(__file__).parent / "templates" / "reasoning.jinja"
_MOST_TURNS = 32
_MULTIPLE = 64  # to which rows are padded, tokens and targets
_FITTED_FROM = 4  # turns; with fewer, the system prompt is much of a pass
_REPEATED_FOR = 20.0  # seconds
_WAYS = ("one_pass", "k_passes")


def cut(dialogue: Dialogue, turns: int) -> Dialogue:
    """Returns the dialogue up to its response number `turns`, counted from 1."""
    responses = [index for index, message in enumerate(dialogue.messages) if message.role == "assistant"]
    return dataclasses.replace(dialogue, messages=dialogue.messages[: responses[turns - 1] + 1])


def alone(dialogue: Dialogue) -> list[Dialogue]:
    """Returns a dialogue for each response, which ends with it and has weight 0 on the earlier ones."""
    responses = [index for index, message in enumerate(dialogue.messages) if message.role == "assistant"]
    history = [dataclasses.replace(message, weight=0.0) for message in dialogue.messages]
    return [dataclasses.replace(dialogue, messages=(*history[:index], dialogue.messages[index])) for index in responses]


def with_reasoning(dialogue: Dialogue) -> Dialogue:
    """Returns the dialogue with a thought before every response, made of what was just said and of the response."""
    messages: list[Message] = []
    for message in dialogue.messages:
        if message.role == "assistant" and messages:
            heard, words = messages[-1].content, message.content.split()
            thought = f"I was told: {heard}\nI could answer in {len(words)} words, from {' '.join(words[:2])!r} on."
            message = dataclasses.replace(message, content=f"<think>\n{thought}\n</think>\n\n{message.content}")
        messages.append(message)
    return dataclasses.replace(dialogue, messages=tuple(messages))


def rows(dialogues: Sequence[Dialogue], renderer: Renderer) -> list[Batch]:
    """Returns a batch of one row for each dialogue, padded to the next multiple."""
    trees = dataset.prepare(dialogues, renderer, objective=ObjectiveConfig(), max_length=2**20)
    made = []
    for number, (tokens, targets) in enumerate(zip(*trees.sizes(), strict=True)):
        length, most = (-(-int(count) // _MULTIPLE) * _MULTIPLE for count in (tokens, targets))
        made.append(batches.fill_rows(trees, [[number]], max_length=length, max_targets=most))
    return made


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def add_gradient(model, parameters, gradient, batch):
    """(weighted loss of a batch, `gradient` with its own added): forward and backward pass as in training."""

    def weighted(parameters):
        hidden = decoder.hidden_states(model, parameters, batch.tokens, batch.position, batch.subtree_end, remat="dots")
        matrix = decoder.output_matrix(model, parameters)
        return loss.weighted_nll(hidden, matrix, batch.source, batch.target, batch.weight)

    value, own = jax.value_and_grad(weighted)(parameters)
    return value, jax.tree.map(jnp.add, gradient, own)


def cost(model, parameters: dict, many: Sequence[Batch]) -> tuple[dict[str, Any], float, dict]:
    """Returns (what running the batches one after another costs, the sum of their losses, that of their gradients).

    `seconds` is the least of as many runs as begin within `_REPEATED_FOR`, and counts no compilation. `temporary_bytes`
    is what XLA sets aside for the largest batch besides parameters and gradient.
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
    seconds: list[float] = []
    while sum(seconds) < _REPEATED_FOR:
        value, gradient, taken = run()
        seconds.append(taken)
    figures = {
        "tokens": sum(int((batch.segment > 0).sum()) for batch in many),
        "flops": sum(metrics.useful_flops(model, batch) for batch in many),
        "seconds": min(seconds),
        "runs": len(seconds),
        "temporary_bytes": temporary,
    }
    return figures, value, gradient


def measure(model: chat.ChatModel, dialogue: Dialogue) -> dict[str, Any]:
    """Returns the costs of both ways, and how far one pass is from `training.k_passes`."""
    one_pass, value, gradient = cost(model.config, model.parameters, rows([dialogue], model.renderer))
    k_pass, _, _ = cost(model.config, model.parameters, rows(alone(dialogue), model.renderer))
    nll, expected = k_passes.nll_and_gradient(
        model.config, model.parameters, k_passes.passes(dialogue, model.tokenizer)
    )
    total = math.fsum(math.fsum(each) for each in nll)
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected))
    return {
        "one_pass": one_pass,
        "k_passes": k_pass,
        "loss": total,
        "loss_difference": abs(value - total) / total,
        "gradient_difference": float(apart / optax.tree.norm(expected)),
    }


def exponent(turns: Sequence[int], values: Sequence[float]) -> float:
    """Returns the slope of log(value) over log(turns), by least squares, from `_FITTED_FROM` turns on."""
    used = [(math.log(k), math.log(value)) for k, value in zip(turns, values, strict=True) if k >= _FITTED_FROM]
    if len(used) < 2:
        return math.nan
    x, y = np.array(used).T
    return float(np.polyfit(x, y, 1)[0])


def typical(dialogues: Sequence[Dialogue], renderer: Renderer) -> Dialogue:
    """Returns the dialogue whose tree of `_MOST_TURNS` turns has the median number of tokens."""
    trees = dataset.prepare(
        [cut(dialogue, _MOST_TURNS) for dialogue in dialogues], renderer, objective=ObjectiveConfig(), max_length=2**20
    )
    tokens, _ = trees.sizes()
    return dialogues[int(np.argsort(tokens, kind="stable")[len(tokens) // 2])]


def table_of_all(dialogues: Sequence[Dialogue], renderer: Renderer) -> str:
    """Returns the mean number of tokens that each way reads of the dialogues, cut to 1, 2, 4, ... turns."""
    lines = ["| turns K | one pass | K passes | times as many |", "| ---: | ---: | ---: | ---: |"]
    turns = [2**n for n in range(int(math.log2(_MOST_TURNS)) + 1)]
    means: dict[str, list[float]] = {way: [] for way in _WAYS}
    for count in turns:
        shorter = [cut(dialogue, count) for dialogue in dialogues]
        trees = dataset.prepare(shorter, renderer, objective=ObjectiveConfig(), max_length=2**20)
        separate = sum(len(sequence.tokens) for sequences in renderer.render(shorter) for sequence in sequences)
        means["one_pass"].append(trees.report.tokens / len(shorter))
        means["k_passes"].append(separate / len(shorter))
        one, many = (means[way][-1] for way in _WAYS)
        lines.append(f"| {count} | {one:,.0f} | {many:,.0f} | {many / one:.1f} |")
    fitted = [f"{exponent(turns, means[way]):.2f}" for way in _WAYS]
    lines.append(f"| exponent | {' | '.join(fitted)} | |")
    return "\n".join(lines)


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Returns the measurements of one template as Markdown, with the fitted exponents in the last line."""
    heading = "turns K | tokens | | TFLOPs | | seconds | | temporaries, GB | | loss differs | gradient differs"
    lines = [f"| {heading} |", "| ---: |" + " ---: |" * 10]
    lines.append("| " + " | ".join(["", *["one pass", "K passes"] * 4, "relative", "relative"]) + " |")
    scales = {"tokens": (1, ",.0f"), "flops": (1e12, ".2f"), "seconds": (1, ".1f"), "temporary_bytes": (1e9, ".2f")}
    for record in measured:
        cells = [f"{record['turns']}"]
        for what, (scale, style) in scales.items():
            cells += [format(record[way][what] / scale, style) for way in _WAYS]
        cells += [f"{record['loss_difference']:.1e}", f"{record['gradient_difference']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    turns = [record["turns"] for record in measured]
    fitted = [f"{exponent(turns, [record[way][what] for record in measured]):.2f}" for what in scales for way in _WAYS]
    lines.append(f"| exponent | {' | '.join(fitted)} | | |")
    return "\n".join(lines)


def plot(measured: dict[str, list[dict[str, Any]]], file: pathlib.Path) -> None:
    """Draws tokens and seconds over turns, both axes logarithmic."""
    colors = {"one_pass": "#1f5fa8", "k_passes": "#c2681f"}
    words = {"one_pass": "one pass", "k_passes": "K passes"}
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), dpi=110, layout="constrained")
        for axes, what, label in zip(panels, ("tokens", "seconds"), ("tokens read", "seconds"), strict=True):
            for template, line in (("own", "-"), ("reasoning", "--")):
                for way in _WAYS:
                    turns = [record["turns"] for record in measured[template]]
                    values = [record[way][what] for record in measured[template]]
                    slope = exponent(turns, values)
                    legend = f"{words[way]}, {template} template: K^{slope:.2f}"
                    axes.loglog(turns, values, line, color=colors[way], marker="o", markersize=4, label=legend)
            axes.set(xlabel="turns K", ylabel=label, title=f"{label[0].upper()}{label[1:]}, forward and backward")
            axes.set_xticks(turns, [str(k) for k in turns])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=8.5)
        figure.savefig(file)
        plt.close(figure)


def write_results(measured: dict[str, list[dict[str, Any]]], of_all: str, results: pathlib.Path) -> None:
    """Writes the picture and, around the tables, what they are of."""
    results.mkdir(parents=True, exist_ok=True)
    plot(measured, results / f"{_NAME}.png")
    first = measured["own"][0]
    text = [
        "# One pass and K passes over a dialogue",
        f"`python experiments/{_NAME}.py`; {first['machine']}; JAX {jax.__version__}; float32.",
        f"![Tokens and seconds over turns]({_NAME}.png)",
        f"{first['dialogue']}, the median in tokens of those with {_MOST_TURNS} responses and more, is cut to K turns "
        "and goes forward and backward through the model. K passes read one response after another with the same code. "
        f"Rows are padded to multiples of {_MULTIPLE} tokens.",
        f"* Seconds are the least of the runs that begin within {_REPEATED_FOR:.0f} s, without compilation.\n"
        "* FLOPs are those that the work needs, without padding, from the model's shape (`metrics.useful_flops`).\n"
        "* Temporaries are what XLA sets aside for the largest row besides parameters and gradient "
        "(`memory_analysis`).\n"
        "* The differences are those of one pass from `training.k_passes`, which shares no code with it but the "
        "decoder: of the loss, and of the gradient as the norm of the difference over the norm.\n"
        f"* The exponents are the p of cost ~ K^p, fitted from {_FITTED_FROM} turns on.",
        "## The model's own template: history as it was generated",
        table(measured["own"]),
        "## A template that strips reasoning: the tree branches at every turn",
        "The same dialogue with a short thought put before every response.",
        table(measured["reasoning"]),
        f"## Tokens of all dialogues of {_MOST_TURNS} responses and more",
        "Means, for the model's own template.",
        of_all,
    ]
    (results / f"{_NAME}.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def measure_missing(store: pathlib.Path, dialogue: Dialogue) -> dict[str, list[dict[str, Any]]]:
    """Measures what the flags ask for and `store` has not, adds it there, and returns all of it by template."""
    store.parent.mkdir(parents=True, exist_ok=True)
    measured = metrics.read_lines(store)
    done = {(record["template"], record["turns"]) for record in measured}
    own = chat.load(_MODEL.value)
    # The second model is the first one's weights with another template.
    tokenizer = load_tokenizer(_MODEL.value, chat_template=str(_REASONING))
    stripping = own._replace(tokenizer=tokenizer, renderer=Renderer(tokenizer))
    for template in _TEMPLATES.value:
        model, whole = (own, dialogue) if template == "own" else (stripping, with_reasoning(dialogue))
        for turns in map(int, _TURNS.value):
            if (template, turns) in done:
                continue
            record = {"template": template, "turns": turns, "dialogue": dialogue.name, "machine": _machine()}
            record |= measure(model, cut(whole, turns))
            measured.append(record)
            print(json.dumps(record))
            with store.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    return {
        template: sorted((r for r in measured if r["template"] == template), key=lambda record: record["turns"])
        for template in ("own", "reasoning")
    }


def _machine() -> str:
    device = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"got {' '.join(arguments[1:])!r}; this script takes flags only, see --help")
    logging.set_verbosity(logging.WARNING)
    every = list(read_dialogues(_DATA.value))
    if _WRITE_REASONING.value:
        with open(_WRITE_REASONING.value, "w", encoding="utf-8") as file:
            for dialogue in map(with_reasoning, every):
                messages = [message.as_dict() for message in dialogue.messages]
                file.write(json.dumps({"id": dialogue.id, "messages": messages}, ensure_ascii=False) + "\n")
        return
    long = [d for d in every if sum(message.role == "assistant" for message in d.messages) >= _MOST_TURNS]
    renderer = Renderer(load_tokenizer(_MODEL.value))
    with jax.default_matmul_precision("highest"):
        measured = measure_missing(pathlib.Path(_MEASURED.value), typical(long, renderer))
    if all(measured.values()):
        write_results(measured, table_of_all(long, renderer), pathlib.Path(_RESULTS.value))
        print((pathlib.Path(_RESULTS.value) / f"{_NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    app.run(main)
