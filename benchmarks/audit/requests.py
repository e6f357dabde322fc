"""What is asked of the operator in the audit: inputs of the headline sizes, on torch's meta device, without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pairtile.kernels import ColumnRange, Diagonal, DifferentId, LogSumExp, PairScore, SameId, SoftplusSum, Target
from pairtile.kernels.contrastive.operands import Operands
from pairtile.kernels.contrastive.plan import Plan
from pairtile.kernels.contrastive.reductions import Above

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


REQUESTS: dict[str, Callable[[Tensor, Tensor], tuple[Operands, Plan]]] = {
    "CLIP": _clip,
    "SigLIP": _siglip,
    "softplus": _softplus,
    "cross-entropy": _cross_entropy,
    "rich": _rich,
}


def request(
    name: str, dtype: torch.dtype, width: int, precision: str = "ieee", aligned: bool = True, batch: int = BATCH
) -> Request:
    # A row of one element more is the same matrix to a kernel but for where its rows start.
    x, y = (_meta(batch, width + (not aligned), dtype=dtype)[:, :width] for _ in range(2))
    operands, plan = REQUESTS[name](x, y)
    return Request(name, operands, plan, dtype, precision, aligned)
