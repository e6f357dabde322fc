"""Work shared out to processes, with the results in order and a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import PairtileError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(visible: bool) -> Progress:
    """A bar on stderr, so that stdout stays free for results.

    It has no thread of its own (call ``update`` with ``refresh=True``): a fork beside one that holds a lock of
    stderr could hang a child that warns.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not visible, auto_refresh=False)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in the order of the items, computed by ``workers`` processes (1: in this one).

    At most four items a worker are in flight, so a long stream of items costs no memory.

    Raises:
        PairtileError: ``workers`` below 1; a process was killed, most often for want of memory.
    """
    if workers < 1:
        raise PairtileError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        for item in items:
            yield item, function(item)
        return
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else None)
    stream = iter(items)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        waiting.extend((item, pool.submit(function, item)) for item in islice(stream, 4 * workers))
        while waiting:
            item, future = waiting.popleft()
            result = future.result()
            waiting.extend((later, pool.submit(function, later)) for later in islice(stream, 1))
            yield item, result
    except BrokenProcessPool:
        raise PairtileError("a worker process was killed, most often for want of memory; use fewer workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
