"""Diagnostics of a training batch."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .evaluate.gather import Ranks
from .model import DualOutput
from .runtime import Runtime


@torch.no_grad()
def in_batch_accuracy(output: DualOutput, runtime: Runtime) -> tuple[float, float]:
    """Share of the global batch's images whose best text, by the pooled embeddings, is their own, and the reverse.

    Each rank compares its rows with the columns of all ranks, so nothing larger than [n_local, N] is made.
    """
    pairs = ((output.image_features, output.text_features), (output.text_features, output.image_features))
    ranks = Ranks(runtime.rank, runtime.world_size, runtime.group, runtime.device)
    sizes = ranks.gather_rows(torch.tensor([[len(output.image_features)]])).flatten().tolist()
    hits = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for direction, (queries, candidates) in enumerate(pairs):
        columns = ranks.gather_rows(candidates.detach().float()).to(runtime.device)
        if len(queries):
            nearest = (queries.detach().float() @ columns.T).argmax(1)
            offset = sum(sizes[: runtime.rank])
            own = torch.arange(offset, offset + len(queries), device=nearest.device)
            hits[direction] = (nearest == own).sum()
    if runtime.world_size > 1:
        dist.all_reduce(hits)
    image_to_text, text_to_image = (hits / max(sum(sizes), 1)).tolist()
    return image_to_text, text_to_image
