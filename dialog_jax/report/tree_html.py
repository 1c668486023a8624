"""A tree to HTML that stands alone: no scripts, so that a notebook shows it wherever it is opened.

The largest branch of a node continues below, the others are indented and can be folded. Knows no models and no files.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
import numpy as np

from dialog_jax.trees.prefix_tree import Tree

_TEMPLATE = "chat template"
_SYMBOLS = {code: 0x2400 + code for code in range(32)} | {9: "⇥", 10: "⏎\n"}


class _Token(NamedTuple):
    text: str
    hint: str
    """Shown when the pointer is on the token."""
    strength: float
    """Its weight in the loss, as a share of the largest."""


class _Part(NamedTuple):
    """Tokens of one message, or of the chat template between two."""

    role: str
    label: str
    tokens: list[_Token]


class _Branch(NamedTuple):
    """A branch that is not the largest."""

    summary: str
    parts: list["_Part | _Branch"]


def draw(
    tree: Tree,
    texts: Sequence[str],
    messages: Sequence[int],
    roles: Sequence[str],
    *,
    name: str,
    remarks: Sequence[str] = (),
) -> str:
    """Returns the HTML of a tree.

    Args:
      texts: what each node adds to the text before it.
      messages: the index of the message of each node; -1 for what the chat template adds.
      roles: of each message.
      remarks: lines to print above the tree.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parent.tolist()):
        children.setdefault(parent, []).append(node)
    sizes = (tree.subtree_end - np.arange(len(tree.tokens))).tolist()
    largest_weight = float(tree.weight.max()) or 1.0

    def make_token(node: int) -> _Token:
        weight = float(tree.weight[node])
        trained = f"weight {weight:.4g}" if weight else "not trained"
        if weight and tree.turn[node] >= 0:
            trained += f", turn {tree.turn[node]}"
        hint = f"token {tree.tokens[node]}, position {tree.position[node]}, {trained}"
        return _Token(texts[node].translate(_SYMBOLS) or "·", hint, round(weight / largest_weight, 3))

    def make_part(message: int, nodes: list[int]) -> _Part:
        role = roles[message] if message >= 0 else _TEMPLATE
        turns = sorted({int(tree.turn[node]) for node in nodes if tree.weight[node] > 0 and tree.turn[node] >= 0})
        label = "" if message < 0 else f"{role}, {_name_turns(turns)}" if turns else role
        return _Part(role, label, [make_token(node) for node in nodes])

    def make_parts(start: list[int]) -> list[_Part | _Branch]:
        """Returns what follows a node with these children."""
        parts: list[_Part | _Branch] = []
        while start:
            largest = max(start, key=lambda child: sizes[child])
            parts += [
                _Branch(_describe_branch(tree, child), make_parts([child])) for child in start if child != largest
            ]
            run = [largest]
            while len(children.get(run[-1], ())) == 1:
                run += children[run[-1]]
            parts += [
                make_part(message, list(nodes)) for message, nodes in itertools.groupby(run, messages.__getitem__)
            ]
            start = children.get(run[-1], [])
        return parts

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dialog_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("tree.html.jinja").render(
        name=name,
        figures=f"{len(tree.tokens):,} tokens, {np.count_nonzero(tree.weight):,} of them trained",
        remarks=remarks,
        parts=make_parts(children[-1]),
    )


def _describe_branch(tree: Tree, node: int) -> str:
    """Returns "a branch of 12 tokens, trains turns 1, 2"."""
    nodes = slice(node, int(tree.subtree_end[node]))
    turns = np.unique(tree.turn[nodes][(tree.weight[nodes] > 0) & (tree.turn[nodes] >= 0)]).tolist()
    size = nodes.stop - nodes.start
    trains = f"trains {_name_turns(turns)}" if turns else "trains no response"
    return f"a branch of {size:,} token{'s' if size > 1 else ''}, {trains}"


def _name_turns(turns: Sequence[int]) -> str:
    return f"turn{'s' if len(turns) > 1 else ''} {', '.join(map(str, turns))}"
