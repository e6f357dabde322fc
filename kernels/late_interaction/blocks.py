"""Any dense formula over all pairs of token sets, block by block: the torch backend, and whatever has no kernel of its own.

The tensor [N, M, Lx, Ly] exists for one block at a time, in the forward and again in the backward, which runs the formula
once more to differentiate it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..contrastive.autograd import differentiated_once
from ..contrastive.compiled import define
from .formulas import FORMULAS, Block
from .token_sets import TokenSets

# What autograd keeps of a block beside its similarities, in tensors of that size.
_COPIES = 6


def over_pairs(
    name: str,
    x: TokenSets,
    y: TokenSets,
    *,
    numbers: Sequence[float] = (),
    shared: Sequence[Tensor] = (),
    candidates: int = 0,
    outputs: int = 1,
    budget: int,
    copies: int = _COPIES,
) -> tuple[Tensor, ...]:
    """The scores of all pairs by the formula of that name, in bounded memory, differentiable in the tokens and in `shared`.

    Args:
        name: of `formulas.FORMULAS`.
        x: N sets.
        y: M sets, or N * candidates, set i * candidates + k being candidate k of x's set i.
        numbers: for the formula, the same for every block.
        shared: float tensors for the formula, the same for every block.
        candidates: 0 for all pairs.
        outputs: how many score matrices the formula gives.
        budget: bytes for a block and what its backward keeps.
        copies: how many tensors of a block's [n, m, Lx, Ly] that is.

    Returns:
        Score matrices [N, M] or [N, candidates], float32 (float64 for float64 tokens).
    """
    request = (name, [float(each) for each in numbers], candidates, outputs, max(1, budget // copies))
    if torch.compiler.is_compiling():
        return tuple(_traced(*flat_sets(x), *flat_sets(y), list(shared), *request))
    found: tuple[Tensor, ...] = _OverPairs.apply(x.tokens, y.tokens, x, y, request, *shared)
    return found


def dense(
    name: str,
    x: TokenSets,
    y: TokenSets,
    *,
    numbers: Sequence[float] = (),
    shared: Sequence[Tensor] = (),
    candidates: int = 0,
) -> tuple[Tensor, ...]:
    """As `over_pairs`, in one block and by plain autograd: the reference."""
    tokens_x, tokens_y = _wide(x.tokens), _wide(y.tokens)
    every = slice(0, x.count), slice(0, candidates or y.count)
    return FORMULAS[name](_block(x, y, tokens_x, tokens_y, *every, candidates), numbers, shared)


def _wide(tokens: Tensor) -> Tensor:
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def _rows(sets: TokenSets, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Rows [n, L] of the matrix of tokens, and which of them count."""
    starts, lengths = sets.starts[chosen], sets.lengths[chosen]
    at = torch.arange(sets.longest, device=starts.device)
    inside = at < lengths.unsqueeze(-1)
    rows = (starts.unsqueeze(-1) + at).where(inside, 0)
    return rows, inside if sets.keep is None else inside & sets.keep[rows]


def _pad(tokens: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    if not tokens.shape[0]:
        return tokens.new_zeros(*rows.shape, tokens.shape[1])
    return tokens[rows].masked_fill(~counts.unsqueeze(-1), 0)


def _block(
    x: TokenSets, y: TokenSets, tokens_x: Tensor, tokens_y: Tensor, rows: slice, cols: slice, candidates: int
) -> Block:
    of_x, x_mask = _rows(x, rows)
    of_y, y_mask = _rows(y, _columns(y, rows, cols, candidates))
    return Block(_pad(tokens_x, of_x, x_mask), x_mask, _pad(tokens_y, of_y, y_mask), y_mask)


def _columns(y: TokenSets, rows: slice, cols: slice, candidates: int) -> Tensor:
    """Indices of sets, [1, m] or [n, m]."""
    every = torch.arange(y.count, device=y.tokens.device)
    return every[cols][None] if not candidates else every.view(-1, candidates)[rows, cols]


def _sizes(x: TokenSets, y: TokenSets, candidates: int, budget: int) -> tuple[int, int]:
    """Sets of x and of y in a block whose similarities take so many bytes; at least one pair."""
    width, itemsize = x.tokens.shape[1], 8 if x.tokens.dtype == torch.float64 else 4
    of_pair = max(1, x.longest) * max(1, y.longest)
    # Padded copies of the tokens count as well, but for one set of each.
    pairs = max(1, budget // (itemsize * (of_pair + width)))
    m = min(candidates or y.count, max(1, round((pairs * max(1, x.longest) / max(1, y.longest)) ** 0.5)), pairs)
    m = max(1, m)
    n = max(1, min(x.count, pairs // m))
    return n, max(1, min(candidates or y.count, pairs // n))


def _blocks(x: TokenSets, y: TokenSets, candidates: int, budget: int) -> list[tuple[slice, slice]]:
    n, m = _sizes(x, y, candidates, budget)
    columns = candidates or y.count
    return [
        (slice(i, min(i + n, x.count)), slice(j, min(j + m, columns)))
        for i in range(0, x.count, n)
        for j in range(0, columns, m)
    ]


def _forward(x: TokenSets, y: TokenSets, request: tuple[Any, ...], shared: Sequence[Tensor]) -> list[Tensor]:
    name, numbers, candidates, outputs, budget = request
    dtype = torch.promote_types(x.tokens.dtype, torch.float32)
    scores = [torch.empty(x.count, candidates or y.count, dtype=dtype, device=x.tokens.device) for _ in range(outputs)]
    for rows, cols in _blocks(x, y, candidates, budget):
        # In the tokens' own dtype until a block is cut out of them.
        block = _widened(_block(x, y, x.tokens, y.tokens, rows, cols, candidates))
        for found, part in zip(scores, FORMULAS[name](block, numbers, shared), strict=True):
            found[rows, cols] = part
    return scores


def _widened(block: Block) -> Block:
    return Block(_wide(block.x), block.x_mask, _wide(block.y), block.y_mask)


def _backward(
    x: TokenSets, y: TokenSets, request: tuple[Any, ...], shared: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of x's tokens, y's tokens and the shared tensors."""
    name, numbers, candidates, _, budget = request
    dx, dy = (torch.zeros_like(_empty_wide(each.tokens)) for each in (x, y))
    dshared = [torch.zeros_like(each) for each in shared]
    for rows, cols in _blocks(x, y, candidates, budget):
        of_x, x_mask = _rows(x, rows)
        of_y, y_mask = _rows(y, _columns(y, rows, cols, candidates))
        with torch.enable_grad():
            leaves = [
                _wide(_pad(x.tokens.detach(), of_x, x_mask)).requires_grad_(),
                _wide(_pad(y.tokens.detach(), of_y, y_mask)).requires_grad_(),
                *(each.detach().requires_grad_() for each in shared),
            ]
            scores = FORMULAS[name](Block(leaves[0], x_mask, leaves[1], y_mask), numbers, leaves[2:])
        upstream = [grad[rows, cols] for grad in grads]
        known = [(each, grad) for each, grad in zip(scores, upstream, strict=True) if each.requires_grad]
        found = torch.autograd.grad(
            [each for each, _ in known], leaves, [grad for _, grad in known], allow_unused=True, materialize_grads=True
        )
        # A row occurs once in a block, so that the order of these sums is that of the blocks.
        with torch.no_grad():
            dx.index_add_(0, of_x[x_mask], found[0][x_mask])
            dy.index_add_(0, of_y[y_mask], found[1][y_mask])
            for total, part in zip(dshared, found[2:], strict=True):
                total += part
    return [dx.to(x.tokens.dtype), dy.to(y.tokens.dtype), *dshared]


def _empty_wide(tokens: Tensor) -> Tensor:
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return torch.empty(tokens.shape, dtype=dtype, device=tokens.device)


class _OverPairs(torch.autograd.Function):
    """Takes the tokens, the sets that hold them, what is asked, and the shared tensors."""

    @staticmethod
    def forward(
        ctx: Any, tokens_x: Tensor, tokens_y: Tensor, x: TokenSets, y: TokenSets, request: Any, *shared: Tensor
    ) -> Any:
        ctx.sets, ctx.request = (x.with_tokens(tokens_x[:0]), y.with_tokens(tokens_y[:0])), request
        ctx.save_for_backward(tokens_x, tokens_y, *x.places, *y.places, *shared)
        return tuple(_forward(x.with_tokens(tokens_x), y.with_tokens(tokens_y), request, shared))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens_x, tokens_y, *saved = ctx.saved_tensors
        x, y, shared = ctx.sets[0].at(tokens_x, saved[:3]), ctx.sets[1].at(tokens_y, saved[3:6]), saved[6:]
        with torch.autocast(tokens_x.device.type, enabled=False), torch.no_grad():
            found = _backward(x, y, ctx.request, shared, grads)
        dx, dy, *dshared = differentiated_once("torch", found, [tokens_x, tokens_y, *shared, *grads])
        return dx, dy, None, None, None, *dshared


def flat_sets(sets: TokenSets) -> tuple[Any, ...]:
    """The fields of sets, as `SETS` names them."""
    return sets.tokens, sets.starts, sets.lengths, sets.keep, sets.longest, sets.padded


_FLAT = len(flat_sets(TokenSets(*[None] * 6)))  # type: ignore[arg-type]
#: The fields of `TokenSets` in an operator's schema, for x and y.
SETS = ", ".join(
    f"Tensor {side}, Tensor {side}_starts, Tensor {side}_lengths, Tensor? {side}_keep, SymInt {side}_longest, SymInt? {side}_padded"
    for side in ("x", "y")
)


def split_sets(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """x and y of an operator's arguments, and the rest."""
    return TokenSets(*arguments[:_FLAT]), TokenSets(*arguments[_FLAT : 2 * _FLAT]), *arguments[2 * _FLAT :]


def _operator(*arguments: Any) -> list[Tensor]:
    x, y, shared, *request = split_sets(arguments)
    return _forward(x, y, tuple(request), shared)


def _fake(*arguments: Any) -> list[Tensor]:
    x, y, _, _, _, candidates, outputs, _ = split_sets(arguments)
    dtype = torch.promote_types(x.tokens.dtype, torch.float32)
    return [x.tokens.new_empty(x.count, candidates or y.count, dtype=dtype) for _ in range(outputs)]


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside an operator, which torch calls with it switched off by more than `no_grad`."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    excluded = torch._C._dispatch_tls_local_exclude_set() - keys
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def _operator_backward(*arguments: Any) -> list[Tensor]:
    x, y, shared, *request, grads = split_sets(arguments)
    # Who calls backward may have autocast on.
    with torch.autocast(x.tokens.device.type, enabled=False), _recording():
        return _backward(x, y, tuple(request), shared, grads)


def _fake_backward(*arguments: Any) -> list[Tensor]:
    x, y, shared, *_ = split_sets(arguments)
    return [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x.tokens, y.tokens, *shared)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, y, shared, *ctx.request = split_sets(inputs)
    ctx.rest = x.longest, x.padded, y.longest, y.padded
    ctx.save_for_backward(*flat_sets(x)[:4], *flat_sets(y)[:4], *shared)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    x, y, shared = saved[:4], saved[4:8], list(saved[8:])
    found = _traced_backward(*x, *ctx.rest[:2], *y, *ctx.rest[2:], shared, *ctx.request, list(grads))
    nothing = [None] * (_FLAT - 1)
    # torch takes a list without any number for one of tensors, whose gradients are a list.
    of_request: list[Any] = [[] if each == [] else None for each in ctx.request]
    return found[0], *nothing, found[1], *nothing, list(found[2:]) or [], *of_request


_REQUEST = f"{SETS}, Tensor[] shared, str name, float[] numbers, int candidates, int outputs, int budget"
_traced = define("token_pairs", _operator, _fake, f"({_REQUEST}) -> Tensor[]")
_traced_backward = define(
    "token_pairs_backward", _operator_backward, _fake_backward, f"({_REQUEST}, Tensor[] grads) -> Tensor[]"
)
_traced.register_autograd(_differentiate, setup_context=_setup)
