"""Evaluates a split: embed, rank, classify, and optionally draw what text-to-image retrieval finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PairtileError
from ..strict import StrictModel
from .classification import (
    ClassificationConfig,
    ClassificationResult,
    class_prompts,
    class_words,
    classify,
    zero_shot_weights,
)
from .diagnostics import Diagnostics, diagnose
from .embed import Encoder, SplitEmbeddings, embed_split, evaluation_mode, make_encoder
from .equivalence import IdCeiling, id_ceiling, match_keys
from .retrieval import Keys, RetrievalMetrics, RetrievalResult, retrieval_metrics
from .scorers import GroupMeanScorer, PooledScorer, Scorer, Scores, Scoring, Side, TokenScorer
from .sheet_rows import draw_retrieval_sheet
from .topk import SCORE_CHUNK


class SubsetResult(StrictModel):
    """Retrieval on a split or on a part of it."""

    images: int
    captions: int
    image_to_text: RetrievalMetrics
    text_to_image: RetrievalMetrics
    #: The same with nothing but the id counted as correct; None where that makes no difference.
    id_only: RetrievalResult | None
    #: The best R@1 that ``id_only`` allows; None with it.
    id_ceiling: IdCeiling | None


class SplitResult(StrictModel):
    """Everything measured on one split. What is undefined is NaN, and null in JSON."""

    split: str
    #: ``{split}`` first, then ``{split}/without_{flag}``.
    subsets: dict[str, SubsetResult]
    diagnostics: Diagnostics
    classification: ClassificationResult | None
    #: Captions whose text also belongs to another id; such pairs tie and count against the model.
    ambiguous_captions: int
    #: Unreadable samples, by reason.
    skipped: dict[str, int]
    #: What ranked: cosines of pooled embeddings, late interaction, or late interaction of the best by cosine.
    scores: Scores = "pooled"
    #: How many of them; None where nothing was scored again.
    rerank_top: int | None = None

    @property
    def retrieval(self) -> SubsetResult:
        """The whole split."""
        return self.subsets[self.split]

    def scalars(self) -> dict[str, float]:
        """Flat names for logs, such as ``val/text_to_image/R@1`` and ``val/script/top1``."""
        flat: dict[str, float] = {}
        for name, subset in self.subsets.items():
            for direction in ("image_to_text", "text_to_image"):
                metrics: RetrievalMetrics = getattr(subset, direction)
                flat[f"{name}/{direction}/R@1"] = metrics.recall_at_1
                flat[f"{name}/{direction}/R@5"] = metrics.recall_at_5
                flat[f"{name}/{direction}/R@10"] = metrics.recall_at_10
                flat[f"{name}/{direction}/median_rank"] = metrics.median_rank
        flat |= {f"{self.split}/{name}": value for name, value in self.diagnostics.model_dump().items()}
        if self.classification is not None:
            for name in ("top1", "top5", "mean_per_class"):
                flat[f"{self.split}/{self.classification.label}/{name}"] = getattr(self.classification, name)
        return flat


def evaluate_split(
    model: Any,
    dataset: Any,
    *,
    split: str,
    batch_size: int,
    device: torch.device | str,
    group: dist.ProcessGroup | None = None,
    rank: int = 0,
    world_size: int = 1,
    match_ids: Sequence[str] = ("drawing",),
    without_flags: Sequence[str] = ("drawing_in_train",),
    classification: ClassificationConfig | None = None,
    autocast: torch.dtype | None = None,
    contact_sheet: Path | None = None,
    progress: Callable[[int], None] | None = None,
    chunk: int = SCORE_CHUNK,
    scores: Scores = "pooled",
    rerank_top: int = 100,
) -> SplitResult:
    """Zero-shot retrieval both ways and, when asked for, zero-shot classification.

    Collective: all ranks of ``group`` (None: the default group) call it and all get the same result. Embedding is
    shared out; scores are computed on the first rank, on ``device``.

    Args:
        model: has encode_image(images uint8 [n, C, H, W], normalize=True) and encode_text(input_ids int64 [n, L],
            attention_mask bool [n, L], normalize=True), both -> [n, D]; or wraps such a model as ``.module``. For late
            interaction embed_image and embed_text of the same arguments, both -> (pooled [n, D], (tokens [n, l, d],
            mask bool [n, l])).
        dataset: a split with ``tokenizer`` and ``config.context_length``, for :func:`..data.iterate_split`.
        split: its name in the result.
        batch_size: images or texts per forward and rank.
        match_ids: names of further ids that make a pair correct (those the data does not have are ignored).
        without_flags: for each flag that the data has, also report ``{split}/without_{flag}``: images with the flag
            left out, and captions that describe no other image.
        classification: ignored if it names another split.
        autocast: dtype of torch.autocast, or None.
        contact_sheet: PNG file that the first rank draws.
        progress: called with the number of images of each batch on this rank.
        chunk: scores held at once.
        scores, rerank_top: what ranks, as in :class:`.scorers.Scoring`; diagnostics are of the pooled embeddings.

    Raises:
        PairtileError: no readable sample, or no such label.
    """
    encoder = make_encoder(
        model,
        dataset,
        batch_size=batch_size,
        device=device,
        group=group,
        rank=rank,
        world_size=world_size,
        autocast=autocast,
        tokens=scores != "pooled",
    )
    scoring = Scoring(scores, rerank_top, device, chunk)
    embeddings = embed_split(encoder, dataset, split=split, progress=progress)
    classifier = None
    if classification is not None and classification.split in (None, split):
        classifier = _classifier(encoder, embeddings, classification, split, scoring)

    result = None
    if rank == 0:
        # A surrounding autocast must not round the scores.
        with torch.autocast(torch.device(device).type, enabled=False):
            result = score_split(
                embeddings, split=split, match_ids=match_ids, without_flags=without_flags, scoring=scoring
            )
            if classifier is not None and classification is not None:
                scorer, names = classifier
                label = classification.label
                result.classification = classify(
                    scorer, embeddings.labels[label], names, label=label, device=device, chunk=chunk
                )
            if contact_sheet is not None:
                draw_retrieval_sheet(
                    contact_sheet, dataset, embeddings, split=split, scoring=scoring, match_ids=match_ids, result=result
                )
    # The first rank's figures count everywhere: a decision taken on them must not differ between ranks.
    shared = encoder.ranks.from_first(None if result is None else result.model_dump_json())
    return SplitResult.model_validate_json(shared)


def score_split(
    embeddings: SplitEmbeddings,
    *,
    split: str,
    match_ids: Sequence[str] = ("drawing",),
    without_flags: Sequence[str] = ("drawing_in_train",),
    scoring: Scoring | None = None,
) -> SplitResult:
    """Retrieval and diagnostics of a split that is embedded already; arguments as in :func:`evaluate_split`."""
    scoring = scoring or Scoring()
    images, texts = embeddings.image_features.to(scoring.device), embeddings.text_features.to(scoring.device)
    owners = embeddings.owner_text.to(scoring.device), embeddings.owner_image.to(scoring.device)
    everything = torch.ones(len(images), dtype=torch.bool)
    subsets = {split: everything}
    for flag in without_flags:
        if flag in embeddings.flags:
            subsets[f"{split}/without_{flag}"] = ~embeddings.flags[flag]
    return SplitResult(
        split=split,
        subsets={name: _score_subset(embeddings, kept, match_ids, scoring) for name, kept in subsets.items()},
        diagnostics=diagnose(images, texts, *owners),
        classification=None,
        ambiguous_captions=embeddings.ambiguous_captions(),
        skipped=dict(Counter(reason for _, reason in embeddings.skipped)),
        scores=scoring.by,
        rerank_top=scoring.top if scoring.by == "rerank" else None,
    )


def _score_subset(
    embeddings: SplitEmbeddings, kept: Tensor, match_ids: Sequence[str], scoring: Scoring
) -> SubsetResult:
    """Retrieval among the kept images and the captions that describe at least one of them."""
    kept_texts = torch.zeros(len(embeddings.texts), dtype=torch.bool)
    kept_texts[embeddings.owner_text[kept[embeddings.owner_image]]] = True
    image_keys, text_keys = match_keys(
        embeddings.image_ids,
        embeddings.text_ids,
        [embeddings.ids_extra[name] for name in match_ids if name in embeddings.ids_extra],
        embeddings.owner_text,
        embeddings.owner_image,
    )
    images, texts = embeddings.images, embeddings.captions
    if not bool(kept.all()):
        images, texts = images.select(kept.nonzero().flatten()), texts.select(kept_texts.nonzero().flatten())
    keys = Keys(image_keys[kept].to(scoring.device), text_keys[kept_texts].to(scoring.device))
    asked = [keys] if keys.queries.shape[1] == 1 else [keys, Keys(keys.queries[:, :1], keys.candidates[:, :1])]
    result, *others = retrieval_metrics(images, texts, asked, scoring)
    id_only, ceiling = None, None
    if others:
        id_only = others[0]
        drawings = embeddings.ids_extra[next(name for name in match_ids if name in embeddings.ids_extra)][kept]
        ceiling = id_ceiling(embeddings.image_ids[kept], drawings, embeddings.text_ids[kept_texts])
    return SubsetResult(
        images=len(images),
        captions=len(texts),
        image_to_text=result.image_to_text,
        text_to_image=result.text_to_image,
        id_only=id_only,
        id_ceiling=ceiling,
    )


def _classifier(
    encoder: Encoder, embeddings: SplitEmbeddings, config: ClassificationConfig, split: str, scoring: Scoring
) -> tuple[Scorer, list[str]]:
    """The scorer of images and classes, and the classes' names. Collective: prompts are embedded in shares.

    Pooled embeddings are averaged over a class' prompts, as in CLIP; scores of late interaction are, as in FILIP.
    """
    if config.label not in embeddings.labels:
        known = ", ".join(embeddings.labels) or "none"
        raise PairtileError(f"samples of '{split}' have no label '{config.label}' to classify; labels found: {known}")
    classes = class_words(config, embeddings.labels[config.label])
    if not any(label in classes for label in embeddings.labels[config.label]):
        raise PairtileError(
            f"no sample of '{split}' has a '{config.label}' among the classes {', '.join(classes)}; "
            "name the label values of the data"
        )
    prompts = class_prompts(classes, config.templates)
    sizes = [len(group) for group in prompts]
    with evaluation_mode(encoder.model):
        texts = encoder.texts([prompt for group in prompts for prompt in group])
    return _class_scorer(embeddings.images, texts, sizes, scoring), list(classes)


def _class_scorer(images: Side, prompts: Side, sizes: list[int], scoring: Scoring) -> Scorer:
    if images.tokens is not None and prompts.tokens is not None:
        # a few classes: there is nothing to choose before all are compared
        return GroupMeanScorer(TokenScorer(images.tokens, prompts.tokens, scoring.device), sizes)
    weights = zero_shot_weights(prompts.pooled, sizes)
    return PooledScorer(images.pooled.to(scoring.device), weights.to(scoring.device))
