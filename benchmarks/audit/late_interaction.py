"""Late interaction in the audit: what is asked, on torch's meta device, and what one program of each kernel does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pairtile.kernels.contrastive.triton_kernels.configurations import PRECISIONS, offered
from pairtile.kernels.late_interaction import triton_project
from pairtile.kernels.late_interaction.backends import Request
from pairtile.kernels.late_interaction.pooling import LogSumExpPooling, MaxPooling, Pooling, SoftmaxPooling
from pairtile.kernels.late_interaction.token_sets import TokenSets
from pairtile.kernels.late_interaction.triton_backend import KERNELS

from .targets import Target

_BUDGET = 512 << 20
_MAX = MaxPooling()


@dataclass(frozen=True)
class _Asked:
    """Sets and tokens of both sides, and what is asked of them; `trained`: with what the backward needs, and the backward."""

    x: tuple[int, int]
    y: tuple[int, int]
    pooling: Pooling = _MAX
    cols: bool = False
    candidates: int = 0
    masked: bool = False
    trained: bool = True


#: ColBERT's queries and documents, scored and trained; candidates of a reranker; FILIP's patches and texts; two long sides.
ASKED = {
    "maxsim": _Asked((128, 32), (1000, 1024), trained=False),
    "maxsim trained": _Asked((128, 32), (1000, 1024)),
    "maxsim masked": _Asked((128, 32), (1000, 300), masked=True),
    "rerank": _Asked((64, 32), (6400, 300), candidates=100),
    "filip": _Asked((256, 196), (256, 32), cols=True, masked=True),
    "long": _Asked((64, 400), (64, 300), cols=True),
    "softmax": _Asked((64, 196), (64, 32), SoftmaxPooling(0.07), cols=True, masked=True),
    "log-sum-exp": _Asked((64, 196), (64, 32), LogSumExpPooling(0.07)),
}
_PROJECTION = "project_max"


@dataclass(frozen=True)
class LateRequest:
    """What is asked of late interaction, in one kind of product; the twin of `requests.Request`."""

    name: str
    width: int
    dtype: torch.dtype
    precision: str = "ieee"
    aligned: bool = True

    def __str__(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, self.precision)
        return f"{self.name} {kind} D={self.width}{'' if self.aligned else ' pointers'}"

    def launch(self, phase: dict[str, str]) -> None:
        """Runs the host code, which starts every kernel; `phase` is told which part it is in."""
        if self.name == _PROJECTION:
            hidden, weight = self._sets(256, 64), self._sets(50_000, 1)
            values, chosen = triton_project.forward(hidden, weight.tokens, _BUDGET, self.precision)
            phase["now"] = "backward"
            triton_project.backward(hidden, weight.tokens, chosen, values, _BUDGET, (True, True))
            return
        asked = ASKED[self.name]
        x, y = (self._sets(*shape, masked=asked.masked) for shape in (asked.x, asked.y))
        request = Request(asked.pooling, asked.candidates, True, asked.cols, _BUDGET, self.precision)
        scores, kept = KERNELS.forward(x, y, request, asked.trained)
        if asked.trained:
            phase["now"] = "backward"
            KERNELS.backward(x, y, request, kept, scores, (True, True))

    def _sets(self, count: int, length: int, *, masked: bool = False) -> TokenSets:
        rows = count * length
        # A row of one element more is the same matrix to a kernel but for where its rows start.
        tokens = _meta(rows, self.width + (not self.aligned), dtype=self.dtype)[:, : self.width]
        keep = _meta(rows, dtype=torch.bool) if masked else None
        starts, lengths = (_meta(count, dtype=torch.int64) for _ in range(2))
        return TokenSets(tokens, starts, lengths, keep, length, length)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def late_headline() -> Iterator[LateRequest]:
    """The table: the width that peers advertise."""
    for name in (*ASKED, _PROJECTION):
        yield LateRequest(name, 512 if name == _PROJECTION else 128, torch.bfloat16)


def late_shipped(target: Target) -> Iterator[LateRequest]:
    """Every configuration: D in one piece and in chunks, wide and narrow, rows that are aligned and rows that are not."""
    kinds = [(torch.bfloat16, "ieee"), *((torch.float32, each) for each in PRECISIONS if each in offered(target.arch))]
    for dtype, precision in kinds:
        for name in (*ASKED, _PROJECTION):
            yield LateRequest(name, 128, dtype, precision)
            yield LateRequest(name, 509, dtype, precision, aligned=False)
        for name in ("maxsim trained", "filip", "softmax"):
            for width in (64, 96, 256, 768):
                yield LateRequest(name, width, dtype, precision)
    yield LateRequest("filip", 128, torch.float16)
    yield LateRequest("softmax", 128, torch.float16)


def late_spanning(target: Target) -> Iterator[LateRequest]:
    """A few of them that touch every kernel, within seconds."""
    asked = {
        "sm90": [("maxsim trained", torch.bfloat16, "ieee"), ("softmax", torch.bfloat16, "ieee")],
        "sm100": [("filip", torch.bfloat16, "ieee")],
        "sm80": [("long", torch.float32, "ieee")],
        "gfx942": [("maxsim masked", torch.bfloat16, "ieee")],
    }
    for name, dtype, precision in asked[target.arch]:
        yield LateRequest(name, 128, dtype, precision)


def late_label(given: dict[str, Any]) -> list[str]:
    """Which of its variants a kernel is, from its arguments."""
    parts = {
        "held_chosen": "positions",
        "streamed_scores": "both",
        "streamed_chosen": "all positions",
        "of_held": "held",
        "of_streamed": "streamed",
        "chosen": "chosen",
        "lists": "listed",
    }
    found = [word for name, word in parts.items() if given.get(name) is not None]
    masked = "streamed" in given and given["streamed"].keep is not None
    return [*found, "masked" if masked else "", "candidates" if given.get("PAIRS") else ""]
