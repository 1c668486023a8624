"""Does what comes later in a dialogue change the loss of an earlier response, if all are computed in one pass?

Question:  one pass reads the whole dialogue at once, so one may think that later messages influence the losses of
           earlier responses. (a) How much does the loss of each response change when a user message is replaced?
           (b) How strongly does it depend on the input at each position, before and after it?
Command:   python experiments/causality.py
Hardware:  two cores of an AMD EPYC with AVX-512; 1.9 GB of memory.
Time:      1.0 min on a shared machine, 0.9 min of CPU time.
Result:    no. (a) In a held-out ChitChat dialogue of 6 responses, each user message was replaced in turn. All 603
           losses of response tokens before the replaced messages stayed equal in all bits; the next response changed by
           +1.4 to +18.7 nats. (b) All 1,537 gradients with respect to tokens in the context of a response are nonzero;
           all 1,049 with respect to later tokens are exactly 0. With reasoning stripped from history, so are all 215
           with respect to tokens that are later or on another branch, including reasoning that precedes the response in
           the row. The gradients of the parameters are summed over responses, as in K separate passes.
           experiments/results/causality.md, causality.png
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import report
from jaxtyping import Array, Bool, Float
from matplotlib import colormaps, colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from report import Options

from dialog_jax.batching import batches
from dialog_jax.batching.batches import Batch
from dialog_jax.dialogues.dialogue import Dialogue, Message
from dialog_jax.dialogues.parsing import read_dialogues
from dialog_jax.errors import UserError
from dialog_jax.inference import loading
from dialog_jax.inference.loading import Model
from dialog_jax.model import decoder
from dialog_jax.model.decoder_config import DecoderConfig
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.rendering.tokenizers import load_tokenizer
from dialog_jax.training import loss, score_steps
from dialog_jax.trees import dataset, prefix_tree
from dialog_jax.trees.dataset import Trees
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.prefix_tree import Tree

_RESPONSES = 6  # the experiment uses the first held-out dialogue with this many
_OTHER_MESSAGE = "Let us speak of something else. Which mountain is the highest one in Europe?"

# The weakest influence must be distinguishable from none, which is white.
_SHADES = colors.ListedColormap(colormaps["Blues"](np.linspace(0.15, 1, 256)))

# Renders history without reasoning, like the templates of reasoning models.
_STRIPPING_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message.content if loop.last else message.content.split('</think>')[-1] | trim -%}
{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_REASONED = Dialogue(
    id="reasoned",
    messages=(
        Message(role="user", content="What is 12 times 7?"),
        Message(role="assistant", content="<think>Ten sevens are 70, two more are 14.</think>It is 84."),
        Message(role="user", content="And half of that?"),
        Message(role="assistant", content="<think>Half of 80 is 40, half of 4 is 2.</think>That is 42."),
        Message(role="user", content="Is it even?"),
        Message(role="assistant", content="<think>It ends in 2.</think>Yes."),
    ),
)


class Replaced(NamedTuple):
    """Changes of the losses of K responses when one of M user messages is replaced."""

    changes: Float[np.ndarray, "M K"]
    """Nats, summed over the response."""
    earlier: int
    """Number of pairs of a replaced message and a response token before it."""
    largest_earlier: float
    """Largest change of the loss of such a token, in nats."""


class Influence(NamedTuple):
    """Dependence of K responses on the N tokens of a tree."""

    norm: Float[np.ndarray, "K N"]
    """Norm of the gradient of the response's loss, in nats, with respect to the token's input embedding."""
    context: Bool[np.ndarray, "K N"]
    """Whether the token is in the context of the response: an ancestor of one of its tokens."""
    response: Bool[np.ndarray, "K N"]
    """Whether the token belongs to the response."""

    @property
    def outside(self) -> float:
        """Largest norm over the tokens outside the context."""
        return float(self.norm[~self.context].max(initial=0.0))


def response_losses(model: Model, dialogues: Sequence[Dialogue]) -> list[list[Float[np.ndarray, " tokens"]]]:
    """Returns the loss of each token, per dialogue and response; all rows have the same length.

    Raises:
      UserError: a dialogue is longer than a row.
    """
    trees = dataset.prepare(dialogues, model.renderer, TreeConfig(max_length=harness.MAX_LENGTH, truncate="error"))
    score_step = score_steps.make_score_step(model.config, compute_dtype=jnp.float32)
    losses = []
    for number in range(len(trees)):
        tree = trees.tree(number)
        row = batches.fill_rows(trees, [[number]], max_length=harness.MAX_LENGTH)
        _, nodes = prefix_tree.find_targets(tree)
        nll = np.asarray(score_step(model.parameters, row).nll[0, : len(nodes)])
        losses.append([nll[tree.turn[nodes] == turn] for turn in range(int(tree.turn.max()) + 1)])
    return losses


def replace_messages(model: Model, dialogue: Dialogue, content: str) -> Replaced:
    """Returns the changes of the losses of all responses when the content of each user message is replaced in turn."""
    messages = dialogue.messages
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    responses = [index for index, message in enumerate(messages) if message.role == "assistant"]
    others = [
        dataclasses.replace(
            dialogue,
            messages=(*messages[:index], dataclasses.replace(messages[index], content=content), *messages[index + 1 :]),
        )
        for index in users
    ]
    original, *changed = response_losses(model, [dialogue, *others])
    changes = np.zeros((len(users), len(responses)))
    earlier, largest = 0, 0.0
    for row, (message, losses) in enumerate(zip(users, changed, strict=True)):
        for column, (response, was, now) in enumerate(zip(responses, original, losses, strict=True)):
            changes[row, column] = now.sum(dtype=np.float64) - was.sum(dtype=np.float64)
            if response < message:
                earlier += len(was)
                largest = max(largest, float(np.abs(now - was).max()))
    return Replaced(changes, earlier, largest)


def compute_influence(config: DecoderConfig, parameters: dict, trees: Trees) -> Influence:
    """Returns the dependence of each response of the first tree on each of its tokens."""
    tree = trees.tree(0)
    size = len(tree.tokens)
    norms, contexts, responses = [], [], []
    for turn in range(int(tree.turn.max()) + 1):
        turn_trees = dataclasses.replace(trees, weight=np.where(trees.turn == turn, trees.weight, 0).astype(np.float32))
        row = batches.fill_rows(turn_trees, [[0]], max_length=harness.MAX_LENGTH)
        gradient = _embedding_gradient(config, parameters, jax.tree.map(jnp.asarray, row))
        norms.append(np.linalg.norm(np.asarray(gradient, np.float64), axis=-1)[:size])
        contexts.append(_ancestors(tree, np.flatnonzero(tree.turn == turn)))
        responses.append((tree.turn == turn) & (tree.weight > 0))
    return Influence(np.stack(norms), np.stack(contexts), np.stack(responses))


@functools.partial(jax.jit, static_argnums=0)
def _embedding_gradient(config: DecoderConfig, parameters: dict, row: Batch) -> Float[Array, "T D"]:
    """Returns the gradient of a row's loss with respect to the input of the first layer at each token."""
    length = row.tokens.shape[1]
    one_token_per_position = dataclasses.replace(config, vocab_size=length)
    unembedding = decoder.unembedding(config, parameters)

    def loss_of(embedded):
        # With one embedding per position, the input of each position is a separate variable.
        with_embedding = parameters | {"embedding": embedded}
        places = jnp.arange(length)[None, :]
        hidden = decoder.hidden_states(one_token_per_position, with_embedding, places, row.position, row.subtree_end)
        return loss.weighted_loss(hidden, unembedding, loss.Targets(row.source, row.target, row.weight))[0]

    return jax.grad(loss_of)(parameters["embedding"][row.tokens[0]])


def _ancestors(tree: Tree, nodes: Iterable[int]) -> Bool[np.ndarray, " N"]:
    """Returns which tokens are proper ancestors of one of `nodes`."""
    ancestors = np.zeros(len(tree.tokens), bool)
    for node in nodes:
        above = int(tree.parent[node])
        while above >= 0 and not ancestors[above]:
            ancestors[above] = True
            above = int(tree.parent[above])
    return ancestors


def _draw(replaced: Replaced, linear: Influence, branching: Influence) -> Figure:
    with report.style():
        figure, axes = plt.subplot_mosaic(
            [["linear", "linear"], ["replaced", "branching"]],
            figsize=(12, 7.6),
            layout="constrained",
            gridspec_kw={"width_ratios": [1, 1.9], "height_ratios": [1, 1.1]},
        )
        positive = np.concatenate([each.norm[each.norm > 0] for each in (linear, branching)])
        scale = colors.LogNorm(np.quantile(positive, 0.02), positive.max())
        _draw_influence(axes["linear"], linear, scale)
        axes["linear"].set_title(f"The loss of a response depends on no later token: {_outside(linear)}")
        _draw_influence(axes["branching"], branching, scale)
        axes["branching"].set_title(f"Nor on another branch (reasoning stripped from history):\n{_outside(branching)}")
        _draw_changes(axes["replaced"], replaced.changes)
    return figure


def _outside(influence: Influence) -> str:
    return f"{int((~influence.context).sum()):,} gradients outside its context, largest {influence.outside:g}"


def _draw_influence(axes: Axes, influence: Influence, scale: colors.LogNorm) -> None:
    norms = np.ma.masked_where(influence.norm == 0, influence.norm)
    image = axes.imshow(norms, aspect="auto", norm=scale, cmap=_SHADES, interpolation="nearest")
    for turn, in_response in enumerate(influence.response):
        places = np.flatnonzero(in_response)
        for part in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            corner = (part[0] - 0.5, turn - 0.5)
            axes.add_patch(Rectangle(corner, len(part), 1, fill=False, color=report.ORANGE, linewidth=1.4))
    turns = len(influence.norm)
    axes.set_yticks(range(turns), [f"response {turn}" for turn in range(turns)])
    axes.set(xlabel="token (orange: those of the response itself; white: exactly 0)", ylabel="loss of")
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    bar.set_label("norm of the gradient with respect\nto the token's embedding (nats)", fontsize=9)


def _draw_changes(axes: Axes, changes: Float[np.ndarray, "M K"]) -> None:
    limit = np.abs(changes).max() or 1.0
    axes.imshow(np.ma.masked_where(changes == 0, changes), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (message, turn), change in np.ndenumerate(changes):
        strong = abs(change) > 0.6 * limit
        axes.text(
            turn,
            message,
            "0" if change == 0 else f"{change:+.2f}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if strong else "black",
        )
    axes.set_xticks(range(changes.shape[1]))
    axes.set_yticks(range(changes.shape[0]))
    axes.set(
        xlabel="response",
        ylabel="user message that is replaced",
        title="Replacing a message changes\nno response before it (loss, nats)",
    )


def _choose_dialogue(source: str) -> Dialogue:
    for dialogue in read_dialogues(source):
        if sum(message.role == "assistant" for message in dialogue.messages) == _RESPONSES:
            return dialogue
    raise UserError(f"{source} has no dialogue of {_RESPONSES} responses. Name another file of dialogues.")


def _changes_table(changes: Float[np.ndarray, "M K"]) -> str:
    rows = [
        [str(number), *(f"{change:+.3f}" if change else "0" for change in line)] for number, line in enumerate(changes)
    ]
    return report.table(["replaced user message", *(f"response {turn}" for turn in range(changes.shape[1]))], rows)


def _influence_table(influences: Mapping[str, Influence]) -> str:
    rows = []
    for name, each in influences.items():
        turns, tokens = each.norm.shape
        inside, outside = int(each.context.sum()), int((~each.context).sum())
        reached = int((each.norm[each.context] > 0).sum())
        rows.append([name, *(f"{count:,}" for count in (tokens, turns, inside, reached, outside)), f"{each.outside:g}"])
    header = ["", "tokens", "responses", "pairs in the context", "nonzero", "other pairs", "largest of these"]
    return report.table(header, rows)


def _one_tree(renderer: Renderer, dialogue: Dialogue) -> Trees:
    return dataset.prepare([dialogue], renderer, TreeConfig(max_length=harness.MAX_LENGTH, truncate="error"))


def main(options: Options) -> None:
    started = time.perf_counter()
    model = loading.load_model(options.model)
    dialogue = _choose_dialogue(options.validation)
    replaced = replace_messages(model, dialogue, _OTHER_MESSAGE)
    linear = compute_influence(model.config, model.parameters, _one_tree(model.renderer, dialogue))
    stripping = Renderer(load_tokenizer(options.model, chat_template=_STRIPPING_TEMPLATE))
    branching = compute_influence(model.config, model.parameters, _one_tree(stripping, _REASONED))
    report.write(
        options,
        _draw(replaced, linear, branching),
        [
            f'Dialogue {dialogue.id}. Each user message in turn was replaced by "{_OTHER_MESSAGE}", and the loss of '
            f"every response was recomputed in one pass over a row of {harness.MAX_LENGTH} tokens. Change in nats:",
            _changes_table(replaced.changes),
            f"Losses of tokens before a replaced message: {replaced.earlier:,} in all; "
            + (
                "each is equal in all bits to the original."
                if replaced.largest_earlier == 0
                else f"the largest difference is {replaced.largest_earlier:.1e} nats."
            ),
            "Influence: the norm of the gradient of a response's loss with respect to the input embedding of a token, "
            "for every pair of a response and a token. The token is in the context of the response if it is an "
            "ancestor of one of its tokens; the other tokens are later or on another branch.",
            _influence_table({"the dialogue": linear, "reasoning stripped from history": branching}),
        ],
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    report.run_script(main, "causality")
