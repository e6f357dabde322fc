"""sentence-transformers' multiple negatives ranking losses on our operators; training scripts stay as they are.

    from pairtile.kernels.integrations import sentence_transformers as pairtile_st

    pairtile_st.enable()                       # every such loss of the process, until disable()
    with pairtile_st.enabled(): ...            # or inside a block
    loss = pairtile_st.accelerate(loss)        # or one loss object, until restore(loss)

`MultipleNegativesRankingLoss`, `CachedMultipleNegativesRankingLoss` and what derives from them compute the same value and
gradients, without a matrix of scores; the cached loss embeds twice as before and finds the gradient of all embeddings in
one call, not in one for each mini-batch of rows. All options of these losses are served. What cannot be served is left
to sentence-transformers, after one warning that says why: another similarity than `cos_sim` or `dot_score`, sparse
embeddings, a learnable scale together with a hardness. Similarities are float32 (float64 for float64 embeddings), under
autocast too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..build import warn_once
from .multiple_negatives import (
    DIRECTIONS,
    HARDNESS_MODES,
    PARTITION_MODES,
    RankingOptions,
    multiple_negatives_ranking,
)
from .switch import Replacement, Switch, library

__all__ = ["accelerate", "disable", "enable", "enabled", "restore"]

Loss = TypeVar("Loss", bound=nn.Module)


def enable() -> None:
    """Serve every multiple negatives ranking loss of the process, those that exist included, until `disable()`.

    Has no effect where it is enabled already. A `MatryoshkaLoss` keeps the method of a *cached* loss from the moment it
    is made: enable before that, or give it to `accelerate`.

    Raises:
        ImportError: sentence-transformers is not installed, or is older than version 5.
    """
    _switch.always(True)


def disable() -> None:
    """Undo `enable()`: the losses run as sentence-transformers wrote them, but in a block of `enabled()`."""
    _switch.always(False)


def enabled() -> AbstractContextManager[None]:
    """As `enable()`, inside a block, for all threads. Blocks nest, and may overlap in several threads."""
    return _switch.block()


def accelerate(loss: Loss) -> Loss:
    """Serve one loss object, and those that it wraps (`MatryoshkaLoss`, ...), whether or not `enable()` was called.

    A copy or a pickle of the loss is served too. Losses whose class has a method of its own in place of the served one
    are left alone.

    Args:
        loss: a loss of sentence-transformers.

    Returns:
        The same object.

    Raises:
        TypeError: neither the loss nor a module inside it is one that is served.
        ImportError: as `enable`.
    """
    served = list(_served(loss)) if isinstance(loss, nn.Module) else []
    if not served:
        raise TypeError(
            f"loss is {type(loss).__name__}: expected {' or '.join(_SERVED)}, a class derived from them that keeps "
            "their computation, or a loss that wraps one"
        )
    for module, method in served:
        holder, name = _place(module, method.name)
        setattr(holder, name, functools.partial(method.ours, module))
    return loss


def restore(loss: Loss) -> Loss:
    """Undo `accelerate(loss)`, and return the loss. Without effect on one that was not accelerated."""
    for module, method in _served(loss):
        holder, name = _place(module, method.name)
        if getattr(vars(holder).get(name), "func", None) is not method.ours:
            continue
        if holder is module:
            delattr(module, name)
        else:
            setattr(holder, name, getattr(type(module), method.name).__get__(module))
    return loss


class _Method(NamedTuple):
    """A method of a class of sentence-transformers: theirs, ours, and the one that asks which of the two it is to be."""

    owner: type[nn.Module]
    name: str
    theirs: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    either: Callable[..., Tensor]


_switch = Switch(lambda: [Replacement(each.owner, each.name, each.theirs, each.either) for each in _methods().values()])


def _library() -> tuple[ModuleType, ModuleType]:
    """sentence-transformers' losses and its utilities."""
    library("sentence_transformers", "sentence-transformers")
    utilities = import_module("sentence_transformers.util")
    try:
        return import_module("sentence_transformers.sentence_transformer.losses"), utilities
    except ModuleNotFoundError:  # the older place
        return import_module("sentence_transformers.losses"), utilities


@functools.cache
def _methods() -> dict[str, _Method]:
    losses, _ = _library()
    return {name: _method(getattr(losses, name, None), name, *served) for name, served in _SERVED.items()}


def _method(owner: Any, class_name: str, name: str, ours: Callable[..., Tensor]) -> _Method:
    theirs = vars(owner).get(name) if owner is not None else None
    if theirs is None:
        version = import_module("sentence_transformers").__version__
        raise ImportError(
            f"sentence-transformers {version} has no {class_name}.{name}, which is what this integration replaces: "
            'pip install "sentence-transformers>=5"'
        )

    @functools.wraps(theirs)
    def either(*args: Any, **kwargs: Any) -> Tensor:
        # A loss that wraps this one may keep the method for longer than it is in its class.
        return (ours if _switch.on else theirs)(*args, **kwargs)

    return _Method(owner, name, theirs, ours, either)


def _served(loss: nn.Module) -> Iterator[tuple[nn.Module, _Method]]:
    """The losses in `loss`, itself included, with the method that is to be replaced."""
    for module in loss.modules():
        for method in _methods().values():
            if isinstance(module, method.owner) and getattr(type(module), method.name) in (
                method.theirs,
                method.either,
            ):
                yield module, method


def _place(module: nn.Module, name: str) -> tuple[Any, str]:
    """Where one object's own method is kept: in the object, below what wrapping losses have put around it."""
    holder: Any = module
    while hasattr(vars(holder).get(name), "fn"):  # a CachedLossDecorator of MatryoshkaLoss
        holder, name = vars(holder)[name], "fn"
    return holder, name


def _compute_loss_from_embeddings(loss: Any, embeddings: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Stands for `MultipleNegativesRankingLoss.compute_loss_from_embeddings`."""
    if len(embeddings) < 2 or not _can_serve(loss, embeddings):
        return _methods()["MultipleNegativesRankingLoss"].theirs(loss, embeddings, *args, **kwargs)
    return _value(loss, embeddings)


def _calculate_loss(
    loss: Any, reps: list[list[Tensor]], *args: Any, with_backward: bool = False, **kwargs: Any
) -> Tensor:
    """Stands for `CachedMultipleNegativesRankingLoss.calculate_loss`: the whole batch in one call."""
    if not _can_serve(loss, [rep for column in reps for rep in column]):
        theirs = _methods()["CachedMultipleNegativesRankingLoss"].theirs
        return theirs(loss, reps, *args, with_backward=with_backward, **kwargs)
    value = _value(loss, [torch.cat(column) for column in reps])
    if with_backward:
        value.backward()  # type: ignore[no-untyped-call]
    return value.detach() if with_backward else value


#: Class, its method, and what stands for it.
_SERVED: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "MultipleNegativesRankingLoss": ("compute_loss_from_embeddings", _compute_loss_from_embeddings),
    "CachedMultipleNegativesRankingLoss": ("calculate_loss", _calculate_loss),
}


def _value(loss: Any, columns: Sequence[Tensor]) -> Tensor:
    """The loss of a batch: the embeddings [n, D] of the queries, of their positives, of their hard negatives."""
    utilities, options = _library()[1], _options(loss)

    def operand(column: Tensor) -> Tensor:
        # In float32 at least, as their similarities take it: 16 bits would round what the softmax tells apart.
        column = column.to(torch.promote_types(column.dtype, torch.float32))
        return column if loss.similarity_fct is utilities.dot_score else F.normalize(column, dim=-1)

    queries, *documents = columns
    if not getattr(loss, "gather_across_devices", False):
        return multiple_negatives_ranking(operand(queries), [operand(each) for each in documents], options)
    # Their gather and their share of the loss, a rank's own queries: what the trainer averages stays the same.
    gather = utilities.all_gather_with_grad
    documents = [operand(gather(each)) for each in documents]
    compared = options.directions & {"query_to_query", "doc_to_query"}
    return multiple_negatives_ranking(
        operand(queries),
        documents,
        options,
        all_queries=operand(gather(queries)) if compared else None,
        start=(dist.get_rank() if dist.is_available() and dist.is_initialized() else 0) * queries.shape[0],
    )


def _options(loss: Any) -> RankingOptions:
    """Those of any version: earlier ones have fewer."""
    known = RankingOptions()
    return RankingOptions(
        loss.scale,
        frozenset(getattr(loss, "directions", known.directions)),
        getattr(loss, "partition_mode", known.partition_mode),
        getattr(loss, "hardness_mode", known.hardness_mode),
        getattr(loss, "hardness_strength", known.hardness_strength),
    )


def _can_serve(loss: Any, embeddings: Sequence[Tensor]) -> bool:
    obstacle = _obstacle(loss, embeddings)
    if obstacle is not None:
        warn_once(
            f"sentence-transformers' own {type(loss).__name__} serves, because pairtile has nothing for {obstacle}: "
            "value and gradients are right, memory and time are as without pairtile"
        )
    return obstacle is None


def _obstacle(loss: Any, embeddings: Sequence[Tensor]) -> str | None:
    """What of this loss, or of its embeddings, we have nothing for; None if all can be served."""
    utilities, options = _library()[1], _options(loss)
    if loss.similarity_fct not in (utilities.cos_sim, utilities.pytorch_cos_sim, utilities.dot_score):
        name = getattr(loss.similarity_fct, "__name__", type(loss.similarity_fct).__name__)
        return f"similarity_fct={name} (only for cos_sim and dot_score)"
    if any(each.layout != torch.strided or each.dim() != 2 for each in embeddings):
        return "embeddings that are sparse, or not one vector for each text"
    if not options.directions <= DIRECTIONS:
        return f"directions={sorted(options.directions - DIRECTIONS)}"
    if options.partition_mode not in PARTITION_MODES or options.hardness_mode not in HARDNESS_MODES:
        return f"partition_mode={options.partition_mode!r} with hardness_mode={options.hardness_mode!r}"
    if isinstance(options.scale, Tensor) and (options.scale.numel() != 1 or options.hardness_strength):
        return "a scale that is a tensor of several elements, or one beside a hardness"
    return None
