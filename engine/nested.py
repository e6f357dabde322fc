"""What a model takes and returns: tensors in tuples, lists, mappings and dataclasses, within one another."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def leaves_of(tree: Any) -> Iterator[Any]:
    """What holds nothing else, in order."""
    entries = _entries(tree)
    if entries is None:
        yield tree
        return
    for _, entry in entries:
        yield from leaves_of(entry)


def names_of(tree: Any, name: str = "") -> Iterator[str]:
    """For each leaf the innermost key or field that it lies under."""
    entries = _entries(tree)
    if entries is None:
        yield name
        return
    for key, entry in entries:
        yield from names_of(entry, key)


def rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """The same structure around other leaves."""
    entries = _entries(tree)
    if entries is None:
        return next(leaves)
    rebuilt = [rebuild(entry, leaves) for _, entry in entries]
    if isinstance(tree, Mapping):
        return type(tree)(dict(zip(tree, rebuilt)))  # type: ignore[call-arg]
    if isinstance(tree, tuple | list):
        return type(tree)(*rebuilt) if hasattr(tree, "_fields") else type(tree)(rebuilt)
    found = copy.copy(tree)
    for (name, _), entry in zip(entries, rebuilt):
        object.__setattr__(found, name, entry)  # frozen dataclasses too
    return found


def _entries(tree: Any) -> list[tuple[str, Any]] | None:
    """Names and values of what a structure holds; None: it is a leaf."""
    if isinstance(tree, Mapping):
        return [(str(key), entry) for key, entry in tree.items()]
    if isinstance(tree, tuple | list):
        return list(zip(getattr(tree, "_fields", map(str, range(len(tree)))), tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return None
