"""What the backend launches for a request: recorded from its own host code, compiled as the launch would compile it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pairtile.kernels import Diagonal
from pairtile.kernels.contrastive import triton_backward, triton_forward
from pairtile.kernels.contrastive.arguments import checked_budget
from pairtile.kernels.contrastive.autograd import Settings
from pairtile.kernels.contrastive.triton_kernels import launches as shared
from pairtile.kernels.contrastive.triton_kernels import launching
from pairtile.kernels.contrastive.triton_kernels.configurations import Config, pick_config

from .late_interaction import LateRequest
from .requests import Request
from .targets import Target
from .token_merging import TokenRequest

#: What the audit can be asked for.
AnyRequest = Request | LateRequest | TokenRequest
#: kernel of `pick_config` -> the configuration to take in place of the shipped one.
Overrides = Mapping[str, Config]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as the host code asks for it.

    Attributes:
        phase: "forward", "backward", or "both" of a loss whose one sweep finds its gradients, too.
        programs: of the grid.
    """

    kernel: Any
    programs: int
    config: Config | None
    arguments: dict[str, Any]
    phase: str

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def compiled(self) -> Any:
        """The compiled kernel; call it inside `compiling_for`."""
        arguments = {name: _located(value) for name, value in self.arguments.items()}
        if self.config is None:
            return self.kernel.warmup(**arguments, grid=(self.programs,))
        config = self.config
        return self.kernel.warmup(
            **arguments,
            BM=config.block_m,
            BN=config.block_n,
            BK=config.block_k,
            GROUP=config.group,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            grid=(self.programs,),
        )


class _Located:
    """A tensor of the meta device as the compiler sees one: its dtype, and how far its address is aligned."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


def _located(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Located(value)
    if isinstance(value, tuple):
        located = [_located(each) for each in value]
        return type(value)(*located) if hasattr(value, "_fields") else tuple(located)
    return value


def recorded(request: AnyRequest, target: Target, overrides: Overrides | None = None) -> list[Launch]:
    """Every launch of a forward and a backward with all gradients, in order.

    The host code runs as it is, on tensors without memory: it never looks at a value, which would stall a GPU.
    """
    launches: list[Launch] = []
    with _recording(launches, target, overrides or {}) as phase:
        if not isinstance(request, Request):
            request.launch(phase)
            return launches
        settings = Settings(checked_budget(None, "triton"), request.precision)
        needed = [True] * len(request.operands)
        if request.one_sweep:
            phase["now"] = "both"
            triton_backward.sigmoid_sum(request.operands, Diagonal(), 1.0, settings, needed)
            return launches
        results, statistics = triton_forward.forward_results(request.operands, request.plan, settings)
        phase["now"] = "backward"
        saved = [tensor for each in statistics for tensor in each]
        grads = [torch.empty_like(each) for each in results]
        triton_backward.backward_results(request.operands, request.plan, saved, grads, settings, needed)
    return launches


@contextlib.contextmanager
def _recording(launches: list[Launch], target: Target, overrides: Overrides) -> Iterator[dict[str, str]]:
    phase = {"now": "forward"}

    def run(kernel: Any, grid: tuple[int, ...], config: Config | None, arguments: dict[str, Any]) -> None:
        launches.append(Launch(kernel, grid[0], config, arguments, phase["now"]))

    def pick(arch: str, kernel: str, *arguments: Any, **more: Any) -> Config:
        return overrides.get(kernel) or pick_config(arch, kernel, *arguments, **more)

    with (
        mock.patch.object(launching, "run", run),
        mock.patch.object(launching, "architecture", return_value=target.arch),
        mock.patch.object(shared, "chosen_config", pick),
    ):
        yield phase
