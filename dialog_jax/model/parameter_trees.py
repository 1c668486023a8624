"""Nested dicts of parameters: their paths, such as "layers/attention/w_query", and their parts.

The parameters of a model are two such trees, those that are trained and those that are frozen, which share no path.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {path: leaf}: {"layers": {"w_up": x}}  ->  {"layers/w_up": x}."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one tree of two that share no path; copies no array."""
    merged = dict(first)
    for name, value in second.items():
        if name in merged:
            assert isinstance(value, Mapping) and isinstance(merged[name], Mapping), name
            merged[name] = merge(merged[name], value)
        else:
            merged[name] = value
    return merged


def split(tree: Mapping[str, Any], belongs_to_first: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns two trees, of the leaves whose paths belong to the first and of the others; `merge` joins them."""
    flat = flatten(tree)
    first = {path for path in flat if belongs_to_first(path)}
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path in first}),
        unflatten({path: leaf for path, leaf in flat.items() if path not in first}),
    )
