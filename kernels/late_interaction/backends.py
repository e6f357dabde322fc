"""What a backend with kernels of its own gives to the operators of this package, and the autograd around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contrastive.autograd import differentiated_once
from ..contrastive.compiled import define
from .blocks import SETS, flat_sets, split_sets
from .formulas import decode_pooling, encode_pooling
from .pooling import LogSumExpPooling, MaxPooling, Pooling, SoftmaxPooling
from .token_sets import TokenSets


class Request(NamedTuple):
    """What is asked of all pairs of sets (x_i, y_j), or of x_i and its candidates.

    Attributes:
        pooling: over the other side's tokens.
        candidates: 0 for all pairs; else y holds N * candidates sets, those of x_i from i * candidates on.
        rows: the sums over x's tokens of what each pools of y.
        cols: the sums over y's tokens of what each pools of x.
        budget: bytes of working memory.
        precision: how float32 tokens are multiplied: "ieee", "tf32", "tf32x3".
    """

    pooling: Pooling
    candidates: int
    rows: bool
    cols: bool
    budget: int
    precision: str = "ieee"

    @property
    def outputs(self) -> int:
        return int(self.rows) + int(self.cols)


class Kernels(NamedTuple):
    """A backend.

    Attributes:
        name: "cpp" or "triton".
        forward: (x, y, request, keep) -> (scores, kept). Scores are [N, M] or [N, candidates] in float32, of rows before
            those of columns. `kept`, if `keep` is set, has for each of them what `empty_kept` says, else it is empty.
        backward: (x, y, request, kept, upstream gradients of the scores, which of x and y are wanted) -> gradients of the
            tokens [T, D] in their dtype, zero for tokens that do not count; None where not wanted. With nothing kept it
            finds it again.
    """

    name: str
    forward: Callable[[TokenSets, TokenSets, Request, bool], tuple[list[Tensor], list[Tensor]]]
    backward: Callable[
        [TokenSets, TokenSets, Request, list[Tensor], list[Tensor], tuple[bool, bool]],
        tuple[Tensor | None, Tensor | None],
    ]


class Projection(NamedTuple):
    """A backend with `project_max` of its own.

    Attributes:
        forward: (hidden, weight, budget, precision) -> (maxima [B, V], positions of the chosen tokens in their sample
            [B, V], int32, -1 where a sample has none).
        backward: (hidden, weight, positions, upstream gradient [B, V], budget, which of hidden and weight are wanted) ->
            gradients [B L, D] and [V, D] in their dtypes, None where not wanted.
    """

    forward: Callable[[TokenSets, Tensor, int, str], tuple[Tensor, Tensor]]
    backward: Callable[[TokenSets, Tensor, Tensor, Tensor, int, tuple[bool, bool]], tuple[Tensor | None, Tensor | None]]


#: Poolings that kernels serve; the others are served by the torch backend.
SERVED = (MaxPooling, SoftmaxPooling, LogSumExpPooling)


def empty_kept(x: TokenSets, y: TokenSets, request: Request) -> list[Tensor]:
    """What the backward needs of each score matrix, unfilled.

    Of rows: [s, candidates or M, Tx], for each partner set and each row of x; of columns: [s, N, Ty], or [s, 1, Ty] with
    candidates. A max keeps (s = 1) the int32 position of the chosen token in its set, -1 where there is none; a softmax
    (s = 2) the float32 log-sum-exp of similarity / temperature and the pooled number; a log-sum-exp (s = 1) the former.
    """
    depth = 2 if isinstance(request.pooling, SoftmaxPooling) else 1
    dtype = torch.int32 if isinstance(request.pooling, MaxPooling) else torch.float32
    shapes = []
    if request.rows:
        shapes.append((depth, request.candidates or y.count, x.tokens.shape[0]))
    if request.cols:
        shapes.append((depth, 1 if request.candidates else x.count, y.tokens.shape[0]))
    return [x.tokens.new_empty(shape, dtype=dtype) for shape in shapes]


def kept_bytes(x: TokenSets, y: TokenSets, request: Request) -> int:
    depth = 2 if isinstance(request.pooling, SoftmaxPooling) else 1
    of_rows = (request.candidates or y.count) * x.tokens.shape[0] * request.rows
    of_cols = (1 if request.candidates else x.count) * y.tokens.shape[0] * request.cols
    return 4 * depth * (of_rows + of_cols)


def differentiable(kernels: Kernels, x: TokenSets, y: TokenSets, request: Request) -> tuple[Tensor, ...]:
    """The scores by a backend's kernels."""
    if not torch.is_grad_enabled():
        return tuple(kernels.forward(x, y, request, False)[0])
    found: tuple[Tensor, ...] = _Scores.apply(x.tokens, y.tokens, x, y, kernels, request)
    return found


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens_x: Tensor, tokens_y: Tensor, x: TokenSets, y: TokenSets, kernels: Kernels, request: Request
    ) -> Any:
        # What fits in the budget is kept; otherwise the backward finds it again.
        keep = any(ctx.needs_input_grad) and kept_bytes(x, y, request) <= request.budget
        scores, kept = kernels.forward(x, y, request, keep)
        ctx.sets = x.with_tokens(tokens_x[:0]), y.with_tokens(tokens_y[:0])
        ctx.kernels, ctx.request = kernels, request
        ctx.save_for_backward(tokens_x, tokens_y, *x.places, *y.places, *kept)
        return tuple(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens_x, tokens_y, *saved = ctx.saved_tensors
        x, y, kept = ctx.sets[0].at(tokens_x, saved[:3]), ctx.sets[1].at(tokens_y, saved[3:6]), saved[6:]
        with torch.autocast(tokens_x.device.type, enabled=False), torch.no_grad():
            found = ctx.kernels.backward(x, y, ctx.request, kept, list(grads), ctx.needs_input_grad[:2])
        dx, dy = differentiated_once(ctx.kernels.name, found, [tokens_x, tokens_y, *grads])
        return dx, dy, None, None, None, None


def define_operators(kernels: Kernels) -> Any:
    """`<name>_token_scores` and its backward, for code that torch.compile traces: what the backward needs is always kept."""

    def asked(pooling: list[float], candidates: int, sides: list[bool], budget: int, precision: str) -> Request:
        return Request(decode_pooling(*pooling), candidates, sides[0], sides[1], budget, precision)

    def forward(*arguments: Any) -> list[Tensor]:
        x, y, *given = split_sets(arguments)
        scores, kept = kernels.forward(x, y, asked(*given), True)
        return [*scores, *kept]

    def fake_forward(*arguments: Any) -> list[Tensor]:
        x, y, *given = split_sets(arguments)
        request = asked(*given)
        shape = x.count, request.candidates or y.count
        scores = [x.tokens.new_empty(shape, dtype=torch.float32) for _ in range(request.outputs)]
        return [*scores, *empty_kept(x, y, request)]

    def backward(*arguments: Any) -> list[Tensor]:
        x, y, *given, kept, grads, wanted = split_sets(arguments)
        with torch.autocast(x.tokens.device.type, enabled=False):  # who calls backward may have it on
            found = kernels.backward(x, y, asked(*given), list(kept), list(grads), tuple(wanted))
        return [x.tokens.new_empty(0) if each is None else each.contiguous() for each in found]

    def fake_backward(*arguments: Any) -> list[Tensor]:
        x, y, *_, wanted = split_sets(arguments)
        return [
            each.tokens.new_empty(each.tokens.shape if want else (0,))
            for each, want in zip((x, y), wanted, strict=True)
        ]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        x, y, *ctx.request = split_sets(inputs)
        ctx.rest = x.longest, x.padded, y.longest, y.padded
        outputs = asked(*ctx.request).outputs
        ctx.outputs = outputs
        ctx.save_for_backward(
            x.tokens, x.starts, x.lengths, x.keep, y.tokens, y.starts, y.lengths, y.keep, *output[outputs:]
        )

    def differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        sets = (*saved[:4], *ctx.rest[:2], *saved[4:8], *ctx.rest[2:])
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[6]]
        found = backward_op(*sets, *ctx.request, list(saved[8:]), list(grads[: ctx.outputs]), wanted)
        dx, dy = (each if want else None for each, want in zip(found, wanted, strict=True))
        return dx, *[None] * 5, dy, *[None] * 5, *[None] * len(ctx.request)

    schema = f"{SETS}, float[] pooling, int candidates, bool[] sides, int budget, str precision"
    forward_op = define(f"{kernels.name}_token_scores", forward, fake_forward, f"({schema}) -> Tensor[]")
    backward_op = define(
        f"{kernels.name}_token_scores_backward",
        backward,
        fake_backward,
        f"({schema}, Tensor[] kept, Tensor[] grads, bool[] wanted) -> Tensor[]",
    )
    forward_op.register_autograd(differentiate, setup_context=setup)
    return forward_op


def traced(operator: Any, x: TokenSets, y: TokenSets, request: Request) -> tuple[Tensor, ...]:
    """The scores, from an operator of `define_operators`."""
    given = list(encode_pooling(request.pooling)), request.candidates, [request.rows, request.cols]
    found = operator(*flat_sets(x), *flat_sets(y), *given, request.budget, request.precision)
    return tuple(found[: request.outputs])
