"""colpali-engine's late-interaction scores and losses on our operators; training scripts stay as they are.

    from pairtile.kernels.integrations import colpali as pairtile_colpali

    pairtile_colpali.enable()               # for the process, until disable()
    with pairtile_colpali.enabled(): ...    # or inside a block

`score_multi_vector` of every processor, and `ColbertLoss`, `ColbertNegativeCELoss`, `ColbertPairwiseCELoss`,
`ColbertPairwiseNegativeCELoss` and `ColbertSigmoidLoss` compute the same values and gradients without the tensor of all token
products, in the batch and over explicit negatives, with `use_smooth_max=True` in the batch too. colpali-engine chooses its
backend by COLPALI_SCORES_BACKEND; ours takes the place of "lik": "auto" (the default) and "lik" are served here, on any
device, while "torch" stays colpali-engine's own.

Padding has no mask there but zero vectors, which take part in the maximum with the score 0, so that no query token of a
padded document scores below 0; a mask proper would leave them out (`maxsim(..., d_mask=)`). These are colpali-engine's numbers
and stay as they are. Among equal maxima its `amax` divides the gradient, and ours gives it to the first: duplicate tokens
share it differently, and so does the padding itself, whose gradient the models' attention mask drops. Scores are float32
(float64 for float64 embeddings), where colpali-engine's are of the embeddings' dtype.

What cannot be served is left to colpali-engine after one warning that says why: the smooth maximum over explicit negatives,
and embeddings whose dtypes or shapes do not fit. The scores of the positive pairs beside explicit negatives, one for each
query, are its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.metadata import version
from typing import Any

from torch import Tensor

from ..build import warn_once
from ..late_interaction.maxsim import maxsim
from ..late_interaction.pooling import LogSumExpPooling
from .switch import Replacement, Switch, library
from .token_embeddings import obstacle

__all__ = ["disable", "enable", "enabled"]

_NEEDED = "colpali-engine>=0.3.18"


def enable() -> None:
    """Serve colpali-engine's scores and losses in the whole process, until `disable()`.

    Raises:
        ImportError: colpali-engine is not installed, or is older than version 0.3.18.
    """
    _switch.always(True)


def disable() -> None:
    """Undo `enable()`: all is colpali-engine's own, but in a block of `enabled()`."""
    _switch.always(False)


def enabled() -> AbstractContextManager[None]:
    """As `enable()`, inside a block, for all threads. Blocks nest, and may overlap in several threads."""
    return _switch.block()


@functools.cache
def _replacements() -> Sequence[Replacement]:
    """The functions of the backend "lik", which is asked for at each call, and the smooth maximum, which has no backend."""
    library("colpali_engine", "colpali-engine")
    losses = import_module("colpali_engine.loss.late_interaction_losses")
    try:
        backend = import_module("colpali_engine.utils._lik_backend")
        places = [
            (backend, "maxsim_inbatch_lik", _either),
            (backend, "maxsim_kd_lik", _either),
            (losses.ColbertModule, "_inbatch_scores", _either_in_batch),
            (losses.ColbertModule, "_smooth_max", _warned),
        ]
        found = [(owner, name, getattr(owner, name), ours) for owner, name, ours in places]
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"colpali-engine {version('colpali-engine')} does not choose among backends as this integration expects "
            f'({error}): pip install "{_NEEDED}"'
        ) from error
    return [
        Replacement(owner, name, theirs, functools.wraps(theirs)(ours(theirs))) for owner, name, theirs, ours in found
    ]


_switch = Switch(_replacements)


def _either(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Scores of all pairs, or of each query with its own candidates."""

    def scores(query: Tensor, doc: Tensor) -> Tensor:
        return maxsim(query, doc) if _can_serve(query, doc) else theirs(query, doc)

    return scores


def _either_in_batch(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`ColbertModule._inbatch_scores`, whose hard maximum asks the backend itself."""

    def scores(loss: Any, query_embeddings: Tensor, doc_embeddings: Tensor) -> Tensor:
        smooth = loss.use_smooth_max and _choice() != "torch"
        if not smooth or not _can_serve(query_embeddings, doc_embeddings):
            return theirs(loss, query_embeddings, doc_embeddings)
        found = maxsim(query_embeddings, doc_embeddings, pooling=LogSumExpPooling(loss.tau))
        if not loss.normalize_scores:
            return found
        lengths = (query_embeddings[:, :, 0] != 0).sum(dim=1)
        normalized: Tensor = loss._apply_normalization(found, lengths)
        return normalized

    return scores


def _warned(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def smooth_max(loss: Any, scores: Tensor, dim: int) -> Tensor:
        if _choice() != "torch":
            _warn("the smooth maximum over explicit negatives")
        return theirs(loss, scores, dim)

    return smooth_max


def _choice() -> str:
    """COLPALI_SCORES_BACKEND, checked."""
    backend: str = import_module("colpali_engine.utils.maxsim")._resolve_backend()
    return backend


def _can_serve(query: Tensor, doc: Tensor) -> bool:
    found = obstacle(query, doc)
    if found is not None:
        _warn(found)
    return found is None


def _warn(lacking: str) -> None:
    warn_once(
        f"colpali-engine's own scores serve, because pairtile has nothing for {lacking}: values and gradients are right, "
        "memory and time are as without pairtile"
    )
