"""Random dialogues, objectives and trees: all that a user may write, and now and then what nobody would."""

import numpy as np
from hypothesis import strategies as st

from dialog_jax.dialogues.dialogue import Dialogue
from dialog_jax.dialogues.parsing import parse_records
from dialog_jax.trees import dataset, prefix_tree
from tests.rendering.chat_templates import FAMILIES

# Text and bytes are one there, token by token, which the oracle of parts relies on.
BYTE_LEVEL = ("chatml", "llama3", "qwen3", "phi3", "plain")
# Any role may follow any other; the rest alternate, as their templates demand.
_ANY_ORDER = ("chatml", "llama3", "phi3", "plain")

# fmt: off
_PIECES = (
    "Hello", "how are you?", "The answer is 42.", "don't", "naïve café", "Привет", "你好", "👩‍👩‍👧", "\n", "\n\n", "\t",
    " ", "  two  spaces ", "x", "a\nb", "{{ x }}", "<b>", "User:", "\x00", "\u2028", "\r\n", "e\u0301",
    "\ue000turn\ue000",
    " assistant assistant assistant", "user\n", "1234567890", "\ufeff",
)
_WORDS = (
    "yes", "no, thank you", "Paris", "ten and nine", "why so", "It is 42.", "naïve", "你好", "a  b", "x\n\ny", "12:30",
)
# fmt: on

texts = st.one_of(
    st.lists(st.sampled_from(_PIECES), max_size=4).map("".join),
    st.lists(st.sampled_from(_WORDS), min_size=1, max_size=3).map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
"""Contents; empty and white space among them."""

words = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=3).map(" ".join)
"""Contents that every template renders as they are."""

_weights = st.one_of(
    st.just({}),
    st.sampled_from([0, 0.5, 1, 2, 0.125, 3.7]).map(lambda weight: {"weight": weight}),
    st.just({"train": False}),
    st.just({"train": True, "weight": 0.25}),
)
_no_weights = st.just({})


@st.composite
def _contents(draw, kind, family, role):
    """Text, or for `kind` "parts" now and then a list of weighted texts; reasoning where the template knows it."""
    if kind == "parts" and draw(st.booleans()):
        given = draw(st.lists(st.one_of(words, words, st.just("")), min_size=1, max_size=3))
        return [{"type": "text", "text": text, **draw(_weights)} for text in given]
    text = draw(words if kind != "any" else texts)
    if family == "qwen3" and role == "assistant" and kind == "any" and draw(st.booleans()):
        text = f"<think>\n{draw(words)}\n</think>\n\n{text}"
    return text


@st.composite
def _message(draw, family, role, kind, weights):
    return {"role": role, "content": draw(_contents(kind, family, role)), **draw(weights)}


@st.composite
def _roles(draw, family, turns):
    roles = ["system"] if FAMILIES[family].system_role and draw(st.booleans()) else []
    for turn in range(turns):
        roles += ["user", "assistant"]
        odd = draw(st.integers(0, 7))
        if odd == 0 and family in (*_ANY_ORDER, "qwen3"):
            roles += ["tool", "assistant"]
        elif odd == 1 and family in _ANY_ORDER:
            roles += ["assistant", "user", "user"]
        elif odd == 2 and family in _ANY_ORDER and turn:
            roles += ["system"]
    return roles + ["user"] * draw(st.integers(0, 3) if family in _ANY_ORDER else st.integers(0, 1))


@st.composite
def lists(draw, family, *, max_turns=4, kind="any", weighted=True):
    """A record whose messages are a list.

    Args:
      kind: of contents: "any", "words" that templates render as they are, or "parts", which are such words.
    """
    weights = _weights if weighted else _no_weights
    roles = draw(_roles(family, draw(st.integers(1, max_turns))))
    return {"messages": [draw(_message(family, role, kind, weights)) for role in roles]}


@st.composite
def message_trees(draw, family, *, max_messages=9, kind="any", weighted=True):
    """A record whose messages name their parents."""
    weights = _weights if weighted else _no_weights
    system = FAMILIES[family].system_role and draw(st.booleans())
    roles, parents = (["system", "user"], [-1, 0]) if system else (["user"], [-1])
    for _ in range(draw(st.integers(1, max_messages))):
        parent = draw(st.integers(int(system), len(roles) - 1))
        roles.append("assistant" if roles[parent] == "user" else "user")
        parents.append(parent)
    made = [draw(_message(family, role, kind, weights)) for role in roles]
    for number, (message, parent) in enumerate(zip(made, parents, strict=True)):
        message |= {"id": f"m{number}"} | ({"parent": f"m{parent}"} if parent >= 0 else {})
    return {"messages": made}


@st.composite
def continuations(draw, family, *, kind="any", weighted=True):
    """A record with several responses to one history, some of which go on."""
    weights = _weights if weighted else _no_weights
    history = draw(lists(family, max_turns=2, kind=kind, weighted=weighted))["messages"]
    if history[-1]["role"] != "user":
        history.append(draw(_message(family, "user", kind, weights)))
    responses = []
    for _ in range(draw(st.integers(1, 3))):
        roles = ["assistant", "user", "assistant"][: draw(st.sampled_from([1, 1, 2, 3]))]
        chain = [draw(_message(family, role, kind, weights)) for role in roles]
        plain = len(chain) == 1 and isinstance(chain[0]["content"], str) and draw(st.booleans())
        responses.append(chain[0]["content"] if plain else chain)
    return {"messages": history, "continuations": responses}


def records(family, **options):
    """A record of any kind."""
    return st.one_of(lists(family, **options), message_trees(family, **options), continuations(family, **options))


def parsed(records) -> list[Dialogue]:
    """The dialogues of records."""
    return list(parse_records(records))


objectives = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["conditional", "last", "roles"]),
        "normalize": st.sampled_from(["token", "turn", "dialogue"]),
        "merge_weights": st.sampled_from(["max", "sum"]),
    },
).flatmap(
    lambda fixed: st.one_of(
        st.just(fixed),
        st.sampled_from([0.5, 0.9, 2.0]).map(lambda discount: {**fixed, "turn_discount": discount}),
        st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=3).map(
            lambda given: {**fixed, "turn_weights": tuple(given)}
        ),
    )
)
"""Arguments of `ObjectiveConfig` that train on nothing but responses."""

objectives_of_all = st.one_of(
    st.just({"name": "joint"}),
    st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=3, unique=True).map(
        lambda roles: {"name": "roles", "roles": tuple(roles)}
    ),
).flatmap(
    lambda fixed: st.sampled_from(
        [{}, {"normalize": "dialogue"}, {"merge_weights": "sum"}, {"turn_weights": (0.0, 1.0)}]
    ).map(lambda more: {**fixed, **more})
)
"""Arguments of `ObjectiveConfig` that train on other messages too."""


@st.composite
def strings(draw, *, min_length=2, max_length=8, tokens=3):
    """A token string with spans (start, stop, weight, turn): of so few different tokens that many begin alike."""
    string = draw(st.lists(st.integers(0, tokens - 1), min_size=min_length, max_size=max_length))
    spans = []
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(string) - 1))
        stop = draw(st.integers(start, len(string)))
        spans.append((start, stop, draw(st.sampled_from([0.25, 1.0, 3.0])), draw(st.integers(-1, 3))))
    return string, spans


@st.composite
def forests(draw, *, max_trees=12, shared_prefixes=False):
    """Trees as (length of a prefix that may be shared, sequences); with `shared_prefixes`, some trees share one."""
    heads = [[0, 1, 2], [0, 1], [0, 1, 2, 2, 1]]
    made = []
    for _ in range(draw(st.integers(1, max_trees))):
        head = draw(st.sampled_from(heads)) if shared_prefixes and draw(st.integers(0, 3)) else []
        weight = draw(st.sampled_from([0, 0.5, 1.0])) if head else 0
        sequences = []
        for string, spans in draw(st.lists(strings(), min_size=1, max_size=3)):
            first = 3 + draw(st.integers(0, 1))
            moved = [(start + len(head), stop + len(head), *rest) for start, stop, *rest in spans]
            sequences.append(([*head, first, *string], moved + [(0, len(head), weight, -1)] * bool(weight)))
        sequences[0][1].append((len(sequences[0][0]) - 1, len(sequences[0][0]), 1.0, 0))  # a tree has a target
        made.append((len(head), sequences))
    return made


def built(sequences, paths=None):
    """The tree of sequences."""
    made = [(np.array(string, np.int32), [prefix_tree.Span(*span) for span in spans]) for string, spans in sequences]
    return prefix_tree.build_tree(made, paths)


def stored(forest) -> dataset.Trees:
    """The trees of a forest."""
    made = [built(sequences) for _, sequences in forest]
    return dataset.concatenate_trees(made, shared_prefix_lengths=[shared for shared, _ in forest])
