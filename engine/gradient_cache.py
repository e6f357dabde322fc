"""Gradient caching: a contrastive batch whose activations do not fit, in two passes (GradCache, arXiv:2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import PairtileError
from .reduce_once import Reduction

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
            returns a tensor, or a (named) tuple or mapping of them.
        chunk: rows that are embedded at a time.
        chunks: how many chunks there are at least; those that are short of rows still run, on a blank one. Ranks whose model
            exchanges something (ZeRO-3) must agree on it: the largest shard's rows over ``chunk``.
        shared: names of the outputs that belong to the whole batch. Only their value in the first chunk counts.

    Raises:
        ValueError: chunk below 1; arguments or outputs whose rows disagree.
        PairtileError: a BatchNorm that takes the statistics of its batch: those of a chunk would be others, and its running
            statistics would be updated twice. Or a DeepSpeed configuration that cannot reduce gradients once.
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
        inputs = list(_leaves((args, kwargs)))
        rows = _rows(inputs)
        pending = _Pending((args, kwargs), self._slices(rows), _devices(self.model, inputs))
        with torch.no_grad():
            for rows_of_chunk in pending.slices:
                pending.random.append(_RandomState(pending.devices))
                pending.keep(self._forward(pending.inputs, rows_of_chunk), rows_of_chunk, rows, self.shared)
        self._pending = pending
        return _rebuild(pending.structure, iter(pending.outputs))

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
        with _generators_kept(pending.devices):
            for number, rows in enumerate(pending.slices):
                final = number == len(pending.slices) - 1
                with self._reduction.chunk(complete=last and final):
                    pending.random[number].restore()
                    with pending.autocast.replayed():
                        outputs = self._forward(pending.inputs, rows)
                    surrogate = pending.surrogate(list(_leaves(outputs)), rows, with_shared=final)
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
        leaves = (blank_row(leaf) if empty else leaf[rows] if _has_rows(leaf) else leaf for leaf in _leaves(inputs))
        args, kwargs = _rebuild(inputs, leaves)
        outputs = self.model(*args, **kwargs)
        if not empty:
            return outputs
        named = zip(_leaves(outputs), _names(outputs))
        return _rebuild(outputs, (leaf if _is_shared(leaf, name, self.shared) else leaf[:0] for leaf, name in named))


@dataclass
class _Pending:
    """What the second pass needs of the first."""

    inputs: Any
    slices: list[slice]
    devices: list[torch.device]
    random: list[_RandomState] = field(default_factory=list)
    structure: Any = None
    outputs: list[Any] = field(default_factory=list)  # tensors of all rows, shared ones, and what is no tensor
    of_rows: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.autocast = _Autocast(self.devices)

    def keep(self, structure: Any, rows: slice, total: int, shared: Sequence[str]) -> None:
        """Copy the outputs of one chunk to their places in those of the batch."""
        leaves, names = list(_leaves(structure)), list(_names(structure))
        if not self.outputs:
            self.structure = structure
            self.of_rows = [not _is_shared(leaf, name, shared) for leaf, name in zip(leaves, names)]
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


def blank_row(leaf: Any) -> Any:
    """One row in place of none: zeros, and True in masks, so that attention has something to attend to."""
    return leaf.new_full((1, *leaf.shape[1:]), leaf.dtype == torch.bool) if _has_rows(leaf) else leaf


class _RandomState:
    """The states of torch's generators, of the CPU and of devices."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _generators_kept(devices: list[torch.device]) -> Iterator[None]:
    before = _RandomState(devices)
    try:
        yield
    finally:
        before.restore()


class _Autocast:
    """The autocast contexts around the first pass, for the second."""

    def __init__(self, devices: list[torch.device]) -> None:
        types = dict.fromkeys(["cpu", *(device.type for device in devices)])
        self._active = [(kind, torch.get_autocast_dtype(kind)) for kind in types if torch.is_autocast_enabled(kind)]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype in self._active:
                stack.enter_context(torch.autocast(kind, dtype))
            # Inside one context a weight is cast once: without a graph in the first pass, and with one that the backward
            # of its chunk frees.
            torch.clear_autocast_cache()
            yield
            torch.clear_autocast_cache()


def _devices(model: Any, inputs: list[Any]) -> list[torch.device]:
    tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
    if isinstance(model, nn.Module):
        tensors += model.parameters()
    return list(dict.fromkeys(tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")))


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _is_shared(leaf: Any, name: str, shared: Sequence[str]) -> bool:
    return name in shared or not _has_rows(leaf)


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _rows(inputs: list[Any]) -> int:
    counts = {leaf.shape[0] for leaf in inputs if _has_rows(leaf)}
    if len(counts) != 1:
        raise ValueError(
            f"the tensors given have {sorted(counts) or 'no'} rows: expected tensors with one row for each sample of the batch"
        )
    return counts.pop()


def _leaves(tree: Any) -> Iterator[Any]:
    """What is neither a tuple, a list nor a mapping, in order."""
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        yield tree
        return
    for entry in tree:
        yield from _leaves(entry)


def _names(tree: Any, name: str = "") -> Iterator[str]:
    """For each leaf the innermost key or field that it lies under."""
    if isinstance(tree, Mapping):
        named = [(str(key), entry) for key, entry in tree.items()]
    elif isinstance(tree, tuple | list):
        named = list(zip(getattr(tree, "_fields", map(str, range(len(tree)))), tree))
    else:
        yield name
        return
    for key, entry in named:
        yield from _names(entry, key)


def _rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """The same structure around other leaves."""
    if isinstance(tree, Mapping):
        return type(tree)({key: _rebuild(entry, leaves) for key, entry in tree.items()})  # type: ignore[call-arg]
    if isinstance(tree, tuple | list):
        entries = [_rebuild(entry, leaves) for entry in tree]
        return type(tree)(*entries) if hasattr(tree, "_fields") else type(tree)(entries)
    return next(leaves)
