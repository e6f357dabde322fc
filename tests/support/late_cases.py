"""Random cases of late interaction: ragged, masked, tied, of every operator, and what they give."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pairtile.kernels import (
    AttentionPooling,
    LogSumExpPooling,
    SoftmaxPooling,
    TopMeanPooling,
    filip_similarity,
    maxsim,
    maxsim_pairs,
    maxsim_varlen,
    project_max,
)

#: Choices of a maximum that differ by less, relative to the largest products, may fall either way in float32.
CLOSE = 2e-5


@dataclass
class Case:
    """One call.

    Attributes:
        call: takes the operands, returns the scores.
        operands: differentiable tensors in the dtype under test.
        similarities: of float64 operands all dot products that compete in a maximum, each row with its rivals.
        names: of the operands.
        dtype: under test.
        chooses: whether there is a maximum at all.
        exact: whether the products of small integers stay integers: nothing is normalised.
        sizes: of a gradient whose terms cancel, the norm of the sums of their absolute values.
    """

    call: Callable[..., tuple[Tensor, ...]]
    operands: list[Tensor]
    similarities: Callable[..., list[Tensor]]
    names: list[str] = field(default_factory=lambda: ["x", "y"])
    dtype: torch.dtype = torch.float32
    chooses: bool = True
    exact: bool = True
    sizes: dict[str, float] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> list[Tensor]:
        return [each.to(dtype) for each in self.operands]

    def is_clear(self) -> bool:
        """Whether every maximum is ahead of its rivals by more than rounding, or equal to them exactly."""
        for scores in self.similarities(*self.to(torch.float64)):
            largest = scores.sort(-1, descending=True).values
            gaps = (largest[..., :1] - largest[..., 1:]).masked_fill(largest[..., 1:].isinf(), torch.inf)
            size = scores[scores.isfinite()].abs().max() if scores.isfinite().any() else 1.0
            if ((gaps > 0) & (gaps < CLOSE * size)).any():
                return False
        return True


def outcome(case: Case, operands: list[Tensor]) -> dict[str, Tensor]:
    """The scores and the gradient of every operand, by name, for fixed upstream gradients."""
    leaves = [each.detach().requires_grad_() for each in operands]
    scores = case.call(*leaves)
    total = sum(
        (each.masked_fill(each.isinf(), 0) * upstream.to(each.dtype)).sum()
        for each, upstream in zip(scores, upstreams(scores), strict=True)
    )
    gradients = torch.autograd.grad(total + 0 * leaves[0].sum(), leaves, materialize_grads=True)
    found = {f"scores {k}": each.detach() for k, each in enumerate(scores)}
    return found | {f"d{name}": each for name, each in zip(case.names, gradients, strict=True)}


def upstreams(scores: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the scores, the same for the same shapes."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(each.shape, generator=generator) for each in scores]


def random_case(family: str, seed: int) -> Case:
    """A case of "maxsim", "filip", "soft" or "project"; the same for the same seed."""
    for attempt in range(100):
        choose = random.Random(1000 * seed + attempt)
        torch.manual_seed(1000 * seed + attempt)
        case = _FAMILIES[family](choose)
        if not case.chooses or case.is_clear():
            return case
    raise AssertionError(f"{family} {seed}: no case without close rivals")


def integer_case(family: str, seed: int) -> Case:
    """A case over small integers with many equal tokens, whose products every dtype has exactly."""
    case = next(each for k in range(100) if (each := random_case(family, 100 * seed + k)).exact)
    for operand in case.operands:
        tokens = torch.randint(-2, 3, (operand.shape[:-1].numel(), operand.shape[-1]))
        if len(tokens) > 2:
            tokens[torch.randint(len(tokens), (len(tokens) // 2,))] = tokens[
                torch.randint(len(tokens), (len(tokens) // 2,))
            ]
        operand.copy_(tokens.view(operand.shape))
    return case


def _length(choose: random.Random) -> int:
    return choose.choice([1, 1, 2, 3, 5, 8, 13, 17, 31, 33])


def _dtype(choose: random.Random) -> torch.dtype:
    return choose.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])


def _width(choose: random.Random) -> int:
    return choose.choice([1, 7, 8, 16, 33, 64, 130]) if choose.random() > 0.05 else choose.choice([257, 600, 1024])


def _tokens(choose: random.Random, *shape: int, dtype: torch.dtype) -> Tensor:
    scale = choose.choice([1e-3, 0.3, 1.0, 1.0, 30.0])
    return (torch.randn(shape) * scale).to(dtype)


def _mask(choose: random.Random, *shape: int) -> Tensor | None:
    kind = choose.choice(["none", "holes", "tail", "tail", "empty"])
    if kind == "none":
        return None
    if kind == "tail":
        return torch.arange(shape[-1]) < torch.randint(
            0 if choose.random() < 0.3 else 1, shape[-1] + 1, (*shape[:-1], 1)
        )
    return torch.rand(shape) < (0.6 if kind == "holes" else 0.15)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _max_case(choose: random.Random) -> Case:
    form, dtype, width = choose.choice(["all", "all", "candidates", "pairs", "varlen"]), _dtype(choose), _width(choose)
    n, m, lx, ly = choose.randint(1, 6), choose.randint(1, 6), _length(choose), _length(choose)
    options: dict[str, Any] = {"aggregate": choose.choice(["sum", "mean"]), "memory_budget": _budget(choose)}
    if dtype == torch.float32:
        options["normalize"] = choose.random() < 0.2 and width > 1
    if form == "varlen":
        return _varlen_case(choose, n, m, width, dtype, options)
    shape = {"all": (m, ly, width), "candidates": (n, m, ly, width), "pairs": (n, ly, width)}[form]
    q, d = _tokens(choose, n, lx, width, dtype=dtype), _tokens(choose, *shape, dtype=dtype)
    q_mask, d_mask = _mask(choose, n, lx), _mask(choose, *shape[:-1])
    operator = maxsim_pairs if form == "pairs" else maxsim
    if form == "all" and choose.random() < 0.3:
        q = q.transpose(0, 1).contiguous().transpose(0, 1)  # any strides

    def similarities(q: Tensor, d: Tensor) -> list[Tensor]:
        if options.get("normalize"):
            q, d = q / q.norm(dim=-1, keepdim=True), d / d.norm(dim=-1, keepdim=True)
        if form == "all":
            return [_masked(torch.einsum("ipd,jrd->ipjr", q, d), None if d_mask is None else d_mask[None, None])]
        if form == "pairs":
            return [_masked(q @ d.transpose(1, 2), None if d_mask is None else d_mask[:, None])]
        return [_masked(torch.einsum("ipd,ikrd->ipkr", q, d), None if d_mask is None else d_mask[:, None])]

    return Case(
        lambda q, d: (operator(q, d, q_mask, d_mask, **options),),
        [q, d],
        similarities,
        dtype=dtype,
        exact=not options.get("normalize"),
    )


def _varlen_case(
    choose: random.Random, n: int, m: int, width: int, dtype: torch.dtype, options: dict[str, Any]
) -> Case:
    lengths = [[choose.choice([0, 1, 2, 5, 9, 20]) for _ in range(count)] for count in (n, m)]
    bounds = [torch.tensor([0, *each]).cumsum(0) for each in lengths]
    q, d = (_tokens(choose, int(each[-1]), width, dtype=dtype) for each in bounds)

    def similarities(q: Tensor, d: Tensor) -> list[Tensor]:
        if options.get("normalize"):
            q, d = q / q.norm(dim=-1, keepdim=True), d / d.norm(dim=-1, keepdim=True)
        return [q @ part.T for part in d.split(lengths[1]) if len(part) and len(q)]

    return Case(
        lambda q, d: (maxsim_varlen(q, bounds[0], d, bounds[1], **options),),
        [q, d],
        similarities,
        dtype=dtype,
        exact=not options.get("normalize"),
    )


def _budget(choose: random.Random) -> int | None:
    """Sometimes too little to keep anything from the forward to the backward."""
    return choose.choice([None, None, 1 << 16, 64])


def _filip_case(choose: random.Random) -> Case:
    dtype, width = _dtype(choose), _width(choose)
    n, m, lx, ly = choose.randint(1, 6), choose.randint(1, 6), _length(choose), _length(choose)
    x, y = _tokens(choose, n, lx, width, dtype=dtype), _tokens(choose, m, ly, width, dtype=dtype)
    x_mask, y_mask = _mask(choose, n, lx), _mask(choose, m, ly)
    budget = _budget(choose)

    def call(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return filip_similarity(x, y, x_mask, y_mask, memory_budget=budget)

    def similarities(x: Tensor, y: Tensor) -> list[Tensor]:
        scores = torch.einsum("ipd,jrd->ijpr", x, y)
        return [
            _masked(scores, None if y_mask is None else y_mask[None, :, None]),
            _masked(scores.transpose(2, 3), None if x_mask is None else x_mask[:, None, None]),
        ]

    return Case(call, [x, y], similarities, dtype=dtype)


def _soft_case(choose: random.Random) -> Case:
    dtype, width = _dtype(choose), _width(choose)
    n, m, lx, ly = choose.randint(1, 5), choose.randint(1, 5), _length(choose), _length(choose)
    # Scores of any width of about 1, and temperatures that make the softmax flat, usual, and nearly a maximum.
    x, y = ((torch.randn(count, length, width) / width**0.25).to(dtype) for count, length in ((n, lx), (m, ly)))
    x_mask, y_mask, temperature = _mask(choose, n, lx), _mask(choose, m, ly), choose.choice([0.07, 0.5, 3.0])
    kind = choose.choice(
        [SoftmaxPooling, SoftmaxPooling, LogSumExpPooling, LogSumExpPooling, AttentionPooling, TopMeanPooling]
    )
    pooling = TopMeanPooling(choose.randint(1, 4)) if kind is TopMeanPooling else kind(temperature)
    both, budget = choose.random() < 0.5, _budget(choose)

    def call(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if both:
            return filip_similarity(x, y, x_mask, y_mask, pooling=pooling, memory_budget=budget)
        return (maxsim(x, y, x_mask, y_mask, pooling=pooling, memory_budget=budget),)

    def similarities(x: Tensor, y: Tensor) -> list[Tensor]:
        scores = torch.einsum("ipd,jrd->ijpr", x, y)
        return [scores, scores.transpose(2, 3)]

    case = Case(call, [x, y], similarities, dtype=dtype, chooses=kind is TopMeanPooling)
    if kind is SoftmaxPooling:
        case.sizes = _sizes_of_soft_gradients(case, x_mask, y_mask, temperature)
    return case


def _sizes_of_soft_gradients(
    case: Case, x_mask: Tensor | None, y_mask: Tensor | None, temperature: float
) -> dict[str, float]:
    """The weight of a product is p (1 + (s - mean) / t): near the maximum of a sharp softmax little is left of s - mean."""
    x, y = case.to(torch.float64)
    masks = [
        torch.ones(each.shape[:2], dtype=torch.bool) if mask is None else mask
        for each, mask in ((x, x_mask), (y, y_mask))
    ]
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    for turned, upstream in enumerate(upstreams(case.call(x, y))):
        own, other = (y, x) if turned else (x, y)
        scores = torch.einsum("ipd,jrd->ijpr", own, other)
        allowed = masks[1 - turned][None, :, None] & masks[turned][:, None, :, None]
        p = scores.div(temperature).masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
        mean = (p * scores).sum(-1, keepdim=True)
        weights = p * (1 + (scores.abs() + mean.abs()) / temperature)
        weights = weights * (upstream.T if turned else upstream).abs()[:, :, None, None]
        of_own, of_other = (dy, dx) if turned else (dx, dy)
        of_own += torch.einsum("ijpr,jrd->ipd", weights, other.abs())
        of_other += torch.einsum("ijpr,ipd->jrd", weights, own.abs())
    return {"dx": float(dx.norm()), "dy": float(dy.norm())}


def _project_case(choose: random.Random) -> Case:
    dtype, width = _dtype(choose), _width(choose)
    count, length, columns = choose.randint(1, 6), _length(choose), choose.choice([1, 3, 17, 64, 150])
    hidden, weight = _tokens(choose, count, length, width, dtype=dtype), _tokens(choose, columns, width, dtype=dtype)
    mask, bias, budget = _mask(choose, count, length), torch.randn(columns), _budget(choose)

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (project_max(hidden, weight, bias, mask, memory_budget=budget),)

    def similarities(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        return [_masked((hidden @ weight.T).transpose(1, 2), None if mask is None else mask[:, None])]

    return Case(call, [hidden, weight], similarities, ["hidden", "weight"], dtype=dtype)


_FAMILIES = {"maxsim": _max_case, "filip": _filip_case, "soft": _soft_case, "project": _project_case}
