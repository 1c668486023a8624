"""Dialogues to what a page or a notebook shows of them: their whole trees, with text and message of each token.

In: dialogues, as training reads them. Out: trees of complete dialogues under the objective, whatever the row length
is. Knows no models.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dialog_jax.audit import inspection, token_messages
from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.errors import UserError
from dialog_jax.rendering import virtual_tokens
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.report import tree_html
from dialog_jax.training import config_renderer, data_sources
from dialog_jax.training.config import TrainConfig
from dialog_jax.trees import weighting
from dialog_jax.trees.fitting import Excerpt
from dialog_jax.trees.objectives import ObjectiveConfig
from dialog_jax.trees.prefix_tree import Tree

_CONTEXT = 8  # tokens that are decoded before a token, so that spaces and characters of several tokens come out right


class DialogueView(NamedTuple):
    """A dialogue as a page shows it. As the value of a notebook cell, it shows its tree."""

    dialogue: Dialogue
    group: str
    """The data that it is from, such as `training`."""
    tree: Tree
    texts: list[str]
    """What each node adds to the text before it; empty for a token that ends within a character."""
    messages: list[int]
    """The index of the message that each node belongs to; -1 for what the chat template adds."""
    remarks: list[str]
    """About what could not be determined."""

    def _repr_html_(self) -> str:
        roles = [message.role for message in self.dialogue.messages]
        return tree_html.draw(
            self.tree, self.texts, self.messages, roles, name=self.dialogue.name, remarks=self.remarks
        )


def view_dialogue(config: TrainConfig, index: int = 0, *, data: str = "train") -> DialogueView:
    """Returns a dialogue of a config's data, with all that is trained in it, to be looked at in a notebook.

    It is the whole dialogue, before it is fitted into rows and without a soft prompt; a remark says what training does
    otherwise.

    Args:
      config: names the data, and a model or tokenizer; no weights are read.
      index: of the record, from 0.
      data: `train` (all of data.train, also what is held out), `validation`, or the name of a set in data.mix.

    Raises:
      UserError: there is no such dialogue, or it cannot be rendered or has nothing to train on.
    """
    _, renderer = config_renderer.open_renderer(config)
    renderer = renderer.with_virtual_tokens(virtual_tokens.NONE)
    dialogue = data_sources.find_source(config, data).find_dialogue(index)
    (excerpts,) = inspection.render_dialogues([dialogue], renderer, config.objective)
    if isinstance(excerpts, UserError):
        raise excerpts
    view = _make_view(dialogue, excerpts, data, renderer, config.objective)
    size, virtual = len(view.tree.tokens), config_renderer.count_virtual_tokens(config)
    if virtual:
        view.remarks.append(f"In training, the soft prompt's {virtual:,} virtual tokens precede it.")
    if size + virtual > config.data.max_length:
        view.remarks.append(
            f"It is larger than a row of data.max_length = {config.data.max_length:,} tokens: training divides it, and "
            f"shortens histories that are longer than a row (data.truncate = {config.data.truncate!r})."
        )
    return view


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
            try:
                view = _make_view(one, excerpts, group, renderer, objective)
            except UserError as error:
                notes.append(f"not shown: {error}")
                continue
            views.append(view)
            notes += view.remarks
    return views, notes


def _make_view(
    dialogue: Dialogue, excerpts: Sequence[Excerpt], group: str, renderer: Renderer, objective: ObjectiveConfig
) -> DialogueView:
    """Returns the view of a rendered dialogue; raises UserError if nothing in it is trained on."""
    (sequences,) = weighting.select_supervised(dialogue, [excerpts], objective)
    (tree,) = weighting.build_trees([sequences], objective)
    if tree is None:
        raise UserError(f"{dialogue.name} has nothing to train on under the objective {objective.name}")
    messages, errors = token_messages.find_messages(tree, sequences, renderer)
    remarks = [f"shown as a part of the chat template in a history: {error}" for error in errors]
    return DialogueView(dialogue, group, tree, decode_nodes(tree, renderer), messages, remarks)


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
