"""An integration's switch: on for the process, or inside blocks, and what it replaces meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple


class Replacement(NamedTuple):
    """A function or method of another library, and ours, which is put in its place."""

    owner: Any
    name: str
    theirs: Callable[..., Any]
    ours: Callable[..., Any]


class Switch:
    """Puts ours in the place of theirs, and theirs back.

    Args:
        replacements: called whenever something changes; what it raises leaves all as it was.
    """

    def __init__(self, replacements: Callable[[], Sequence[Replacement]]) -> None:
        self._replacements = replacements
        self._lock = threading.Lock()
        self._always, self._blocks, self.on = False, 0, False

    def always(self, wanted: bool) -> None:
        """On or off for the process; off leaves blocks that run."""
        self._set(always=wanted)

    @contextmanager
    def block(self) -> Iterator[None]:
        """On inside a block, for all threads. Blocks nest, and may overlap in several threads."""
        self._set(blocks=1)
        try:
            yield
        finally:
            self._set(blocks=-1)

    def _set(self, *, always: bool | None = None, blocks: int = 0) -> None:
        with self._lock:
            always, blocks = self._always if always is None else always, self._blocks + blocks
            wanted = always or blocks > 0
            if wanted != self.on:
                for each in self._replacements():
                    setattr(each.owner, each.name, each.ours if wanted else each.theirs)
            self._always, self._blocks, self.on = always, blocks, wanted


def library(name: str, distribution: str) -> ModuleType:
    """A library's top module, by its name and by what pip calls it.

    Raises:
        ImportError: it is not installed. An error inside of it is passed on.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(
            f"this integration serves {distribution}, which is not installed: pip install {distribution}"
        ) from error
