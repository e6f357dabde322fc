"""Token merging in the audit: what is asked, on torch's meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pairtile.kernels.token_merging.combine import COMBINATIONS
from pairtile.kernels.token_merging.similarity import SIMILARITIES, Partners

from .targets import Target

#: Samples, and tokens of one: a video's, or those of an image of 512 x 512.
_BATCH, _TOKENS = 32, 1025
_BUDGET = 512 << 20
_MERGED = 64
_OURS, _MERGE = SIMILARITIES["triton"], COMBINATIONS["triton"]


@dataclass(frozen=True)
class TokenRequest:
    """What is asked of token merging; the twin of `requests.Request`."""

    name: str
    width: int
    dtype: torch.dtype
    tokens: int = _TOKENS
    aligned: bool = True
    precision = "ieee"

    def __str__(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, self.precision)
        return f"{self.name} {kind} N={self.tokens} D={self.width}{'' if self.aligned else ' pointers'}"

    def launch(self, phase: dict[str, str]) -> None:
        """Runs the host code, which starts every kernel; `phase` is told which part it is in."""
        ASKED[self.name](self.tokens_of(self.tokens), phase)

    def tokens_of(self, count: int) -> Tensor:
        return _meta(_BATCH, count, self.width + (not self.aligned), dtype=self.dtype)[..., : self.width]


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _tome(metric: Tensor, phase: dict[str, str]) -> None:
    assert _OURS.bipartite is not None
    _OURS.bipartite(metric, _MERGED, 1, True, False)


def _distilled(metric: Tensor, phase: dict[str, str]) -> None:
    assert _OURS.bipartite is not None
    _OURS.bipartite(metric, _MERGED, 0, True, True)


def _pitome(metric: Tensor, phase: dict[str, str]) -> None:
    _OURS.energies(metric, 0.45, 1.0, _BUDGET)
    _OURS.best_partners(metric[:, :_MERGED], metric[:, _MERGED:], None, None, Partners.ALL, _BUDGET)


def _crossget(metric: Tensor, phase: dict[str, str]) -> None:
    keep = _meta(*metric.shape[:2], dtype=torch.bool)
    for partners in (Partners.OTHERS, Partners.LATER):
        _OURS.best_partners(metric, metric, keep, keep, partners, _BUDGET)


def _merge(x: Tensor, phase: dict[str, str]) -> None:
    """By sizes; its backward; and a plain unmerge."""
    batch, tokens, _ = x.shape
    kept, moved = _meta(batch, tokens - _MERGED), _meta(batch, _MERGED)
    sizes, merged = (_meta(batch, count, dtype=torch.float32) for count in (tokens, tokens - _MERGED))
    found = _MERGE.combine(x, kept, moved, moved, sizes, merged)
    _MERGE.spread(found, _meta(batch, tokens), None, None)
    phase["now"] = "backward"
    _MERGE.spread(found, _meta(batch, tokens), sizes, merged)
    _MERGE.combine(x, kept, moved, moved, None, None)


ASKED: dict[str, Callable[[Tensor, dict[str, str]], None]] = {
    "tome": _tome,
    "tome distilled": _distilled,
    "pitome": _pitome,
    "crossget": _crossget,
    "merge": _merge,
}


def token_headline() -> Iterator[TokenRequest]:
    """The table: a metric of 64 channels, the keys' mean over heads, and tokens of a ViT-B."""
    for name in ASKED:
        yield TokenRequest(name, 768 if name == "merge" else 64, torch.bfloat16)


def token_shipped(target: Target) -> Iterator[TokenRequest]:
    """Every configuration: few tokens and many, D in one piece and in chunks, rows that are aligned and rows that are not."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name in ASKED:
            yield TokenRequest(name, 64, dtype)
            yield TokenRequest(name, 509, dtype, aligned=False)
        for width in (16, 96, 128, 256, 768):
            yield TokenRequest("tome", width, dtype)
            yield TokenRequest("crossget", width, dtype, tokens=197)
            yield TokenRequest("pitome", width, dtype, tokens=197)
            yield TokenRequest("merge", width, dtype, tokens=197)


def token_spanning(target: Target) -> Iterator[TokenRequest]:
    """A few of them that touch every kernel, within seconds."""
    asked = {
        "sm90": [("tome", torch.bfloat16), ("pitome", torch.bfloat16), ("merge", torch.bfloat16)],
        "sm100": [("crossget", torch.bfloat16), ("merge", torch.float16)],
        "sm80": [("tome distilled", torch.float16), ("pitome", torch.float32)],
        "gfx942": [("crossget", torch.float32), ("merge", torch.bfloat16)],
    }
    for name, dtype in asked[target.arch]:
        yield TokenRequest(name, 768 if name == "merge" else 64, dtype)


def token_label(given: dict[str, Any]) -> list[str]:
    """Which of its variants a kernel is, from its arguments."""
    if "PARTNERS" in given:
        sides = given["x"], given["y"]
        return [
            ["", "others", "later"][given["PARTNERS"]],
            "scaled" if sides[0].scales is not None else "",
            "masked" if any(side.keep is not None for side in sides) else "",
        ]
    return ["weighted" if given.get("factors") is not None else ""]
