"""The requests that every configuration of the Triton kernels is tested with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile.kernels import (
    AbovePositive,
    ColumnRange,
    CountAbove,
    Diagonal,
    DifferentId,
    HingeSum,
    LogSumExp,
    Max,
    Paced,
    PairScore,
    SameId,
    SoftmaxMean,
    SoftplusSum,
    Target,
    Teacher,
    TopK,
    similarity_reduce,
)
from similarity_cases import NAMES, Case, dense_scores, objective


def clip(n: int, m: int, margin: float) -> tuple[list, list]:
    return [LogSumExp(Diagonal()), PairScore()], [LogSumExp(Diagonal()), PairScore()]


def siglip(n: int, m: int, margin: float) -> tuple[list, list]:
    return [SoftplusSum(Diagonal(2))], []


def one_direction(n: int, m: int, margin: float) -> tuple[list, list]:
    target = Target(torch.arange(n) * 5 % (m + 1) - 1)
    return [LogSumExp(target), PairScore(target)], []


def everything(n: int, m: int, margin: float) -> tuple[list, list]:
    """Every rule and both kinds of sums, with weights, in both directions."""
    target = Target(torch.arange(n) * 5 % (m + 1) - 1)
    ids = torch.arange(n) % 12, torch.arange(m) % 12
    rows = [
        LogSumExp((SameId(*ids), target), torch.linspace(0, 1, m)),
        LogSumExp(AbovePositive(margin)),
        SoftplusSum((target, Diagonal(3)), ColumnRange(m // 3, m // 2), torch.linspace(0, 2, m)),
        PairScore(target),
    ]
    cols = [
        LogSumExp((DifferentId(*ids), Diagonal(-2)), torch.linspace(1, 0, n)),
        SoftplusSum(AbovePositive(margin, Diagonal()), (target, ColumnRange(m // 2, m + 9))),
        PairScore(Diagonal(5)),
    ]
    return rows, cols


def teacher(n: int, m: int, d: int, scale: float | Tensor) -> Teacher:
    """Of features that are eighths, exact in every dtype."""
    x, y = ((torch.arange(rows * d).view(rows, d) * step % 17 - 8) / 8 for rows, step in ((n, 37), (m, 29)))
    return Teacher(x, y, scale)


def distillation(n: int, m: int, margin: float) -> tuple[list, list]:
    """Two teachers, whose rows a descriptor can load, in both directions: beside S, beside each other, alone."""
    first, second = teacher(n, m, 24, 1.5), teacher(n, m, 72, torch.linspace(-0.5, 1, n))
    rows = [LogSumExp(Diagonal()), SoftmaxMean(under=first), SoftmaxMean(second, first), LogSumExp(of=second)]
    cols = [LogSumExp(Diagonal()), SoftmaxMean(under=first), SoftmaxMean(second, None, 0.5, Diagonal())]
    return rows, cols


def above_and_largest(n: int, m: int, margin: float) -> tuple[list, list]:
    """What else a field can be, with weights and with thresholds, and a teacher whose rows no descriptor can load."""
    own, taught = Diagonal(), teacher(n, m, 5, 2.0)
    rows = [
        LogSumExp(own, of=Paced(0.5, 0.3, 0.2, -1.0)),
        HingeSum(-margin, own, None, torch.linspace(0, 1, m)),
        TopK(5, own),
        TopK(20, ColumnRange(3, 9), taught),
    ]
    cols = [
        SoftmaxMean(None, None, -0.5, AbovePositive(margin), torch.linspace(0, 1, n)),
        HingeSum(-margin, Diagonal(), Diagonal(2)),
        CountAbove(margin, own),
        Max(own),
        LogSumExp(own, of=Paced(-0.5, -0.3, 0.2, 1.0)),
    ]
    return rows, cols


#: Of (n, m, margin); the margin of thresholds, if there are any.
REQUESTS = {
    "CLIP": clip,
    "SigLIP": siglip,
    "one direction": one_direction,
    "everything": everything,
    "distillation": distillation,
    "above and largest": above_and_largest,
}


def request_case(name: str, n: int, m: int, d: int, dtype: torch.dtype, *, aligned: bool, device: str = "cpu") -> Case:
    """Unit vectors; unless `aligned`, x is stored columns first and y is a part of wider rows, NaN around it."""
    generator = torch.Generator().manual_seed(n + m + d)
    x, y = (F.normalize(torch.randn(rows, d, generator=generator), dim=1).to(dtype) for rows in (n, m))
    if not aligned:
        x, y = x.T.contiguous().T, F.pad(y, (1, 2), value=torch.nan)[:, 1:-2]
    scale = torch.tensor(14.3)
    biases: list[Tensor | None] = [None] * 3
    if name == "SigLIP":
        biases[0] = torch.tensor(-10.0)
    if name == "everything":
        scale = torch.linspace(-3, 14.3, n)
        biases = [torch.tensor(0.4), torch.randn(n, generator=generator), torch.randn(m, generator=generator)]
    case = Case([x, y, scale, *biases])
    margin = clear_margin(case) if name in ("everything", "above and largest") else 0.0
    with torch.device(device):
        case.rows, case.cols = REQUESTS[name](n, m, margin)
    shapes = [
        (owners, *([each.k] if isinstance(each, TopK) else []))
        for owners, asked in ((n, case.rows), (m, case.cols))
        for each in asked
    ]
    case.upstream = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    case.operands = [None if each is None else moved(each, device) for each in case.operands]
    return case


def moved(tensor: Tensor, device: str) -> Tensor:
    """On another device with the strides it has, and NaN between its elements."""
    if tensor.device == torch.device(device):
        return tensor
    extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    if not tensor.numel():
        return tensor.to(device)
    around = torch.full((tensor.storage_offset() + extent,), torch.nan, dtype=tensor.dtype, device=device)
    return around.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


def clear_margin(case: Case) -> float:
    """Of some margins the one that no score comes near: a borderline pair may fall on either side in float32."""
    scores = dense_scores(case, torch.float64)
    own, pairs = scores.diagonal(), min(scores.shape)
    gaps = torch.cat([(scores[:pairs] - own[:, None]).flatten(), (scores[:, :pairs] - own).flatten()])
    margins = torch.linspace(0.5, 1.5, 40, dtype=torch.float64)
    return max((float((gaps - margin).abs().min()), float(margin)) for margin in margins)[1]


def run_request(case: Case, *, precision: str | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
    """All results and all gradients; in `dtype`, or as the case has its operands."""
    operands = case.operands if dtype is None else case.to(dtype)
    leaves = dict(zip(NAMES, (None if each is None else each.detach().requires_grad_() for each in operands)))
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    rows, cols = similarity_reduce(
        **leaves, rows=case.rows, cols=case.cols, precision=precision, memory_budget=case.budget
    )
    total = objective([*rows, *cols], case)
    return [*rows, *cols, *torch.autograd.grad(total, list(leaves.values()))]
