"""What matchings ask of the similarities of a batch's tokens, sample by sample; the similarities themselves are never stored."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import select_backend
from ..build_cuda import with_cuda
from ..contrastive.arguments import checked_budget
from ..contrastive.compiled import define


class Partners(enum.IntEnum):
    """Which rows of y a row i of x may choose."""

    ALL = 0
    OTHERS = 1  #: all but row i; y is x, and the product of two rows has the same bits both ways
    LATER = 2  #: rows after i; y is x


class Similarities(NamedTuple):
    """A backend.

    Attributes:
        best_partners: (x [B, Na, C], y [B, Nb, C], x_keep bool [B, Na] or None, y_keep bool [B, Nb] or None, partners,
            budget) -> (largest dot product of each row of x with the rows of y that it may choose, float32 [B, Na], -inf
            where there is none or the row does not count; their indices int64 [B, Na], the lowest of equal ones, 0 where
            there is none).
        energies: (x [B, N, C], margin, alpha, budget) -> float32 [B, N], the mean over j of f(<x_i, x_j>) with f(s) = s -
            margin where that is not negative, else alpha (exp(s - margin) - 1).
        bipartite: (metric [B, N, C], r, protected, class_token, distill_token) -> int64 (kept [B, N - r], sources [B, r],
            places [B, r]), what `tome.bipartite_matching` makes of `best_partners`, at once; None: it is made of that.
        select: (best and partner [B, ceil(N / 2)] of `best_partners` for the tokens at even positions, N, r, protected,
            class_token, distill_token) -> (kept, sources, places), what `tome.matched` makes of them; None: torch sorts.
        most_tokens: the largest N that `select` takes.
    """

    best_partners: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, int, int], tuple[Tensor, Tensor]]
    energies: Callable[[Tensor, float, float, int], Tensor]
    bipartite: Callable[[Tensor, int, int, bool, bool], tuple[Tensor, Tensor, Tensor]] | None = None
    select: Callable[[Tensor, Tensor, int, int, int, bool, bool], tuple[Tensor, Tensor, Tensor]] | None = None
    most_tokens: float = math.inf


def _samples(batch: int, similarities: int, itemsize: int, budget: int) -> int:
    """How many samples at a time have their similarities, and a copy of them, within the budget."""
    return max(1, min(batch, budget // (3 * itemsize * max(1, similarities))))


def _wide(tokens: Tensor) -> Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def _best_partners(
    x: Tensor, y: Tensor, x_keep: Tensor | None, y_keep: Tensor | None, partners: int, budget: int
) -> tuple[Tensor, Tensor]:
    count, others = x.shape[1], y.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    best = torch.full(x.shape[:2], -torch.inf, dtype=dtype, device=x.device)
    index = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    if not others:
        return best, index
    at = torch.arange(others, device=x.device)
    barred = {
        Partners.ALL: None,
        Partners.OTHERS: at == torch.arange(count, device=x.device)[:, None],
        Partners.LATER: at <= torch.arange(count, device=x.device)[:, None],
    }[Partners(partners)]
    step = _samples(len(x), count * others, dtype.itemsize, budget)
    for first in range(0, len(x), step):
        part = slice(first, first + step)
        scores = _wide(x[part]) @ _wide(y[part]).transpose(1, 2)
        if partners == Partners.OTHERS:
            # Two tokens that are each other's best have one largest similarity, whatever order a product adds up in.
            scores = torch.maximum(scores, scores.transpose(1, 2))
        if barred is not None:
            scores = scores.masked_fill_(barred, -torch.inf)
        if y_keep is not None:
            scores = scores.masked_fill_(~y_keep[part].unsqueeze(1), -torch.inf)
        best[part], index[part] = scores.max(-1)
    if x_keep is not None:
        best = best.masked_fill(~x_keep, -torch.inf)
    return best, index.masked_fill(best == -torch.inf, 0)


def _energies(x: Tensor, margin: float, alpha: float, budget: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    found = torch.empty(x.shape[:2], dtype=dtype, device=x.device)
    step = _samples(len(x), x.shape[1] ** 2, dtype.itemsize, budget)
    for first in range(0, len(x), step):
        part = _wide(x[first : first + step])
        found[first : first + step] = F.elu(part @ part.transpose(1, 2) - margin, alpha=alpha).mean(-1)
    return found


TORCH = Similarities(_best_partners, _energies)
#: "cpp" and "triton" where they have kernels of their own, "cuda" where its operators take triton's place.
SIMILARITIES: dict[str, Similarities] = {"torch": TORCH}


def _serving(backend: str, x: Tensor) -> Similarities:
    return TORCH if x.dtype == torch.float64 else SIMILARITIES.get(with_cuda(backend, x.device), TORCH)


@torch.no_grad()
def best_partners(
    x: Tensor,
    y: Tensor,
    *,
    x_keep: Tensor | None = None,
    y_keep: Tensor | None = None,
    partners: Partners = Partners.ALL,
) -> tuple[Tensor, Tensor]:
    """As `Similarities.best_partners`; float64 results for float64 tokens."""
    backend, _ = select_backend(x.device)
    given = x, y, x_keep, y_keep, int(partners), checked_budget(None, backend)
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():
            best, index = _best_partners_op(*given, backend)
            return best, index
        return _serving(backend, x).best_partners(*given)


@torch.no_grad()
def energies(x: Tensor, margin: float, alpha: float) -> Tensor:
    """As `Similarities.energies`; float64 for float64 tokens."""
    backend, _ = select_backend(x.device)
    budget = checked_budget(None, backend)
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():
            return _energies_op(x, margin, alpha, budget, backend)  # type: ignore[no-any-return]
        return _serving(backend, x).energies(x, margin, alpha, budget)


@torch.no_grad()
def bipartite(
    metric: Tensor, r: int, protected: int, class_token: bool, distill_token: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `Similarities.bipartite`, if the backend that serves this metric has it."""
    backend, _ = select_backend(metric.device)
    found = _serving(backend, metric).bipartite
    if found is None:
        return None
    if torch.compiler.is_compiling():
        kept, sources, places = _bipartite_op(metric, r, protected, class_token, distill_token, backend)
        return kept, sources, places
    return found(metric, r, protected, class_token, distill_token)


def select_pairs(
    best: Tensor, partner: Tensor, tokens: int, r: int, protected: int, class_token: bool, distill_token: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `Similarities.select`, if the backend that serves has it for so many tokens."""
    backend, _ = select_backend(best.device)
    serving = _serving(backend, best)
    if serving.select is None or tokens > serving.most_tokens:
        return None
    return serving.select(best, partner, tokens, r, protected, class_token, distill_token)


def _best_operator(
    x: Tensor,
    y: Tensor,
    x_keep: Tensor | None,
    y_keep: Tensor | None,
    partners: int,
    budget: int,
    backend: str,
) -> list[Tensor]:
    return list(_serving(backend, x).best_partners(x, y, x_keep, y_keep, partners, budget))


def _fake_best(x: Tensor, *_: object) -> list[Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=torch.int64)]


def _bipartite_operator(
    metric: Tensor, r: int, protected: int, class_token: bool, distill_token: bool, backend: str
) -> list[Tensor]:
    found = _serving(backend, metric).bipartite
    assert found is not None
    return list(found(metric, r, protected, class_token, distill_token))


def _fake_bipartite(metric: Tensor, r: int, *_: object) -> list[Tensor]:
    batch, tokens, _width = metric.shape
    return [metric.new_empty(batch, count, dtype=torch.int64) for count in (tokens - r, r, r)]


_best_partners_op = define(
    "best_partners",
    _best_operator,
    _fake_best,
    "(Tensor x, Tensor y, Tensor? x_keep, Tensor? y_keep, int partners, int budget, str backend) -> Tensor[]",
)
_energies_op = define(
    "token_energies",
    lambda x, margin, alpha, budget, backend: _serving(backend, x).energies(x, margin, alpha, budget),
    lambda x, *_: x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32)),
    "(Tensor x, float margin, float alpha, int budget, str backend) -> Tensor",
)
_bipartite_op = define(
    "bipartite_matching",
    _bipartite_operator,
    _fake_bipartite,
    "(Tensor metric, int r, int protected, bool class_token, bool distill_token, str backend) -> Tensor[]",
)
