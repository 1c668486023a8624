"""Dialogues to what a page shows of them: their whole trees, with the text and the message of each token.

In: dialogues, as training reads them. Out: trees of complete dialogues under the objective, whatever the row length
is. Knows no models and no HTML.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from dialog_jax.audit import inspection, token_messages
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.trees import weighting
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree

_CONTEXT = 8  # tokens that are decoded before a token, so that spaces and characters of several tokens come out right


class DialogueView(NamedTuple):
    """A dialogue as a page shows it."""

    dialogue: Dialogue
    group: str
    """The data that it is from, such as `training`."""
    tree: Tree
    texts: list[str]
    """What each node adds to the text before it; empty for a token that ends within a character."""
    messages: list[int]
    """The index of the message that each node belongs to; -1 for what the chat template adds."""


def make_views(
    dialogues: Iterable[Dialogue | UserError],
    group: str,
    renderer: Renderer,
    objective: ObjectiveConfig,
    limit: int,
) -> tuple[list[DialogueView], list[str]]:
    """Returns (the views of the first `limit` dialogues that are trained on; why others before them are not shown).

    Args:
      renderer: without virtual tokens.
    """
    views: list[DialogueView] = []
    notes: list[str] = []
    remaining = iter(dialogues)
    while len(views) < limit and (batch := list(itertools.islice(remaining, limit - len(views)))):
        valid = [one for one in batch if isinstance(one, Dialogue)]
        rendered = iter(inspection.render_dialogues(valid, renderer, objective))
        for one in batch:
            excerpts = one if isinstance(one, UserError) else next(rendered)
            if isinstance(excerpts, UserError):
                notes.append(f"not shown: {excerpts}")
                continue
            assert isinstance(one, Dialogue)
            (sequences,) = weighting.select_supervised(one, [excerpts], objective)
            (tree,) = weighting.build_trees([sequences], objective)
            if tree is None:
                notes.append(f"not shown: {one.name} has nothing to train on under the objective {objective.name}")
                continue
            messages, errors = token_messages.find_messages(tree, sequences, renderer)
            notes += [f"shown as a part of the chat template in a history: {error}" for error in errors]
            views.append(DialogueView(one, group, tree, decode_nodes(tree, renderer), messages))
    return views, notes


def decode_nodes(tree: Tree, renderer: Renderer) -> list[str]:
    """Returns what each node adds to the text of its ancestors.

    The tokens `He`, `llo` and the two tokens of `é`   ->   ["He", "llo", "", "é"]
    """
    contexts: list[list[int]] = []
    tokens, parents = tree.tokens.tolist(), tree.parent.tolist()
    for parent in parents:
        contexts.append([] if parent < 0 else [*contexts[parent], tokens[parent]][-_CONTEXT:])
    backend = renderer.tokenizer.backend_tokenizer
    before = backend.decode_batch(contexts, skip_special_tokens=False)
    strings = [[*context, token] for context, token in zip(contexts, tokens, strict=True)]
    after = backend.decode_batch(strings, skip_special_tokens=False)
    return [
        text[len(earlier) :] if text.startswith(earlier) else _cut_common(earlier, text)
        for earlier, text in zip(before, (text.rstrip("\ufffd") for text in after), strict=True)
    ]


def _cut_common(earlier: str, text: str) -> str:
    """Returns the text from the first character that the earlier one does not have: "é" of "xé" after "x\ufffd"."""
    pairs = enumerate(zip(earlier, text, strict=False))
    return text[next((place for place, (a, b) in pairs if a != b), len(earlier)) :]
