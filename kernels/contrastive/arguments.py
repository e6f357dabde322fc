"""The operator's tensors: checked, with errors that say what to do, and brought to one dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ..dtypes import FEATURE_DTYPES as FEATURE_DTYPES

#: Bytes of working memory when the caller names none.
DEFAULT_MEMORY_BUDGET = 64 * 2**20
#: The same on the triton backend: a hundredth of a GPU's memory, and the panels of a batch of 65,536 are few.
GPU_MEMORY_BUDGET = 512 * 2**20

_allowed: ContextVar[int | None] = ContextVar("pairtile_memory_budget", default=None)


def check_features(x: Tensor, y: Tensor, x_name: str = "x", y_name: str = "y") -> None:
    """Both are [rows, features], of one width, on one device."""
    for name, features in ((x_name, x), (y_name, y)):
        if not isinstance(features, Tensor) or features.dtype not in FEATURE_DTYPES:
            given = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name} is {given}: expected a float16, bfloat16, float32 or float64 tensor")
        if features.dim() != 2:
            raise ValueError(f"{name} has shape {list(features.shape)}: expected two dimensions, [rows, features]")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{x_name} {list(x.shape)} and {y_name} {list(y.shape)} differ in their last dimension: both must be embeddings of "
            "one space"
        )
    if x.device != y.device:
        raise ValueError(f"{x_name} is on {x.device}, {y_name} on {y.device}: move one of them")


def factor(
    value: float | Tensor, name: str, dtype: torch.dtype, device: torch.device, rows: int | None = None
) -> Tensor:
    """A scalar as a tensor of shape []; if `rows` is given, one number for each row is taken too, as [rows]."""
    if not isinstance(value, Tensor):
        # not torch.tensor: on a GPU that copies from the host and waits for it
        return torch.full((), float(value), dtype=dtype, device=device)
    shapes = ((), (1,)) if rows is None else ((), (1,), (rows,), (rows, 1))
    if value.shape not in shapes or not value.is_floating_point():
        expected = "[] or [1]" if rows is None else f"[], [1], or [{rows}] for a temperature of each row's own"
        raise ValueError(
            f"{name} is a {value.dtype} tensor of shape {list(value.shape)}: expected a floating point tensor of "
            f"shape {expected}"
        )
    if value.dim():
        value = value.reshape(() if value.shape == (1,) else -1)
    return _converted(value, dtype, device)


def vector(value: Tensor, name: str, length: int, axis: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A floating point tensor [length], one number for each of `axis` ("row of x", say)."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != (length,):
        raise ValueError(
            f"{name} is {described(value)}: expected a floating point tensor of shape [{length}], one for each {axis}"
        )
    return _converted(value, dtype, device)


def check_indices(value: Tensor, name: str, length: int, axis: str, device: torch.device) -> None:
    """An int64 tensor [length] on the features' device."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.shape != (length,):
        raise ValueError(
            f"{name} is {described(value)}: expected an int64 tensor of shape [{length}], one for each {axis}"
        )
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the features are on {device}: move it there")


def check_targets(columns: Tensor, n: int, m: int, device: torch.device) -> None:
    """The columns of a `Target`: int64 [n], each below m."""
    check_indices(columns, "Target.columns", n, "row of x", device)
    if torch.compiler.is_compiling() or device.type != "cpu":
        # Checked where the tensor is, without waiting for it.
        torch._assert_async((columns < m).all(), f"Target.columns: an entry is not below {m}, the rows of y")
    elif n and (largest := int(columns.max())) >= m:
        raise ValueError(
            f"Target.columns holds {largest}, but y has {m} rows: expected a column of S, or a negative number for a "
            "row without a pair"
        )


def checked_budget(memory_budget: int | None, backend: str = "cpp", similarities: int = 1) -> int:
    """The bytes of working memory that the caller allows, here or by `use_memory_budget`; or the backend's default.

    That of `cpp`, which keeps scores for the backward in it, is for each similarity that is swept.
    """
    if memory_budget is None:
        memory_budget = _allowed.get()
    if memory_budget is None:
        if backend == "triton":
            return GPU_MEMORY_BUDGET
        return DEFAULT_MEMORY_BUDGET * (similarities if backend == "cpp" else 1)
    return _positive(memory_budget)


def _positive(memory_budget: int) -> int:
    if memory_budget <= 0:
        raise ValueError(f"memory_budget={memory_budget}: expected a positive number of bytes")
    return memory_budget


@contextmanager
def use_memory_budget(memory_budget: int) -> Iterator[None]:
    """Let every operator and loss called inside the block work in so many bytes, unless the call names its own.

    Less memory is slower: on the CPU fewer scores are kept from the forward to the backward. Blocks nest, the innermost
    wins, and each thread or asyncio task has its own choice.

    Args:
        memory_budget: bytes beside the inputs, the results and their gradients, as in `similarity_reduce`.

    Raises:
        ValueError: a budget that is not positive.
    """
    token = _allowed.set(_positive(memory_budget))
    try:
        yield
    finally:
        _allowed.reset(token)


def described(value: object) -> str:
    return f"a {value.dtype} tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _converted(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if value.dtype == dtype and value.device == device:
        return value
    return value.to(device=device, dtype=dtype)


def _torch_rounds() -> bool:
    """Whether torch may round the operands of its float32 products, by any of its three switches."""
    try:
        # torch 2.9 and later; the older switches set it as well, and asking them after this one is an error.
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    except AttributeError:
        return torch.get_float32_matmul_precision() != "highest"


# torch.compile cannot trace it; it asks once, and compiles again when that setting changes.
_torch_rounds._dynamo_marked_constant = True  # type: ignore[attr-defined]


def checked_precision(precision: str | None, backend: str) -> str:
    """How the backend is to multiply float32 features: what the caller asks for, or what he told torch.

    "ieee" is the accumulation dtype's own arithmetic. The products of the `torch` and `reference` backends are torch's,
    which obey torch's setting alone; those of `cpp` are always exact.
    """
    offered = ("ieee", "tf32", "tf32x3") if backend == "triton" else ("ieee",)
    if precision is None:
        return "tf32" if backend == "triton" and _torch_rounds() else "ieee"
    if precision not in offered:
        names = ", ".join(f'"{each}"' for each in offered)
        raise ValueError(
            f"precision={precision!r}: the {backend} backend offers {names} only in this version (None: its default)"
        )
    if backend in ("torch", "reference") and _torch_rounds():
        raise ValueError(
            'precision="ieee", but torch may round the operands of its products: '
            'torch.set_float32_matmul_precision("highest") forbids it'
        )
    return precision
