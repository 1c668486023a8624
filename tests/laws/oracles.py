"""K passes, which one pass must equal: dictionaries of prefixes and causal sequences; no trie, mask or packing.

Each response is rendered and tokenized by itself with the tokenizer's own chat interface, after the messages that a
walk over parents finds. Its loss is that of a plain causal sequence with a log-softmax over all logits.
"""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dialog_jax.model import decoder
from tests.rendering import chat_templates
from tests.rendering.chat_templates import FAMILIES


class Response(NamedTuple):
    """A response by itself."""

    message: int
    turn: int
    """How many assistant messages come before it."""
    prompt: list[int]
    tokens: list[int]
    parts: list[float]
    """The weight of the part that each token belongs to; 1 where there is none."""


def path_to(dialogue, index):
    """The messages from the first to message `index`, by walking up."""
    parents = dialogue.parents or range(-1, len(dialogue.messages) - 1)
    path = [index]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def paths_of(dialogue):
    """Every path to a message that none follows, the older branch first, the deeper first, by walking down."""
    parents = list(dialogue.parents) or list(range(-1, len(dialogue.messages) - 1))
    found = []

    def walk(path):
        children = [i for i, parent in enumerate(parents) if parent == path[-1]]
        if not children:
            found.append(path)
        for child in children:
            walk([*path, child])

    walk([0])
    return found


def encode(family, text, *, continues=False):
    """Token ids of a text by itself, or of one that continues another."""
    tokenizer, anchor = chat_templates.train_tokenizer(family), FAMILIES[family].special[0]
    if continues:
        return tokenizer.encode(anchor + text, add_special_tokens=False)[1:]
    return tokenizer.encode(text, add_special_tokens=False)


def response(dialogue, index, family):
    """The response of message `index` behind its own history; None where the template breaks the promise it needs."""
    tokenizer, end = chat_templates.train_tokenizer(family), FAMILIES[family].end_of_turn
    path = path_to(dialogue, index)
    messages = [dialogue.messages[i].as_dict() for i in path]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    text = text[: text.rindex(end) + len(end)]
    assert text.startswith(prompt), (prompt, text)
    prompt_ids, ids = encode(family, prompt), encode(family, text)
    own = ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else None
    own = encode(family, text[len(prompt) :], continues=True) if own is None else own
    turn = sum(message["role"] == "assistant" for message in messages[:-1])
    return Response(
        index, turn, prompt_ids, own, _part_weights(dialogue.messages[index], text[len(prompt) :], own, family)
    )


def responses(dialogue, family):
    """The responses of weight above 0, in the order of their messages."""
    return [
        response(dialogue, index, family)
        for index, message in enumerate(dialogue.messages)
        if message.role == "assistant" and message.weight > 0
    ]


def _part_weights(message, text, tokens, family):
    """Of each token of a response the weight of the part that its last byte belongs to."""
    if not message.parts:
        return [1.0] * len(tokens)
    before, _, after = text.partition(message.content)
    weights = [1.0] * len(before.encode())
    for part in message.parts:
        weights += [part.weight] * len(part.text.encode())
    weights += [1.0] * len(after.encode())
    # A token of a byte-level vocabulary is written with one character a byte; added ones are text.
    tokenizer = chat_templates.train_tokenizer(family)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    names = [added[i].content.encode() if i in added else tokenizer.convert_ids_to_tokens(i) for i in tokens]
    ends = np.cumsum([len(name) for name in names])
    assert ends[-1] == len(weights), (ends[-1], len(weights))
    return [weights[end - 1] for end in ends]


def trained_turns(dialogue, path):
    """{message: turn} of the responses of weight above 0 of a path."""
    responses = [i for i in path if dialogue.messages[i].role == "assistant"]
    return {i: turn for turn, i in enumerate(responses) if dialogue.messages[i].weight > 0}


def schedule(objective, turn, last):
    """What the README says multiplies turn `turn`, where `last` is the last that is trained on."""
    if objective.get("name") == "last" and turn != last:
        return 0.0
    if given := objective.get("turn_weights"):
        return given[turn] if turn < len(given) else given[-1]
    return objective.get("turn_discount", 1.0) ** (last - turn)


def response_weights(dialogue, objective, family, *, kept=None):
    """[(Response, the weight of each of its tokens)] of all that is trained on, one entry each time that it is.

    Args:
      kept: the messages that are not cut off; None for all.
    """
    factors = collections.defaultdict(list)
    for path in paths_of(dialogue):
        turns = {m: turn for m, turn in trained_turns(dialogue, path).items() if kept is None or m in kept}
        for message, turn in turns.items():
            factors[message].append(schedule(objective, turn, max(turns.values())))
    if objective.get("merge_weights", "max") == "max":
        factors = {message: [max(some)] for message, some in factors.items()}
    found = []
    for message, some in factors.items():
        one = response(dialogue, message, family)
        for factor in some:
            goal = dialogue.messages[message].weight * factor
            weights = np.array(one.parts) * goal
            if objective.get("normalize") == "turn" and weights.sum():
                weights *= goal / weights.sum()
            found.append((one, weights))
    if objective.get("normalize") == "dialogue" and found:
        total = sum(weights.sum() for _, weights in found)
        found = [(one, weights / total if total else weights) for one, weights in found]
    return found


def targets(dialogue, objective, family):
    """{(context, token): (weight, turn)} of a dialogue whose responses alone are trained on."""
    found = {}
    for one, weights in response_weights(dialogue, objective, family):
        for n, weight in enumerate(weights):
            if weight > 0:
                key = (tuple(one.prompt + one.tokens[:n]), one.tokens[n])
                before, turn = found.get(key, (0.0, -1))
                found[key] = (before + weight, max(turn, one.turn))
    return found


def nodes(dialogue, family, *, kept=None):
    """All prefixes of the sequences of the responses of weight above 0, or of the kept ones among them."""
    ones = [one for one in responses(dialogue, family) if kept is None or one.message in kept]
    sequences = [one.prompt + one.tokens for one in ones]
    return {tuple(ids[:stop]) for ids in sequences for stop in range(1, len(ids) + 1)}


def context(tree, node):
    """A node's ancestors and itself, by walking up."""
    path = [node]
    while tree.parent[path[-1]] >= 0:
        path.append(int(tree.parent[path[-1]]))
    return path[::-1]


def tree_targets(tree):
    """[(context, token, weight, turn)] of a tree, by its parents."""
    found = []
    for node in np.flatnonzero(tree.weight > 0).tolist():
        *before, own = tree.tokens[context(tree, node)].tolist()
        found.append((tuple(before), own, float(tree.weight[node]), int(tree.turn[node])))
    return found


def row_targets(batch):
    """[(context, token, weight, turn)] of the rows of a batch, by what the mask lets the source see."""
    tokens, end, source, target, weight, turn = (
        np.asarray(array).reshape(-1, array.shape[-1])
        for array in (batch.tokens, batch.subtree_end, batch.source, batch.target, batch.weight, batch.turn)
    )
    found = []
    for b in range(len(tokens)):
        for s in np.flatnonzero(weight[b] > 0).tolist():
            query = int(source[b, s])
            seen = tuple(int(tokens[b, key]) for key in range(query + 1) if query < end[b, key])
            found.append((seen, int(target[b, s]), float(weight[b, s]), int(turn[b, s])))
    return found


def added_up(found):
    """{(context, token): weight} of lists of targets."""
    sums = collections.Counter()
    for context, token, weight, _ in found:
        sums[context, token] += weight
    return sums


_LENGTH = 256  # tokens of the longest sequence; all have one shape, so that one program is compiled
_SEQUENCES = 8  # that run at once


def k_passes(model, parameters, weighted):
    """(sum of weighted loss, its gradient) of [(Response, the weight of each of its tokens)], each by itself."""
    results = []
    for start in range(0, len(weighted), _SEQUENCES):
        tokens = np.zeros((_SEQUENCES, _LENGTH), np.int32)
        weight = np.zeros((_SEQUENCES, _LENGTH - 1), np.float32)
        for row, (one, weights) in enumerate(weighted[start : start + _SEQUENCES]):
            stop = len(one.prompt) + len(one.tokens)
            tokens[row, :stop] = one.prompt + one.tokens
            weight[row, len(one.prompt) - 1 : stop - 1] = weights
        results.append(_causal_loss(model, parameters, tokens, weight))
    return add_results(results)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def _causal_loss(model, parameters, tokens, weight):
    """Sum of weighted loss of sequences [N, T], each by itself; weight [N, T - 1] is of the tokens but the first."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = decoder.hidden_states(model, parameters, tokens, position, jnp.full(tokens.shape, tokens.shape[1]))
    logits = jnp.einsum("ntd,vd->ntv", hidden[:, :-1], decoder.unembedding(model, parameters))
    log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0]
    return -jnp.sum(weight * log_probability)


def add_results(results):
    """The sum of (value, gradient) pairs."""
    values, gradients = zip(*results, strict=True)
    return sum(values), jax.tree.map(lambda *leaves: sum(leaves), *gradients)
