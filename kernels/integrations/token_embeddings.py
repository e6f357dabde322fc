"""What the integrations with trainers of late interaction ask of embeddings before they serve them."""

from __future__ import annotations

from torch import Tensor


def obstacle(queries: Tensor, documents: Tensor) -> str | None:
    """What of queries [Nq, Lq, D] and documents [Nd, Ld, D] or [Nq, K, Ld, D] we have nothing for; None if all fits."""
    if not (queries.is_floating_point() and documents.is_floating_point()):
        return f"embeddings of {queries.dtype} and {documents.dtype}"
    candidates = documents.dim() == 4 and documents.shape[:1] == queries.shape[:1]
    if queries.dim() != 3 or not (documents.dim() == 3 or candidates) or queries.shape[-1] != documents.shape[-1]:
        return f"embeddings of shapes {list(queries.shape)} and {list(documents.shape)}"
    if not (queries.numel() and documents.numel()) or queries.device != documents.device:
        return "empty embeddings, or embeddings on two devices"
    return None
