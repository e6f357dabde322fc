"""Gradient caching: a contrastive batch whose activations do not fit, in two passes (GradCache, arXiv:2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import PairtileError
from .nested import has_rows, leaves_of, names_of, rebuild
from .reduce_once import Reduction
from .replay import Autocast, RandomState, devices_of, generators_kept

#: Outputs of a model that belong to the whole batch and not to its rows, by the names of open_clip.
SHARED = ("logit_scale", "logit_bias")


class GradientCache:
    """Forward and backward of a model whose loss compares all rows of a batch, one chunk of rows in memory at a time.

    ::

        cache = GradientCache(model, chunk=256)
        output = cache(images, input_ids, attention_mask)  # 16,384 rows, no graph
        loss = ClipLoss()(output.image_features, output.text_features, output.logit_scale)
        cache.backward(loss)
        optimizer.step()

    The call embeds the batch chunk by chunk without a graph and returns the embeddings of all rows as leaves. The loss is
    any code over them, with negatives from all rows and, by its own exchange, from all ranks. :meth:`backward` takes the
    gradient dL/de of every embedding e once, embeds each chunk again with its random state and its autocast replayed, and
    adds the gradient of the surrogate sum(e * dL/de), which is the chain rule: parameters get the gradient that the
    same chunks with their graphs kept would give. Memory is that of one chunk's activations and of the embeddings with
    their gradients; the price is a second forward.

    Everything that the loss reads of the model comes through its outputs: pooled embeddings, tokens [n, L, D] with masks,
    hidden states for a captioning term. What belongs to no row (a scale, a bias, a vocabulary matrix: ``shared``, and every
    tensor without dimensions) keeps one gradient, that of the whole batch. Parameters of the loss itself get theirs from
    the loss.

    open_clip's ``--accum-freq`` computes the loss once for each chunk instead, adds the gradient of the scale as many
    times, and draws dropout anew in its second pass. The packages around GradCache want the loss as a function of fixed arguments.

    Under DistributedDataParallel gradients are reduced with the last chunk alone, and with a DeepSpeed engine (ZeRO 0
    to 3) once as well; there every gradient stays whole on each rank until then.

    Args:
        model: called with each chunk: a module, one wrapped for several ranks, a DeepSpeed engine, or a function (then ranks
            are the caller's affair). Tensors among its arguments, in lists and mappings too, have a row for each sample. It
            returns a tensor, or a (named) tuple, list, mapping or dataclass of them.
        chunk: rows that are embedded at a time.
        chunks: how many chunks there are at least; those that are short of rows still run, on a blank one. Ranks whose model
            exchanges something (ZeRO-3) must agree on it: the largest shard's rows over ``chunk``.
        shared: names of the outputs that belong to the whole batch. Only their value in the first chunk counts.

    Raises:
        ValueError: chunk below 1; arguments or outputs whose rows disagree; outputs without a tensor that has rows.
        PairtileError: a BatchNorm that takes the statistics of its batch: those of a chunk would be others, and its running
            statistics would be updated twice. From the second chunk on, any other buffer that a forward changes, as spectral
            norms and running means do. Or a DeepSpeed configuration that cannot reduce gradients once.
    """

    def __init__(
        self, model: Callable[..., Any], chunk: int, *, chunks: int = 1, shared: Sequence[str] = SHARED
    ) -> None:
        if chunk < 1 or chunks < 1:
            raise ValueError(f"chunk={chunk}, chunks={chunks}: expected at least 1 of each")
        self.model, self.chunk, self.chunks, self.shared = model, chunk, chunks, tuple(shared)
        self._reduction = Reduction.of(model)
        self._pending: _Pending | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Embed all rows without a graph: what the model returns, with all rows in its tensors, as leaves.

        A call replaces the one before it, whose loss then cannot be given to :meth:`backward`.
        """
        self._pending = None
        if isinstance(self.model, nn.Module):
            check_batch_statistics(self.model)
        inputs = list(leaves_of((args, kwargs)))
        rows = _rows(inputs)
        pending = _Pending((args, kwargs), self._slices(rows), devices_of(self.model, inputs))
        buffers: dict[str, tuple[Tensor, int]] = {}
        with torch.no_grad():
            for rows_of_chunk in pending.slices:
                pending.random.append(RandomState(pending.devices))
                pending.keep(self._forward(pending.inputs, rows_of_chunk), rows_of_chunk, rows, self.shared)
                # Not before: DistributedDataParallel copies rank 0's buffers in the first forward.
                buffers = buffers or _buffers(self.model)
        _check_unchanged(buffers, self.model)
        self._pending = pending
        return rebuild(pending.structure, iter(pending.outputs))

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradients of `loss`, a scalar made of the outputs of the latest call, to the parameters.

        A loss that is scaled against underflow may be given scaled; a DeepSpeed engine scales by itself.

        Args:
            loss: its graph ends at the outputs, and at parameters of the loss if it has any.
            last: whether gradients are complete with this batch and are reduced over ranks. With accumulation pass False
                for all but the last batch of a step, and losses divided by their number.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            raise RuntimeError("backward without outputs: call the GradientCache first, once for each backward")
        loss.backward()
        with generators_kept(pending.devices):
            for number, rows in enumerate(pending.slices):
                final = number == len(pending.slices) - 1
                with self._reduction.chunk(complete=last and final):
                    pending.random[number].restore()
                    with pending.autocast.replayed():
                        outputs = self._forward(pending.inputs, rows)
                    surrogate = pending.surrogate(list(leaves_of(outputs)), rows, with_shared=final)
                    if surrogate is not None:
                        self._reduction.backward(surrogate)
        for output in pending.outputs:
            if isinstance(output, Tensor):
                output.grad = None

    def _slices(self, rows: int) -> list[slice]:
        count = max(self.chunks, -(-rows // self.chunk))
        return [slice(min(n * self.chunk, rows), min((n + 1) * self.chunk, rows)) for n in range(count)]

    def _forward(self, inputs: Any, rows: slice) -> Any:
        empty = rows.stop == rows.start
        leaves = (blank_row(leaf) if empty else leaf[rows] if has_rows(leaf) else leaf for leaf in leaves_of(inputs))
        args, kwargs = rebuild(inputs, leaves)
        outputs = self.model(*args, **kwargs)
        if not empty:
            return outputs
        named = zip(leaves_of(outputs), names_of(outputs))
        return rebuild(outputs, (leaf if _is_shared(leaf, name, self.shared) else leaf[:0] for leaf, name in named))


@dataclass
class _Pending:
    """What the second pass needs of the first."""

    inputs: Any
    slices: list[slice]
    devices: list[torch.device]
    random: list[RandomState] = field(default_factory=list)
    structure: Any = None
    outputs: list[Any] = field(default_factory=list)  # tensors of all rows, shared ones, and what is no tensor
    of_rows: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.autocast = Autocast(self.devices)

    def keep(self, structure: Any, rows: slice, total: int, shared: Sequence[str]) -> None:
        """Copy the outputs of one chunk to their places in those of the batch."""
        leaves, names = list(leaves_of(structure)), list(names_of(structure))
        if not self.outputs:
            self.structure = structure
            self.of_rows = [not _is_shared(leaf, name, shared) for leaf, name in zip(leaves, names)]
            if not any(self.of_rows):
                raise ValueError(
                    f"the model returned {type(structure).__name__}, in which there is no tensor with a row for each sample: "
                    "expected a tensor, or a tuple, list, mapping or dataclass of tensors"
                )
            self.outputs = [
                leaf.new_empty(total, *leaf.shape[1:], requires_grad=leaf.is_floating_point()) if own else _leaf(leaf)
                for leaf, own in zip(leaves, self.of_rows)
            ]
        if len(leaves) != len(self.outputs):
            raise ValueError(f"the model gave {len(self.outputs)} outputs for one chunk and {len(leaves)} for another")
        for leaf, name, output, own in zip(leaves, names, self.outputs, self.of_rows):
            if own:
                expected = (rows.stop - rows.start, *output.shape[1:])
                if leaf.shape != expected:
                    raise ValueError(
                        f"output {name or 0} of the model has shape {list(leaf.shape)} for a chunk of {expected[0]} rows; "
                        f"expected {list(expected)}. Pad chunks alike, and name what belongs to no row in shared="
                    )
                output.detach()[rows] = leaf

    def surrogate(self, leaves: list[Any], rows: slice, *, with_shared: bool) -> Tensor | None:
        """sum(e * dL/de) over a chunk's outputs e: its gradient is what the graph of the loss would send back."""
        terms = []
        for leaf, output, own in zip(leaves, self.outputs, self.of_rows, strict=True):
            if not isinstance(output, Tensor) or output.grad is None or not leaf.requires_grad:
                continue
            if own or with_shared:
                terms.append((leaf * (output.grad[rows] if own else output.grad)).sum())
        return sum(terms[1:], terms[0]) if terms else None


def check_batch_statistics(model: nn.Module) -> None:
    """Raise :class:`PairtileError` if a BatchNorm of the model would take statistics of its batch, and so of a chunk."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise PairtileError(
                f"gradient caching (cache_chunk): {name.removeprefix('module.')} is a {type(module).__name__} that takes "
                "the statistics of its batch, which a chunk does not have; freeze its tower, put it into evaluation mode, "
                "take a model without batch normalisation, or leave the option out"
            )


def _buffers(model: Any) -> dict[str, tuple[Tensor, int]]:
    """Each buffer with the count of its changes in place."""
    return {name: (each, each._version) for name, each in model.named_buffers()} if isinstance(model, nn.Module) else {}


def _check_unchanged(before: dict[str, tuple[Tensor, int]], model: Any) -> None:
    for name, (buffer, version) in _buffers(model).items():
        if name in before and (before[name][0] is not buffer or before[name][1] != version):
            raise PairtileError(
                f"gradient caching (cache_chunk): the forward of the model changes its buffer {name.removeprefix('module.')}, "
                "so the second pass would find other values than the first, and change them again; put the module that "
                "it belongs to into evaluation mode, or update the buffer outside of forward"
            )


def blank_row(leaf: Any) -> Any:
    """One row in place of none: zeros, and True in masks, so that attention has something to attend to."""
    return leaf.new_full((1, *leaf.shape[1:]), leaf.dtype == torch.bool) if has_rows(leaf) else leaf


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _is_shared(leaf: Any, name: str, shared: Sequence[str]) -> bool:
    return name in shared or not has_rows(leaf)


def _rows(inputs: list[Any]) -> int:
    counts = {leaf.shape[0] for leaf in inputs if has_rows(leaf)}
    if len(counts) != 1:
        raise ValueError(
            f"the tensors given have {sorted(counts) or 'no'} rows: expected tensors with one row for each sample of the batch"
        )
    return counts.pop()
