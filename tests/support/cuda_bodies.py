"""The bodies of csrc/cuda's kernels on the CPU, compiled from the same headers, behind the names of the CUDA operators."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
_GUARD = 64


def compile_bodies(compiler: str, folder: Path) -> Path:
    """The library for `CudaBodies`."""
    library = folder / "cuda_bodies.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{SOURCES}"]
    command = [compiler, *flags, HERE / "cuda_bodies.cpp", "-o", library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


class CudaBodies:
    """`torch.ops.pairtile`'s cuda_* on CPU tensors: every result has guard bands, and is written once and whole."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.calls: list[str] = []

    def cuda_select_pairs(
        self, best: Tensor, partner: Tensor, tokens: int, r: int, protected: int, class_token: bool, distill_token: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert best.dtype == torch.float32
        batch, given = len(best), (best.contiguous(), partner.contiguous())
        found = [_Result(torch.int64, batch, count) for count in (tokens - r, r, r)]
        options = tokens, r, protected, ctypes.c_bool(class_token), ctypes.c_bool(distill_token)
        served = self.library.select_pairs(
            *map(_pointer, given), batch, *options, *(_pointer(each.inner) for each in found)
        )
        assert served == 1
        self.calls.append("select")
        return tuple(each.checked() for each in found)  # type: ignore[return-value]

    def cuda_combine_tokens(
        self,
        x: Tensor,
        kept: Tensor,
        sources: Tensor,
        places: Tensor,
        factors: Tensor | None,
        divisors: Tensor | None,
    ) -> Tensor:
        return self._combine(x, (kept, sources, places), factors, None, divisors, None)

    def cuda_average_tokens(
        self, x: Tensor, kept: Tensor, sources: Tensor, places: Tensor, factors: Tensor | None, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        totals = _Result(torch.float32, *kept.shape)
        return self._combine(x, (kept, sources, places), factors, sizes, None, totals.inner), totals.checked()

    def _combine(
        self,
        x: Tensor,
        moves: tuple[Tensor, ...],
        factors: Tensor | None,
        sizes: Tensor | None,
        divisors: Tensor | None,
        totals: Tensor | None,
    ) -> Tensor:
        kept, sources, _ = moves = tuple(each.contiguous() for each in moves)
        out = _Result(x.dtype, *kept.shape, x.shape[2])
        counts = len(x), kept.shape[1], sources.shape[1], x.shape[2]
        numbers = [None if each is None else each.contiguous() for each in (factors, sizes, divisors, totals)]
        rows, keep = _rows(x)
        call = getattr(self.library, f"combine_{str(x.dtype)[6:]}")
        call(*rows, *map(_pointer, moves), *counts, *map(_pointer, numbers), _pointer(out.inner))
        del keep
        self.calls.append("combine")
        return out.checked()

    def cuda_spread_tokens(
        self, x: Tensor, place_of: Tensor, factors: Tensor | None, divisors: Tensor | None
    ) -> Tensor:
        place_of = place_of.contiguous()
        out = _Result(x.dtype, *place_of.shape, x.shape[2])
        rows, keep = _rows(x)
        numbers = [None if each is None else each.contiguous() for each in (factors, divisors)]
        call = getattr(self.library, f"spread_{str(x.dtype)[6:]}")
        counts = *place_of.shape, x.shape[2]
        call(*rows, _pointer(place_of), *counts, *map(_pointer, numbers), _pointer(out.inner))
        del keep
        self.calls.append("spread")
        return out.checked()


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _rows(x: Tensor) -> tuple[tuple[object, ...], Tensor]:
    """As token_operators.cpp passes them, and the tensor that owns them."""
    x = x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()
    return (_pointer(x), *map(ctypes.c_int64, x.stride()[:2]), x.shape[1]), x


class _Result:
    """A tensor amid guard bands, full of a number that no result has."""

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        self._poison = -12345
        count = torch.Size(shape).numel()
        self._whole = torch.full((count + 2 * _GUARD,), self._poison, dtype=dtype)
        self._poison = self._whole[0].item()
        self.inner = self._whole[_GUARD : _GUARD + count].view(shape)

    def checked(self) -> Tensor:
        bands = torch.cat([self._whole[:_GUARD], self._whole[len(self._whole) - _GUARD :]])
        assert (bands == self._poison).all(), "written outside of a result"
        assert not (self.inner == self._poison).any(), "not written"
        return self.inner.clone()
