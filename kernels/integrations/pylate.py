"""PyLate's ColBERT scores on our operators; training scripts, losses and reranking stay as they are.

    from pairtile.kernels.integrations import pylate as pairtile_pylate

    pairtile_pylate.enable()                # for the process, until disable()
    with pairtile_pylate.enabled(): ...     # or inside a block

`colbert_scores`, `colbert_scores_pairwise` and `colbert_kd_scores` compute the same scores and gradients without the tensor
of all token products, and with them whatever calls them: `losses.Contrastive`, `CachedContrastive` and `Distillation`,
`rank.rerank`, the evaluators. PyLate chooses among its own backends by `backend=` or PYLATE_SCORES_BACKEND; ours takes the
place of "flash": "auto" and "flash" are served here, on any device, while "torch" and "lik" stay PyLate's own.

PyLate multiplies the products of a masked document token by 0, and `rank.rerank` pads documents with zeros. Such a token
takes part in the maximum with the score 0, so that no query token of a padded document scores below 0; a mask proper would
leave it out (`maxsim(..., d_mask=)`). These are PyLate's numbers and stay as they are. Scores are float32 (float64 for
float64 embeddings), under autocast too, where PyLate's are of the embeddings' dtype.

What cannot be served is left to PyLate after one warning that says why: embeddings that are not floating point, or whose
shapes do not fit. XTR's scores are not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..build import warn_once
from ..late_interaction.maxsim import maxsim
from ..late_interaction.pooling import MaxPooling
from ..late_interaction.scores import token_scores
from ..late_interaction.token_sets import TokenSets, packed_sets
from .switch import Replacement, Switch, library
from .token_embeddings import obstacle

__all__ = ["disable", "enable", "enabled"]

_NEEDED = "pylate>=1.6"


def enable() -> None:
    """Serve PyLate's scores in the whole process, in losses that exist too, until `disable()`.

    Raises:
        ImportError: PyLate is not installed, or is older than version 1.6.
    """
    _switch.always(True)


def disable() -> None:
    """Undo `enable()`: the scores are PyLate's own, but in a block of `enabled()`."""
    _switch.always(False)


def enabled() -> AbstractContextManager[None]:
    """As `enable()`, inside a block, for all threads. Blocks nest, and may overlap in several threads."""
    return _switch.block()


@functools.cache
def _replacements() -> Sequence[Replacement]:
    """PyLate's functions ask at each call whether the backend "flash" can serve, and import it by name if so.

    That choice is replaced, and not the functions: losses keep those by value.
    """
    version = library("pylate", "pylate").__version__
    scores = import_module("pylate.scores.colbert")
    try:
        backend = import_module("pylate.scores._flash_backend")
        choice: Callable[..., bool] = scores._try_flash
        found = [(name, getattr(backend, name), ours) for name, ours in _SERVED.items()]
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f'PyLate {version} does not choose among backends as this integration expects ({error}): pip install "{_NEEDED}"'
        ) from error
    replaced = [Replacement(backend, name, theirs, _either(theirs, ours)) for name, theirs, ours in found]
    return [*replaced, Replacement(scores, "_try_flash", choice, functools.partial(_chosen, choice))]


def _chosen(theirs: Callable[..., bool], backend: str, queries: Any, documents: Any) -> bool:
    """Whether the replaced functions are called: for ours, or for PyLate's own where it would call them itself."""
    return (backend in ("auto", "flash") and _can_serve(queries, documents)) or theirs(backend, queries, documents)


def _either(theirs: Callable[..., Tensor], ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(theirs)
    def scores(queries: Any, documents: Any, **masks: Any) -> Tensor:
        return (ours if _can_serve(queries, documents) else theirs)(queries, documents, **masks)

    return scores


def _scores(
    queries: Tensor, documents: Tensor, queries_mask: Tensor | None = None, documents_mask: Tensor | None = None
) -> Tensor:
    """Of all pairs, or of each query with its own candidates."""
    return maxsim(_masked(queries, queries_mask), _masked(documents, documents_mask))


def _masked(tokens: Tensor, mask: Tensor | None) -> Tensor:
    # PyLate multiplies products by the masks: the same as multiplying the tokens.
    return tokens if mask is None else tokens * mask.unsqueeze(-1).to(tokens.dtype)


def _pair_scores(queries: Any, documents: Any) -> Tensor:
    """Of each query with the document at its position; both may be lists of matrices of different lengths."""
    (scores,) = token_scores(
        _packed(queries, "queries"), _packed(documents, "documents"), pooling=MaxPooling(), candidates=1
    )
    return scores.squeeze(1)


def _packed(sets: Any, name: str) -> TokenSets:
    matrices = _tensors(sets)
    lengths = torch.tensor([0, *(len(each) for each in matrices)], device=matrices[0].device)
    return packed_sets(torch.cat(matrices), lengths.cumsum(0), max(len(each) for each in matrices), name)


_SERVED: dict[str, Callable[..., Tensor]] = {
    "colbert_scores_flash": _scores,
    "colbert_scores_pairwise_flash": _pair_scores,
    "colbert_kd_scores_flash": _scores,
}
_switch = Switch(_replacements)


def _can_serve(queries: Any, documents: Any) -> bool:
    found = _obstacle(queries, documents)
    if found is not None:
        warn_once(
            f"PyLate's own scores serve, because pairtile has nothing for {found}: scores and gradients are right, "
            "memory and time are as without pairtile"
        )
    return found is None


def _obstacle(queries: Any, documents: Any) -> str | None:
    if isinstance(queries, Tensor) and isinstance(documents, Tensor):
        return obstacle(queries, documents)
    return _obstacle_of_lists(queries, documents)


def _obstacle_of_lists(queries: Any, documents: Any) -> str | None:
    """Of pairs whose embeddings come one by one."""
    if len(queries) != len(documents) or not len(queries):
        return f"{len(queries)} queries beside {len(documents)} documents"
    tensors = [*_tensors(queries), *_tensors(documents)]
    if not all(each.is_floating_point() and each.dim() == 2 and each.numel() for each in tensors):
        return "embeddings that are not floating point matrices"
    if len({(each.shape[1], each.device) for each in tensors}) > 1:
        return "embeddings of several widths, or on several devices"
    return None


def _tensors(sets: Any) -> list[Tensor]:
    convert = import_module("pylate.utils.tensor").convert_to_tensor
    return [convert(each) for each in sets]
