"""The hard lines, held for every shipped configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .examine import Examiner, label_of
from .launches import AnyRequest, Overrides, recorded
from .targets import Target, compiling_for


@dataclass(frozen=True)
class Checked:
    """One request, held to the hard lines.

    Attributes:
        kernels: how many the request compiled that no request before it had.
        violations: each a sentence, and how many of these kernels it was said of.
    """

    request: AnyRequest
    kernels: int
    violations: Counter[str]


def checked(
    target: Target, requests: Iterable[AnyRequest], only: str = "", overrides: Overrides | None = None
) -> Iterator[Checked]:
    """Each request's violations, as it is done. A kernel that several requests share is examined once."""
    examiner = Examiner(target)
    seen: set[str] = set()
    with compiling_for(target):
        for request in requests:
            before = len(seen)
            found: Counter[str] = Counter()
            for launch in recorded(request, target, overrides):
                if only not in f"{request} {label_of(launch)}":
                    continue
                examined = examiner.examine(launch, request)
                if examined.identity not in seen:
                    seen.add(examined.identity)
                    found.update(f"{label_of(launch)} {examined.work.tile}: {each}" for each in examined.violations)
            yield Checked(request, len(seen) - before, found)
