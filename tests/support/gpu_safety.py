"""What a GPU punishes and Triton's interpreter lets pass: a sanitizer for kernels, on a machine without a GPU.

    results = gpu_safety(lambda: ...)   # calls public operators, returns tensors

runs the function under the `triton` backend three times, its grids forward, reversed and shuffled, and demands

- that every address a program loads or stores is an element of a tensor that this launch was given (elements that a
  stride leaves out do not count), and that the guard bands around every buffer come out unchanged;
- that nothing is loaded, or returned, that nobody has stored: uninitialised buffers hold a NaN of a particular pattern;
- that kernels store to buffers of `launching.empty` alone, that one program stores an element, once per instruction,
  and that no other program of the launch loads it;
- that no atomic operation runs;
- the same bits from all three orders.

Kernels must be started by `launching.run`, and what they write must come from `launching.empty`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

#: Bytes before and behind every buffer. Buffers keep their alignment to this number.
GUARD = 1024
#: Bit patterns by element size: a quiet NaN for floating point, which arithmetic never makes.
_POISON = {2: 0x7FDA, 4: 0x7FDAB5C3, 8: 0x7FDAB5C3D7E1F90B, 1: 0x5A}
_BAND = {2: 0x7FEB, 4: 0x7FEBA1C5, 8: 0x7FEBA1C5E3D7F909, 1: 0x3C}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ORDERS = ("forward", "reversed", "shuffled")
# Programs that load an element: nobody, or several; a number names the only one.
_NOBODY, _SEVERAL = -1, -2


class Buffer:
    """A storage between guard bands, and who touched which element in the present launch.

    Attributes:
        flat: all elements, bands included.
        made: whether the backend made it, uninitialised; else it is a copy of what the backend passed to a kernel.
    """

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device, *, skew: int = 0, made: bool) -> None:
        self.size = dtype.itemsize
        self.before = (GUARD + skew) // self.size
        self.flat = torch.empty(self.before + elements + GUARD // self.size, dtype=dtype, device=device)
        self.made = made
        bits = self.flat.view(_BITS[self.size])
        bits.fill_(_BAND[self.size])
        bits[self.before : self.before + elements] = _POISON[self.size] if made else _BAND[self.size]
        self.bits = bits.numpy()
        self.elements = elements
        self.start = self.flat.data_ptr()
        self.end = self.start + self.flat.numel() * self.size
        self.allowed = np.zeros(self.flat.numel(), bool)
        self.forget()

    def forget(self) -> None:
        """A launch begins."""
        self.allowed[:] = False
        self.stored_by = np.full(self.flat.numel(), _NOBODY)
        self.loaded_by = np.full(self.flat.numel(), _NOBODY)

    def allow(self, tensor: Tensor) -> None:
        offset = (tensor.data_ptr() - self.start) // self.size
        strides = [stride * self.allowed.itemsize for stride in tensor.stride()]
        np.lib.stride_tricks.as_strided(self.allowed[offset:], tuple(tensor.shape), strides)[...] = True

    def bands_changed(self) -> bool:
        bands = self.bits[: self.before], self.bits[self.before + self.elements :]
        return any((band != _BAND[self.size]).any() for band in bands)

    def uninitialised(self, at: np.ndarray) -> np.ndarray:
        return self.bits[at] == np.array(_POISON[self.size]).astype(self.bits.dtype)


class GpuSafety:
    """Call it with a function; see the module."""

    def __init__(self) -> None:
        from pairtile.kernels.contrastive.triton_kernels import launching

        self._launching = launching
        self._empty, self._run = launching.empty, launching.run
        #: (kernel's name, configuration) of every launch of the last call, one order.
        self.launches: list[tuple[str, Any]] = []
        self._order = _ORDERS[0]
        self._buffers: dict[int, Buffer] = {}
        self._present: list[Buffer] = []
        self._program = 0
        self._name = ""

    def __call__(self, function: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The tensors that `function` returns, after all checks; `function` is called three times."""
        from pairtile.kernels import use_backend

        outcomes = []
        for self._order in _ORDERS:
            self._buffers, self.launches = {}, []
            with pytest.MonkeyPatch.context() as patch, use_backend("triton"), self._interpreter(patch):
                patch.setattr(self._launching, "empty", self._guarded_empty)
                patch.setattr(self._launching, "run", self._guarded_run)
                outcomes.append([each.detach().clone() for each in function()])
            assert self.launches, "no kernel was launched: was the function served by another backend?"
        for order, outcome in zip(_ORDERS, outcomes, strict=True):
            for k, (found, first) in enumerate(zip(outcome, outcomes[0], strict=True)):
                assert not _holds_poison(found), f"result {k} holds elements that no program stored"
                kind = _BITS[found.element_size()]
                assert torch.equal(found.view(kind), first.view(kind)), f"result {k}: other bits with the grid {order}"
        return outcomes[0]

    # ---- buffers ----

    def _guarded_empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        elements = int(np.prod(shape))
        buffer = Buffer(elements, dtype, device, made=True)
        self._buffers[buffer.flat.untyped_storage().data_ptr()] = buffer
        return buffer.flat[buffer.before : buffer.before + elements].view(shape)

    def _guarded(self, argument: Any) -> Any:
        """The argument as the kernel gets it: tensors that nobody guards yet as copies between guard bands."""
        if isinstance(argument, Tensor):
            return self._guarded_tensor(argument)
        if isinstance(argument, tuple):
            guarded = [self._guarded(each) for each in argument]
            return type(argument)(*guarded) if hasattr(argument, "_fields") else tuple(guarded)
        if dataclasses.is_dataclass(argument) and hasattr(argument, "base"):  # a tensor descriptor
            return dataclasses.replace(argument, base=self._guarded_tensor(argument.base))
        return argument

    def _guarded_tensor(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        buffer = self._buffers.get(tensor.untyped_storage().data_ptr())
        if buffer is None:
            extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
            # Descriptors and the widths of loads depend on the alignment.
            buffer = Buffer(extent, tensor.dtype, tensor.device, skew=tensor.data_ptr() % 64, made=False)
            # With what the strides leave out, which nobody may load: an expanded tensor cannot be copied into.
            held = tensor.as_strided((extent,), (1,), tensor.storage_offset())
            buffer.flat[buffer.before : buffer.before + extent].copy_(held)
            tensor = buffer.flat.as_strided(tensor.shape, tensor.stride(), buffer.before)
        if all(buffer is not each for each in self._present):
            buffer.forget()
            self._present.append(buffer)
        buffer.allow(tensor)
        return tensor

    def _guarded_run(self, kernel: Any, grid: tuple[int, ...], config: Any, arguments: dict[str, Any]) -> None:
        self._name, self._present = kernel.__name__, []
        self.launches.append((self._name, config))
        self._run(kernel, grid, config, {name: self._guarded(each) for name, each in arguments.items()})
        for buffer in {id(each): each for each in (*self._present, *self._buffers.values())}.values():
            assert not buffer.bands_changed(), f"{self._name} wrote into a guard band"

    # ---- loads, stores and the order of the programs ----

    @contextmanager
    def _interpreter(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        from triton.runtime import interpreter

        assert self._launching.interpreting(), "set TRITON_INTERPRET=1 before triton is imported"
        builder = interpreter.interpreter_builder
        load, store, begin = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx

        def checked_load(pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
            self._on_load(pointers.data, mask.data)
            return load(pointers, mask, *rest, **more)

        def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._on_store(pointers.data, mask.data)
            return store(pointers, value, mask, *rest)

        def begin_program(x: int, y: int, z: int) -> None:
            width, height, depth = builder.grid_dim
            self._program = self._permuted((x * height + y) * depth + z, width * height * depth)
            rest, z = divmod(self._program, depth)
            begin(*divmod(rest, height), z)

        def atomic(*arguments: Any) -> Any:
            raise AssertionError(f"{self._name} uses an atomic operation: its bits depend on the order of programs")

        replaced = {
            "create_masked_load": checked_load,
            "create_masked_store": checked_store,
            "set_grid_idx": begin_program,
            "create_atomic_rmw": atomic,
            "create_atomic_cas": atomic,
        }
        for name, function in replaced.items():
            patch.setattr(builder, name, function)
        yield

    def _permuted(self, place: int, programs: int) -> int:
        if self._order == "shuffled":
            order = list(range(programs))
            random.Random(programs).shuffle(order)
            return order[place]
        return programs - 1 - place if self._order == "reversed" else place

    def _elements(self, pointers: np.ndarray, mask: np.ndarray, what: str) -> tuple[Buffer, np.ndarray] | None:
        """The buffer and the indices of its elements that an instruction reaches for."""
        addresses = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(pointers.shape, mask.shape))
        ].astype(np.int64)
        if not addresses.size:
            return None
        low, high = int(addresses.min()), int(addresses.max())
        for buffer in self._present:
            if buffer.start <= low and high < buffer.end:
                at, odd = np.divmod(addresses - buffer.start, buffer.size)
                assert not odd.any(), f"{self._name} {what} between two elements"
                outside = at[~buffer.allowed[at]] - buffer.before
                assert not outside.size, (
                    f"{self._name}, program {self._program}, {what} {outside.size} elements that are none of its "
                    f"tensors', the first at {outside[0]} of {buffer.elements}"
                )
                return buffer, at
        raise AssertionError(f"{self._name}, program {self._program}, {what} an address of no tensor it was given")

    def _on_load(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        if (found := self._elements(pointers, mask, "loads")) is None:
            return
        buffer, at = found
        if not buffer.made:
            return
        where = f"{self._name}, program {self._program}, loads"
        assert not buffer.uninitialised(at).any(), f"{where} what nobody has stored"
        owner = buffer.stored_by[at]
        assert ((owner == _NOBODY) | (owner == self._program)).all(), f"{where} what another program stores"
        known = buffer.loaded_by[at]
        buffer.loaded_by[at] = np.where((known == _NOBODY) | (known == self._program), self._program, _SEVERAL)

    def _on_store(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        if (found := self._elements(pointers, mask, "stores")) is None:
            return
        buffer, at = found
        where = f"{self._name}, program {self._program}, stores"
        assert buffer.made, f"{where} to a tensor that launching.empty did not make"
        assert np.unique(at).size == at.size, f"{where} an element twice in one instruction"
        for before, by in ((buffer.stored_by, "stored"), (buffer.loaded_by, "loaded")):
            owner = before[at]
            assert ((owner == _NOBODY) | (owner == self._program)).all(), f"{where} what another program {by}"
        buffer.stored_by[at] = self._program


def _holds_poison(tensor: Tensor) -> bool:
    """Whether an element still is what `launching.empty` gave, or a NaN that came of it."""
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        pattern = torch.tensor(_POISON[tensor.element_size()], dtype=_BITS[tensor.element_size()])
        return bool((tensor.contiguous().view(pattern.dtype) == pattern).any())
    return False


@pytest.fixture
def gpu_safety() -> GpuSafety:
    """Runs a function that calls public operators, and checks what its kernels do to memory."""
    pytest.importorskip("triton")
    return GpuSafety()
