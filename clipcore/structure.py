"""Nested structures of tensors: their leaves, and the same structure around other leaves."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) for every leaf of nested lists, tuples and dicts; `None` is no leaf."""
    return ((place, leaf) for place, leaf in places(tree, path) if leaf is not None)


def places(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) for every place of a leaf in nested lists, tuples and dicts, those that hold `None` too."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, f"{path}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from places(value, f"{path}[{index}]")
    else:
        yield path, tree


def keys(tree: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield, for every place that `places` yields, the keys and indices that lead to it."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from keys(value, (*before, key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from keys(value, (*before, index))
    else:
        yield before


def rebuild(tree: Any, new_leaves: Iterator[Any]) -> Any:
    """The structure of `tree` with its leaves, in order, taken from `new_leaves`."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        items = {key: rebuild(value, new_leaves) for key, value in tree.items()}
        return items if type(tree) is dict else _refilled(tree, items)
    if isinstance(tree, list | tuple):
        values = [rebuild(value, new_leaves) for value in tree]
        if isinstance(tree, list):
            return values if type(tree) is list else _refilled(tree, values)
        return _tuple(tree, values)
    return next(new_leaves)


def _refilled(tree: Any, content: Any) -> Any:
    """A list or dict of the class of `tree`, with what else it carries (a defaultdict's factory)."""
    if type(tree) is defaultdict:  # torch.compile traces how one is made, but no copy of one
        return defaultdict(tree.default_factory, content)
    result = copy.copy(tree)
    if isinstance(tree, dict):
        for key, value in content.items():  # update would add to a Counter
            result[key] = value
    else:
        result[:] = content
    return result


def _tuple(tree: Any, values: list[Any]) -> Any:
    """A tuple of the class of `tree`, with the attributes that it has besides."""
    cls = type(tree)
    if cls is tuple or not issubclass(cls, tuple) or hasattr(cls, "n_fields"):
        return cls(values)  # not a tuple but a wrapper of one, or a struct sequence, which nothing else can make
    result: Any = tuple.__new__(cls, values)  # a constructor of its own may take anything
    if hasattr(tree, "__dict__"):
        vars(result).update(vars(tree))
    return result


def in_order_of(tree: Any, other: Any) -> Any:
    """`tree` with the entries of its dicts in the order of those of `other`, where both have the same keys."""
    if isinstance(tree, dict) and isinstance(other, dict) and tree.keys() == other.keys():
        return {key: in_order_of(tree[key], value) for key, value in other.items()}
    if isinstance(tree, list | tuple) and isinstance(other, list | tuple) and len(tree) == len(other):
        return [in_order_of(value, beside) for value, beside in zip(tree, other, strict=True)]
    return tree


def plain(tree: Any) -> Any:
    """The structure with what JSON lacks, NaN and infinities, as None."""
    return map_leaves(lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf, tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The structure of `tree` with `function` applied to every leaf."""
    return rebuild(tree, (function(leaf) for _, leaf in leaves(tree)))
