"""How a batch passes through the DeepSpeed engine: whole, or in chunks whose gradients are cached."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .data import Batch
from .gradient_cache import GradientCache, blank_row
from .model import DualOutput
from .recipe import TrainConfig
from .runtime import Runtime


class Passes:
    """Forward, backward and step, each called once for each batch; every rank calls them alike."""

    def __init__(self, engine: Any, config: TrainConfig, runtime: Runtime) -> None:
        self._engine, self._runtime = engine, runtime

    @staticmethod
    def of(engine: Any, config: TrainConfig, runtime: Runtime) -> Passes:
        """What the recipe asks for."""
        return (Passes if config.cache_chunk is None else _CachedPasses)(engine, config, runtime)

    def forward(self, batch: Batch) -> DualOutput:
        """The batch through both towers. A rank whose samples were all bad still takes part, with a blank pair.

        ZeRO-3 gathers parameters inside forward, so a rank that left it out would leave the others waiting.
        """
        inputs = _inputs(batch.to(self._runtime.device))
        if len(batch):
            return self._engine(*inputs)
        return self._engine(*map(blank_row, inputs)).without_rows()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        """The optimiser's step, if the batch was the last of `accumulation` (DeepSpeed counts)."""
        self._engine.step()


class _CachedPasses(Passes):
    """In chunks of ``cache_chunk`` rows. DeepSpeed knows of one batch alone, since it reduces gradients once a step."""

    def __init__(self, engine: Any, config: TrainConfig, runtime: Runtime) -> None:
        super().__init__(engine, config, runtime)
        assert config.cache_chunk is not None
        # samples that could not be used leave a rank short of rows, and of none of the chunks
        chunks = -(-(config.batch_size // runtime.world_size) // config.cache_chunk)
        self._cache = GradientCache(engine, config.cache_chunk, chunks=chunks)
        self._accumulation, self._batches = config.accumulation, 0

    def forward(self, batch: Batch) -> DualOutput:
        return self._cache(*_inputs(batch.to(self._runtime.device)))

    def backward(self, loss: Tensor) -> None:
        self._batches += 1
        self._cache.backward(loss / self._accumulation, last=self._batches == self._accumulation)

    def step(self) -> None:
        if self._batches == self._accumulation:
            self._engine.step()
            self._batches = 0


def _inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.images, batch.input_ids, batch.attention_mask
