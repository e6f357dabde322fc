"""A second forward like the first: the states of random generators, and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RandomState:
    """The states of torch's generators, of the CPU and of devices."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def generators_kept(devices: list[torch.device]) -> Iterator[None]:
    before = RandomState(devices)
    try:
        yield
    finally:
        before.restore()


class Autocast:
    """The autocast contexts around the first forward, or that there were none, for the second."""

    def __init__(self, devices: list[torch.device]) -> None:
        types = dict.fromkeys(["cpu", *(device.type for device in devices)])
        self._states = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in types]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype, enabled in self._states:
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled))
            # Inside one context a weight is cast once: without a graph in the first pass, and with one that the backward
            # of its chunk frees.
            torch.clear_autocast_cache()
            yield
            torch.clear_autocast_cache()


def devices_of(model: Any, inputs: list[Any]) -> list[torch.device]:
    """Those of a model and its inputs that have generators of their own."""
    tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
    if isinstance(model, nn.Module):
        tensors += model.parameters()
    return list(dict.fromkeys(tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")))
