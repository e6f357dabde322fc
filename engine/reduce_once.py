"""Several backwards whose gradients are averaged over ranks once: DistributedDataParallel, FSDP and DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from .errors import PairtileError


class Reduction:
    """How gradients of several chunks become one: here without ranks, they add up by themselves."""

    @staticmethod
    def of(model: Callable[..., Any]) -> Reduction:
        """What suits the model.

        Raises:
            PairtileError: a DeepSpeed engine under whose configuration gradients cannot be reduced once.
        """
        if hasattr(model, "zero_optimization_stage"):
            return _NoSync(model) if model.zero_optimization_stage() == 0 else _Coalesced(model)
        return _NoSync(model) if hasattr(model, "no_sync") else Reduction()

    def chunk(self, *, complete: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a chunk; gradients are reduced with the one that makes them complete."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class _NoSync(Reduction):
    """By the model's own ``no_sync``: DistributedDataParallel, FSDP, and a DeepSpeed engine without ZeRO."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._is_engine = hasattr(model, "zero_optimization_stage")

    def chunk(self, *, complete: bool) -> AbstractContextManager[Any]:
        return nullcontext() if complete else self._model.no_sync()

    def backward(self, loss: Tensor) -> None:
        if self._is_engine:
            self._model.backward(loss)
        else:
            loss.backward()


class _Coalesced(Reduction):
    """By DeepSpeed's ``coalesce_grad_reduction``: ZeRO 1 to 3 reduce in every backward otherwise, or refuse a second."""

    # An open block that is collected would run its exit, which reduces: a collective of this rank alone.
    _open: list[AbstractContextManager[None]] = []

    def __init__(self, engine: Any) -> None:
        if not hasattr(engine, "coalesce_grad_reduction"):
            raise PairtileError(
                "gradient caching under ZeRO 1 to 3 needs a DeepSpeed with coalesce_grad_reduction: install 0.19.8 or later"
            )
        if engine.gradient_accumulation_steps() != 1:
            raise PairtileError(
                f"gradient caching under ZeRO 1 to 3: gradient_accumulation_steps is {engine.gradient_accumulation_steps()}, "
                "expected 1; accumulate with backward(loss / batches, last=False), and one engine.step()"
            )
        self._engine = engine
        self._block: AbstractContextManager[None] | None = None

    @contextmanager
    def chunk(self, *, complete: bool) -> Iterator[None]:
        if self._block is None:
            self._block = self._engine.coalesce_grad_reduction()
            self._block.__enter__()
            self._open.append(self._block)
        yield
        # Not after an exception: ranks that have none would not take part in the reduction.
        if complete:
            self._open.remove(self._block)
            block, self._block = self._block, None
            block.__exit__(None, None, None)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
