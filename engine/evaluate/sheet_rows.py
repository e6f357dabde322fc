"""Chooses queries of an embedded split and draws what they retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import iterate_split
from .contact_sheet import ContactRow, draw_contact_sheet
from .embed import SplitEmbeddings
from .equivalence import match_keys
from .retrieval import Keys, ranks_by
from .scorers import Scoring
from .topk import best_first

if TYPE_CHECKING:
    from .run import SplitResult


def draw_retrieval_sheet(
    path: Path,
    dataset: Any,
    embeddings: SplitEmbeddings,
    *,
    split: str,
    scoring: Scoring,
    match_ids: Sequence[str] = ("drawing",),
    result: SplitResult | None = None,
    rows: int = 10,
    top: int = 5,
    seed: int = 0,
) -> None:
    """Draws ``rows`` captions, drawn at random (not the best ones), each with its ``top`` images.

    Reads the split once more for the pixels. Call it on one rank only. Draws nothing if the split has no captions.

    Args:
        path: the PNG.
        dataset: the split that ``embeddings`` come from.
        split: its name, for the title.
        scoring: what ranks.
        match_ids: as in :func:`evaluate_split`.
        result: adds the split's recalls below the title.
        seed: of the choice of queries.
    """
    count = len(embeddings.texts)
    if count == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:rows].sort().values
    equivalences = [embeddings.ids_extra[name] for name in match_ids if name in embeddings.ids_extra]
    image_keys, text_keys = match_keys(
        embeddings.image_ids, embeddings.text_ids, equivalences, embeddings.owner_text, embeddings.owner_image
    )
    scorer = scoring.scorer(embeddings.captions.select(chosen), embeddings.images)
    keys = Keys(text_keys[chosen].to(scoring.device), image_keys.to(scoring.device))
    ranks = ranks_by(scorer, [keys], chunk=scoring.chunk)[0].tolist()
    places = best_first(scorer.scores(slice(0, len(chosen))).float(), top).cpu()
    pixels = _pixels(dataset, {int(index) for index in embeddings.index[places.flatten()]})

    sheet = []
    for row, (text, best) in enumerate(zip(chosen.tolist(), places.tolist())):
        correct = ((image_keys[best] == text_keys[text]) & (text_keys[text] != -1)).any(dim=1).tolist()
        shown = [(pixels.get(int(embeddings.index[image])), right) for image, right in zip(best, correct)]
        sheet.append(
            ContactRow(
                query=embeddings.texts[text],
                images=[image for image, _ in shown if image is not None],
                correct=[right for image, right in shown if image is not None],
                note=f"rank {ranks[row]:,}" if ranks[row] <= len(image_keys) else "not found",
            )
        )
    draw_contact_sheet(path, sheet, title=f"Text to image retrieval: {split}", subtitle=_subtitle(embeddings, result))


def _subtitle(embeddings: SplitEmbeddings, result: SplitResult | None) -> str:
    subtitle = f"random queries among {len(embeddings.texts):,} captions, {len(embeddings.keys):,} images"
    if result is not None:
        metrics = result.retrieval.text_to_image
        subtitle += (
            f"   R@1 {metrics.recall_at_1:.1%}   R@5 {metrics.recall_at_5:.1%}   R@10 {metrics.recall_at_10:.1%}"
        )
    return subtitle


def _pixels(dataset: Any, wanted: set[int]) -> dict[int, Tensor]:
    """Sample index -> uint8 [C, H, W] for the wanted samples."""
    found: dict[int, Tensor] = {}
    for batch in iterate_split(dataset, batch_size=64):
        for row, index in enumerate(batch.index.tolist()):
            if index in wanted:
                found[index] = batch.images[row].clone()
        if len(found) == len(wanted):
            break
    return found
