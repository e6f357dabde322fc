"""What is asked of the operator in the audit: inputs of the headline sizes, on torch's meta device, without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pairtile.kernels import (
    ColumnRange,
    Diagonal,
    DifferentId,
    LogSumExp,
    Paced,
    PairScore,
    SameId,
    SoftmaxMean,
    SoftplusSum,
    Target,
    Teacher,
)
from pairtile.kernels.contrastive.operands import Operands
from pairtile.kernels.contrastive.plan import Plan
from pairtile.kernels.contrastive.reductions import Above, Chosen, Count, Hinge

#: Rows and columns: the batch that memeff and siglip-kernel advertise.
BATCH = 65_536


@dataclass(frozen=True)
class Request:
    """What is asked of the operator, in one kind of product.

    Attributes:
        aligned: whether rows of the features start at multiples of 16 bytes; else pointers take the place of descriptors.
    """

    name: str
    operands: Operands
    plan: Plan
    dtype: torch.dtype
    precision: str
    aligned: bool

    @property
    def one_sweep(self) -> bool:
        """Whether the loss and its gradients come from one sweep, outside of the operator."""
        return self.name == "SigLIP"

    def __str__(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype, self.precision)
        batch, width = self.operands.x.shape
        parts = [self.name, kind, f"D={width}", "" if batch == BATCH else f"N={batch}"]
        return " ".join(part for part in (*parts, "" if self.aligned else "pointers") if part)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _plain(x: Tensor, y: Tensor) -> Operands:
    return Operands(x, y, _meta(), None, None, None)


def _clip(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    others, own = LogSumExp(exclude=Diagonal()), PairScore(Diagonal())
    return _plain(x, y), [(1, others), (1, own), (0, others), (0, own)]


def _siglip(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    return _plain(x, y)._replace(bias=_meta()), [(1, SoftplusSum())]


def _softplus(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    """What SigLIP asks of the operator, in both directions."""
    operands, plan = _siglip(x, y)
    return operands, [*plan, (0, SoftplusSum())]


def _cross_entropy(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    target = Target(_meta(len(x), dtype=torch.int64))
    return _plain(x, y), [(1, LogSumExp(exclude=target)), (1, PairScore(target))]


def _rich(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    """Every rule and every operand at once."""
    n, m = len(x), len(y)
    ids = _meta(n, dtype=torch.int64), _meta(m, dtype=torch.int64)
    target = Target(_meta(n, dtype=torch.int64))
    operands = Operands(x, y, _meta(n), _meta(), _meta(n), _meta(m))
    along_rows, along_cols = _meta(m), _meta(n)
    return operands, [
        (1, LogSumExp((Diagonal(), SameId(*ids), ColumnRange(1024, 4096)), along_rows)),
        (1, SoftplusSum((Diagonal(), SameId(*ids)), Above(_meta(n), target), along_rows)),
        (1, PairScore(target)),
        (0, LogSumExp((DifferentId(*ids), Above(_meta(m), Diagonal())), along_cols)),
        (0, PairScore(Diagonal())),
    ]


def _teacher(x: Tensor, y: Tensor, width: int) -> Teacher:
    """Its rows are aligned as those of x and y are."""
    x, y = (_meta(len(each), width + 8 - each.stride(0) % 8, dtype=each.dtype)[:, :width] for each in (x, y))
    return Teacher(x, y, _meta())


def _distillation(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    """The cross-entropy of S against the softmax of two teachers, in both directions."""
    teachers = [_teacher(x, y, width) for width in (768, 1024)]
    asked = [LogSumExp(), *(SoftmaxMean(under=each) for each in teachers)]
    return _plain(x, y), [(dim, each) for dim in (1, 0) for each in asked]


def _taught(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    """Every way in which a teacher is asked for, one beside S and one beside the other."""
    first, second = _teacher(x, y, 768), _teacher(x, y, 64)
    weights = _meta(len(y))
    asked = [
        LogSumExp(of=first),
        SoftmaxMean(first, None, 2.0, Diagonal(), weights),
        SoftmaxMean(first, second, 0.5),
        SoftmaxMean(under=second),
        Chosen(4, Diagonal(), first),
    ]
    return _plain(x, y), [(1, each) for each in asked]


def _mean(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    """The mean of S under its own softmax, in both directions."""
    mean = SoftmaxMean(sharpness=2.0)
    return _plain(x, y), [(1, mean), (0, mean)]


def _circle(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    """The circle loss: classes, and scores that pace themselves."""
    ids = _meta(len(x), dtype=torch.int64), _meta(len(y), dtype=torch.int64)
    near, far = Paced(64.0, 1.0, 0.25, 0.25), Paced(-64.0, -1.0, 1.25, 0.75)
    return _plain(x, y), [(1, LogSumExp(SameId(*ids), of=near)), (1, LogSumExp(DifferentId(*ids), of=far))]


def _hinge(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    """The sum of hinges, in both directions: with it comes the number of pairs that count."""
    plan: Plan = []
    for dim, owners in ((1, x), (0, y)):
        thresholds, own = _meta(len(owners)), Diagonal()
        plan += [(dim, Count(thresholds, own)), (dim, Hinge(thresholds, own)), (dim, PairScore(own))]
    return _plain(x, y), plan


def _hardest(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    """Beside a cross-entropy the eight hardest pairs of each row and of each column."""
    operands, plan = _clip(x, y)
    return operands, [*plan, (1, Chosen(8, Diagonal())), (0, Chosen(8, Diagonal()))]


def _retrieval(x: Tensor, y: Tensor) -> tuple[Operands, Plan]:
    """So many of the largest that tiles leave the choice to torch."""
    return _plain(x, y), [(1, Chosen(100)), (0, Chosen(100))]


REQUESTS: dict[str, Callable[[Tensor, Tensor], tuple[Operands, Plan]]] = {
    "CLIP": _clip,
    "SigLIP": _siglip,
    "softplus": _softplus,
    "cross-entropy": _cross_entropy,
    "rich": _rich,
    "distillation": _distillation,
    "taught": _taught,
    "mean": _mean,
    "circle": _circle,
    "hinge": _hinge,
    "hardest": _hardest,
    "retrieval": _retrieval,
}


def request(
    name: str, dtype: torch.dtype, width: int, precision: str = "ieee", aligned: bool = True, batch: int = BATCH
) -> Request:
    # A row of one element more is the same matrix to a kernel but for where its rows start.
    x, y = (_meta(batch, width + (not aligned), dtype=dtype)[:, :width] for _ in range(2))
    operands, plan = REQUESTS[name](x, y)
    return Request(name, operands, plan, dtype, precision, aligned)
