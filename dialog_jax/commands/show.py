"""Prints one dialogue as training sees it: the text of its tree, which tokens are trained on, and where it branches.

    dialog_jax show --config.model=MODEL --config.data.train=my.jsonl --index=7

    ⟦ ⟧     trained on; ⟦0.5: ⟧ with that weight, if it is not 1
    ⏎ ⇥     a line break and a tab of the text; a line without ⏎ continues on the next
    turn 2  response number 2 of its path starts here, counted from 0
    <soft prompt: 8 tokens>  what soft_prompt.tokens puts in front of every dialogue
    ├ │     a branch; the largest branch continues below without indentation

In a terminal, colors show the role of a token, dim text has weight 0, and special tokens are underlined. In a pipe
there are no escape codes and lines are not wrapped. --tokens prints one line per token instead, for work on masks; a
token is visible to the tokens from itself to before its `end`.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import rich.console
import rich.text
from absl import flags

from dialog_jax.audit import inspection, token_messages
from dialog_jax.commands import config_flag, config_inputs
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.training import config_renderer, data_sources
from dialog_jax.training.config import TrainConfig
from dialog_jax.trees import weighting
from dialog_jax.trees.prefix_tree import Tree
from dialog_jax.trees.weighting import SupervisedSequence

_CONFIG = config_flag.define()
_DATA = config_inputs.define_data()
_ADAPTER = config_inputs.define_adapter()
_INDEX = flags.DEFINE_integer("index", 0, "Index of the dialogue, from 0.", lower_bound=0)
_TOKENS = flags.DEFINE_bool("tokens", False, "Print one line per token.")

_TEMPLATE = "template"
_COLORS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", _TEMPLATE: "default"}
_GUTTER = 9  # columns
_CONTEXT = 8  # tokens decoded together with those that follow them


def lines(tree: Tree, roles: Sequence[str], renderer: Renderer) -> Iterator[tuple[str, rich.text.Text]]:
    """Yields (prefix, text) of each line: the largest branch of a node continues below, the others are indented."""
    children: dict[int, list[int]] = collections.defaultdict(list)
    for node, parent in enumerate(tree.parent.tolist()):
        children[parent].append(node)
    sizes = (tree.subtree_end - np.arange(len(tree.tokens))).tolist()
    stack = [(root, "", "") for root in reversed(children[-1])]  # (first token, indentation of the first line, others)
    while stack:
        node, first, indent = stack.pop()
        run = [node]
        while len(children[run[-1]]) == 1:
            run += children[run[-1]]
        for number, (label, text) in enumerate(_run_lines(tree, roles, renderer, run)):
            yield f"{label:<{_GUTTER}}{indent if number else first}", text
        branches = children[run[-1]]
        if branches:
            largest = max(branches, key=lambda child: sizes[child])
            stack.append((largest, indent, indent))
            stack += [(child, indent + "├ ", indent + "│ ") for child in reversed(branches) if child != largest]


def _run_lines(
    tree: Tree, roles: Sequence[str], renderer: Renderer, run: Sequence[int]
) -> list[tuple[str, rich.text.Text]]:
    """Returns (label, text) of each line of a run of tokens without a branch."""
    run_lines = [("", rich.text.Text())]
    special, weight = inspection.list_special_tokens(renderer.tokenizer), 0.0
    count = renderer.virtual_tokens.count
    if int(tree.parent[run[0]]) < 0 and count:
        style = f"{_COLORS[_TEMPLATE]} dim underline"
        run_lines[0][1].append(f"<soft prompt: {count:,} token{'s' if count > 1 else ''}>", style=style)
        run = run[count:]

    def close() -> None:
        if weight:  # after a trained line break, on the line that it ends
            run_lines[-1 if run_lines[-1][1] or len(run_lines) == 1 else -2][1].append("⟧", style="bold")

    def kind(node: int) -> tuple[str, float, int, bool]:
        return roles[node], float(tree.weight[node]), int(tree.turn[node]), int(tree.tokens[node]) in special

    for (role, new_weight, turn, is_special), group in itertools.groupby(run, kind):
        nodes = list(group)
        if new_weight != weight:
            close()
            weight = new_weight
            if weight:
                run_lines[-1][1].append("⟦" if weight == 1 else f"⟦{weight:.3g}: ", style="bold")
        parent = int(tree.parent[nodes[0]])
        if turn >= 0 and (parent < 0 or tree.turn[parent] != turn):
            run_lines[-1] = (f"turn {turn}", run_lines[-1][1])
        style = f"{_COLORS[role]} {'bold' if weight else 'dim'}{' underline' if is_special else ''}"
        first, *others = _decode_run(tree, nodes, renderer).split("\n")
        run_lines[-1][1].append(first, style=style)
        for part in others:
            run_lines[-1][1].append("⏎", style="dim")
            run_lines.append(("", rich.text.Text().append(part, style=style)))
    close()
    return [(label, text) for label, text in run_lines if text]


def _decode_run(tree: Tree, nodes: Sequence[int], renderer: Renderer) -> str:
    """Returns the text of a run of tokens, decoded after the tokens before it; control characters become symbols."""
    before: list[int] = []
    ancestor = int(tree.parent[nodes[0]])
    while ancestor >= renderer.virtual_tokens.count and len(before) < _CONTEXT:
        before.insert(0, int(tree.tokens[ancestor]))
        ancestor = int(tree.parent[ancestor])
    backend = renderer.tokenizer.backend_tokenizer
    known = backend.decode(before, skip_special_tokens=False)
    if known.endswith("\ufffd"):  # a branch inside a character
        before, known = [], ""
    text = backend.decode(before + tree.tokens[list(nodes)].tolist(), skip_special_tokens=False)
    symbols = {code: 0x2400 + code for code in range(32) if code != 10} | {9: "⇥"}
    return text[len(known) :].translate(symbols)


def token_lines(tree: Tree, roles: Sequence[str], renderer: Renderer) -> Iterator[tuple[str, str]]:
    """Yields (line, role) of a heading and of each token."""
    tokenizer = renderer.tokenizer
    row = "{:>6} {:>8} {:>6} {:>6} {:>9} {:>4}  {:<9} {:>7}  {}"
    yield row.format("index", "position", "parent", "end", "weight", "turn", "role", "id", "text"), _TEMPLATE
    for node, token in enumerate(tree.tokens.tolist()):
        text = repr(tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False))
        if renderer.virtual_tokens.contain(token):
            text = renderer.virtual_tokens.describe(token)
        elif "\ufffd" in text:  # an incomplete character: print the vocabulary's spelling
            text = str(tokenizer.convert_ids_to_tokens(token))
        figures = (int(getattr(tree, field)[node]) for field in ("position", "parent", "subtree_end"))
        turn = "" if tree.turn[node] < 0 else int(tree.turn[node])
        yield row.format(node, *figures, f"{tree.weight[node]:.4g}", turn, roles[node], token, text), roles[node]


def totals(tree: Tree, sequences: Sequence[SupervisedSequence]) -> str:
    """Returns one line with the numbers of tokens, targets and responses."""
    responses = weighting.select_responses(sequences)
    targets = int((tree.weight > 0).sum())
    line = (
        f"tokens: {len(tree.tokens):,}; targets: {targets:,} ({targets / len(tree.tokens):.1%}); sum of their weights: "
        f"{tree.weight.sum(dtype=np.float64):.6g}; responses: {len(responses):,}"
    )
    if responses:
        tokens = sum(len(one.sequence.tokens) for one in responses.values())
        line += f", which as separate sequences have {tokens:,} tokens"
    return line


def _print(console: rich.console.Console, before: str, text: rich.text.Text) -> None:
    """Prints a line; wraps it in a terminal only."""
    wrapped = text.wrap(console, max(20, console.width - len(before))) if console.is_terminal else [text]
    for part in wrapped:
        console.print(rich.text.Text(before) + part, soft_wrap=True)
        before = " " * _GUTTER + before[_GUTTER:].replace("├", "│")


def show(dialogue: Dialogue, config: TrainConfig, console: rich.console.Console) -> None:
    """Prints the dialogue, as text or as a table of its tokens."""
    _, renderer = config_renderer.open_renderer(config)
    objective = config.objective
    (excerpts,) = inspection.render_dialogues([dialogue], renderer, objective)
    if isinstance(excerpts, UserError):
        raise excerpts
    (sequences,) = weighting.select_supervised(dialogue, [excerpts], objective)
    (tree,) = weighting.build_trees([sequences], objective)
    if tree is None:
        raise UserError(f"{dialogue.name} has nothing to train on under the objective {objective.name}.")
    messages, errors = token_messages.find_messages(tree, sequences, renderer)
    roles = [dialogue.messages[message].role if message >= 0 else _TEMPLATE for message in messages]
    for error in errors:
        console.print(
            f"the role of a message in the history cannot be determined: {error}", markup=False, soft_wrap=True
        )
    if _TOKENS.value:
        for line, role in token_lines(tree, roles, renderer):
            console.print(line, style=_COLORS[role], markup=False, soft_wrap=True)
        return
    console.print(dialogue.name, style="bold", markup=False)
    legend = [rich.text.Text("⟦trained on⟧"), rich.text.Text("⏎ line break"), rich.text.Text("├ │ branch")]
    if console.color_system:
        legend += [rich.text.Text(role, style=color) for role, color in _COLORS.items()]
    console.print(rich.text.Text("   ").join(legend), end="\n\n")
    for before, text in lines(tree, roles, renderer):
        _print(console, before, text)
    console.print(f"\n{totals(tree, sequences)}", soft_wrap=True)


def main() -> None:
    config = config_inputs.read_config(_CONFIG, _ADAPTER)
    source = data_sources.find_source(config, _DATA.value)
    show(source.find_dialogue(_INDEX.value), config, rich.console.Console(highlight=False))
