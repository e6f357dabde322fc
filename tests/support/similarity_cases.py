"""Random similarity matrices and requests, and what they come to: shared by the tests that compare with float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

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
    use_backend,
)

NAMES = ("x", "y", "scale", "bias", "row_bias", "col_bias")


@dataclass
class Case:
    """Inputs and a request. `operands` in the order of NAMES, None where left out; `upstream` of each result."""

    operands: list[Tensor | None]
    rows: list = field(default_factory=list)
    cols: list = field(default_factory=list)
    upstream: list[Tensor] = field(default_factory=list)
    budget: int | None = None

    def to(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [None if each is None else each.to(dtype) for each in self.operands]


def random_case(seed: int, richer: bool = False) -> Case:
    """`richer`: every reduction there is, where otherwise the three of the plain losses are."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    n, m = (choose.choice([0, 1, 1, 2, 3, 7, 16, 17, 33, 64, 65, 101, 130]) for _ in range(2))
    d = choose.choice([1, 1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 100]) if seed % 40 else 0
    dtype = choose.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    x, y = random_features(choose, n, m, d)
    # Logits: a temperature as in training, or the extremes that a softmax has to survive.
    size = choose.choice([1.0, 10 ** choose.uniform(0, 2), 14.3, 100.0, 1e4, -1e4])
    scale = size * torch.rand(n).add(0.5) if choose.random() < 0.2 else torch.tensor(size)
    case = Case(
        [
            strided(choose, x.to(dtype)),
            strided(choose, y.to(dtype)),
            scale.float(),
            torch.tensor(choose.uniform(-10, 10)) if choose.random() < 0.5 else None,
            torch.randn(n) if choose.random() < 0.3 else None,
            torch.randn(m) if choose.random() < 0.3 else None,
        ],
        budget=choose.choice([None, None, 1, 20_000]),
    )
    makers = RicherMakers(choose, case) if richer else Makers(choose, case)
    case.rows = [makers.reduction(1) for _ in range(choose.choice([1, 1, 2, 3]))]
    case.cols = [makers.reduction(0) for _ in range(choose.choice([0, 1, 1, 2]))]
    # So that no gradient leaves the range of float16.
    amplitude = min(1.0, 100 / abs(size))
    case.upstream = [amplitude * each for each in random_upstream(case)]
    return case


def random_upstream(case: Case) -> list[Tensor]:
    lengths = ((case.operands[0].shape[0], case.rows), (case.operands[1].shape[0], case.cols))
    shapes = [
        (owners, *([each.k] if isinstance(each, TopK) else [])) for owners, reductions in lengths for each in reductions
    ]
    return [torch.randn(shape) for shape in shapes]


def random_features(choose: random.Random, n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    x, y = F.normalize(torch.randn(n, d), dim=-1), F.normalize(torch.randn(m, d), dim=-1)
    pairs = min(n, m)
    if choose.random() < 0.5:  # aligned by position, as at the end of training
        y[:pairs] = F.normalize(0.95 * x[:pairs] + 0.3 * y[:pairs], dim=-1)
    if choose.random() < 0.2 and pairs > 2:  # duplicates
        x[1], y[1], y[2] = x[0], y[0], x[0]
    return x, y


def strided(choose: random.Random, tensor: Tensor) -> Tensor:
    """The same values in another layout: columns first, every second row, or a part of wider rows."""
    layout = choose.choice(["plain", "plain", "transposed", "every second", "part"])
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "every second":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], 1).flatten(0, 1)[::2]
    return F.pad(tensor, (3, 2), value=torch.nan)[:, 3:-2] if layout == "part" else tensor


class Makers:
    """Random rules and reductions for the similarities of one case."""

    def __init__(self, choose: random.Random, case: Case) -> None:
        self.choose, self.case = choose, case
        self.n, self.m = case.operands[0].shape[0], case.operands[1].shape[0]
        # Few different ids make big groups; one alone leaves no row an allowed pair.
        kinds = choose.choice([1, 2, 5, 50])
        self.ids = torch.randint(kinds, (self.n,)), torch.randint(kinds, (self.m,))

    def reduction(self, dim: int):
        kind = self.choose.choice(["lse", "lse", "softplus", "score"])
        if kind == "score":
            return PairScore(self.pair(dim))
        weights = None
        if self.choose.random() < 0.25:
            weights = torch.rand(self.m if dim == 1 else self.n)
            weights[::3] = 0
        if kind == "lse":
            return LogSumExp(self.rules(dim), weights)
        return SoftplusSum(self.choose.choice([None, Diagonal(), self.rules(dim)]), self.rules(dim), weights)

    def pair(self, dim: int) -> Diagonal | Target:
        if dim == 1 and self.choose.random() < 0.3:
            return self.target()
        return Diagonal(self.choose.choice([0, 0, 1, -2, 40]))

    def target(self) -> Target:
        return Target(torch.randint(-1, self.m, (self.n,)) if self.m else torch.full((self.n,), -1))

    def rules(self, dim: int):
        count = self.choose.choice([0, 1, 1, 2, 3])
        return tuple(rule for rule in (self.rule(dim) for _ in range(count)) if rule is not None)

    def rule(self, dim: int):
        start = self.choose.randint(-2, self.m)
        kind = self.choose.choice(["diagonal", "diagonal", "target", "same", "different", "range", "above"])
        if kind == "above":
            return self.above(dim)
        return {
            "diagonal": Diagonal(self.choose.choice([0, 0, 3, -1])),
            "target": self.target(),
            "same": SameId(*self.ids),
            "different": DifferentId(*self.ids),
            "range": ColumnRange(start, start + self.choose.choice([0, 1, 20, 200])),
        }[kind]

    def above(self, dim: int) -> AbovePositive | None:
        """With a margin that no score comes near: which side a borderline pair falls on is not the matter here."""
        pair, scores = self.pair(dim), dense_scores(self.case, torch.float64)
        with use_backend("reference"):
            (own,) = reduce_scores(scores, *(([PairScore(pair)], []) if dim == 1 else ([], [PairScore(pair)])))
        spread = float(scores.abs().max()) if scores.numel() else 1.0
        for _ in range(20):
            margin = self.choose.uniform(-1, 1) * self.choose.choice([0.1, 1.0]) * spread
            gaps = (scores - (own + margin).unsqueeze(dim)).abs()
            if not (gaps < 1e-5 * spread).any():
                return AbovePositive(margin, pair)
        return None


class RicherMakers(Makers):
    """Makers of every reduction."""

    def __init__(self, choose: random.Random, case: Case) -> None:
        super().__init__(choose, case)
        dtype = case.operands[0].dtype
        self.teachers = []
        for _ in range(2):
            x, y = random_features(choose, self.n, self.m, choose.choice([1, 5, 16, 70]))
            scale = choose.choice([1.0, 14.3, 100.0]) * (torch.rand(self.n) + 0.5 if choose.random() < 0.2 else 1.0)
            self.teachers.append(Teacher(x.to(dtype), y.to(dtype), scale))
        scores = dense_scores(case, torch.float64)
        self.spread = max(1.0, float(scores.abs().max())) if scores.numel() else 1.0

    def reduction(self, dim: int):
        kind = self.choose.choice(["plain", "mean", "mean", "mean", "taught", "paced", "hinge", "count", "top", "max"])
        weights = None
        if self.choose.random() < 0.25:
            weights = torch.rand(self.m if dim == 1 else self.n)
            weights[::3] = 0
        match kind:
            case "mean":
                of, under = (self.choose.choice([None, None, *self.teachers]) for _ in range(2))
                return SoftmaxMean(of, under, self.choose.choice([1.0, 1.0, 2.0, -0.5]), self.rules(dim), weights)
            case "taught":
                return LogSumExp(self.rules(dim), weights, self.choose.choice(self.teachers))
            case "paced":
                gain, margin = self.choose.uniform(1, 50) / self.spread**2, self.choose.uniform(0, 1) * self.spread
                circle = [Paced(gain, 1, margin, margin), Paced(-gain, -1, self.spread + margin, self.spread - margin)]
                return LogSumExp(self.rules(dim), weights, self.choose.choice(circle))
            case "hinge" | "count":
                above = self.above(dim)
                if above is not None:
                    asked = (above.pair, self.rules(dim), weights)
                    return HingeSum(-above.margin, *asked) if kind == "hinge" else CountAbove(above.margin, *asked)
            case "top" | "max":
                k = 1 if kind == "max" else self.choose.choice([1, 2, 5, 40])
                exclude, of = self.rules(dim), self.choose.choice([None, None, self.teachers[0]])
                if self.distinct(k, exclude, of, dim):
                    return Max(exclude, of) if kind == "max" else TopK(k, exclude, of)
        return super().reduction(dim)

    def distinct(self, k: int, exclude, of: Teacher | None, dim: int) -> bool:
        """Whether no two of the k + 1 largest are so close that rounding decides which comes first."""
        x, y, scale, *biases = self.case.to(torch.float64)
        asked = [TopK(k + 1, exclude, of)]
        with use_backend("reference"):
            found = similarity_reduce(
                x,
                y,
                scale=scale,
                bias=0.0 if biases[0] is None else biases[0],
                row_bias=biases[1],
                col_bias=biases[2],
                **({"rows": asked} if dim == 1 else {"cols": asked}),
            )
        (scores,) = found[1 - dim]
        gaps = (scores[:, :-1] - scores[:, 1:]).nan_to_num(torch.inf)  # -inf, where there is no pair
        size = self.spread if of is None else 150.0
        return not (gaps < 1e-5 * size).any()


def dense_scores(case: Case, dtype: torch.dtype) -> Tensor:
    x, y, scale, *biases = case.to(dtype)
    scores = (scale[:, None] if scale.dim() else scale) * (x @ y.T)
    for bias, shape in zip(biases, ((), (-1, 1), (1, -1)), strict=True):
        scores = scores if bias is None else scores + bias.reshape(shape)
    return scores


def reduce_scores(scores: Tensor, rows: list, cols: list) -> list[Tensor]:
    """Reductions of a matrix that is given: it is its product with the identity."""
    identity = torch.eye(scores.shape[1], dtype=scores.dtype)
    results = similarity_reduce(scores, identity, scale=1.0, rows=rows, cols=cols)
    return [*results[0], *results[1]]


def objective(results: list[Tensor], case: Case) -> Tensor:
    """A scalar whose gradient is `upstream` at every finite result."""
    parts = [
        (result.masked_fill(result.isinf(), 0) * upstream.to(result.dtype)).sum()
        for result, upstream in zip(results, case.upstream, strict=True)
    ]
    return torch.stack(parts).sum()


def pair_gradients(case: Case, dtype: torch.dtype) -> Tensor:
    """G = d objective / dS, dense."""
    scores = dense_scores(case, dtype).requires_grad_()
    with use_backend("reference"):
        total = objective(reduce_scores(scores, case.rows, case.cols), case) + 0 * scores.sum()
    return torch.autograd.grad(total, scores)[0]


def softmax_weights(case: Case, reduction: SoftmaxMean, dim: int) -> Tensor:
    """p_ij of a SoftmaxMean, in float64: what it is differentiated to where S is averaged under a teacher."""
    scores = dense_scores(case, torch.float64).requires_grad_()
    under = as_teacher(similarity(case, reduction.under))
    asked = [SoftmaxMean(None, under, reduction.sharpness, reduction.exclude, reduction.weights)]
    with use_backend("reference"):
        (means,) = reduce_scores(scores, asked, []) if dim == 1 else reduce_scores(scores, [], asked)
    return torch.autograd.grad(means.sum() + 0 * scores.sum(), scores)[0]


def similarity(case: Case, teacher: Teacher | None) -> Tensor:
    """S, or that of a teacher, in float64."""
    if teacher is None:
        return dense_scores(case, torch.float64)
    scale = torch.as_tensor(teacher.scale).double()
    return (scale[:, None] if scale.dim() else scale) * (teacher.x.double() @ teacher.y.double().T)


def as_teacher(matrix: Tensor) -> Teacher:
    return Teacher(matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype))


def cancelling_sizes(case: Case) -> dict[str, float]:
    """Results and gradients whose terms cancel are measured against the sum of the absolute values of their terms.

    The gradients of scale and biases pass through zero, and so does the mean of a similarity of both signs. A hinge is
    S_ij - threshold_i, its gradient y_j - y_own: little is left of either where the two are close. And the gradient
    through the softmax of a mean is A_ij - mean_i, of two numbers that are equal where the softmax is all on one pair.
    """
    requests = [(1, each) for each in case.rows] + [(0, each) for each in case.cols]
    gradient = pair_gradients(case, torch.float64).abs()
    sizes, cancelling = {}, torch.zeros_like(gradient)
    for k, ((dim, reduction), upstream) in enumerate(zip(requests, case.upstream, strict=True)):
        if isinstance(reduction, HingeSum):
            sizes[f"result {k}"] = hinge_size(case, reduction, dim)
            alone = ([reduction], []) if dim == 1 else ([], [reduction])
            cancelling += pair_gradients(Case(case.operands, *alone, [upstream]), torch.float64).abs()
        elif isinstance(reduction, SoftmaxMean):
            weights, averaged = softmax_weights(case, reduction, dim), similarity(case, reduction.of)
            sizes[f"result {k}"] = float((weights * averaged.abs()).sum(dim).norm())
            if reduction.under is None:
                means = (weights * averaged).sum(dim, keepdim=True)
                terms = weights * (averaged.abs() + means.abs()) * abs(reduction.sharpness)
                cancelling += terms * upstream.double().abs().unsqueeze(dim)
    x, y, scale = (each.double() for each in case.operands[:3])
    column = (scale[:, None] if scale.dim() else scale).abs()
    gradient = torch.maximum(gradient, cancelling)
    terms = gradient * (x @ y.T).abs()
    return sizes | {
        "dx": float((column * (cancelling @ y.abs())).norm()),
        "dy": float((cancelling.T @ (column * x.abs())).norm()),
        "dscale": float(terms.sum(1).norm() if scale.dim() else terms.sum()),
        "dbias": float(gradient.sum()),
        "drow_bias": float(gradient.sum(1).norm()),
        "dcol_bias": float(gradient.sum(0).norm()),
    }


def hinge_size(case: Case, reduction: HingeSum, dim: int) -> float:
    """The norm of sum_j w_j (|S_ij - threshold_i| + 2 |threshold_i|) over the pairs that count."""
    asked = (reduction.pair, reduction.exclude, reduction.weights)
    reductions = [reduction, CountAbove(-reduction.margin, *asked), PairScore(reduction.pair)]
    scores = dense_scores(case, torch.float64)
    with use_backend("reference"):
        hinge, count, own = reduce_scores(scores, reductions, []) if dim == 1 else reduce_scores(scores, [], reductions)
    threshold = (own - reduction.margin).abs().masked_fill(own.isinf(), 0)
    return float((hinge + 2 * threshold * count).norm())


def outcome(case: Case, operands: list[Tensor | None]) -> dict[str, Tensor]:
    """Every result and the gradient of every operand, by name."""
    leaves = [None if each is None else each.detach().requires_grad_() for each in operands]
    x, y, scale, bias, row_bias, col_bias = leaves
    rows, cols = similarity_reduce(
        x,
        y,
        scale=scale,
        bias=0.0 if bias is None else bias,
        row_bias=row_bias,
        col_bias=col_bias,
        rows=case.rows,
        cols=case.cols,
        memory_budget=case.budget,
    )
    found = {f"result {k}": result.detach() for k, result in enumerate((*rows, *cols))}
    total = objective([*rows, *cols], case) + 0 * x.sum()  # which has a graph even where no result has
    present = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    gradients = torch.autograd.grad(total, list(present.values()), materialize_grads=True)
    return found | {f"d{name}": gradient for name, gradient in zip(present, gradients, strict=True)}
