"""Zero-shot classification: class names in prompt templates, one averaged text embedding per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from ..errors import PairtileError
from ..strict import StrictModel
from .measure import Measure
from .retrieval import rank_metrics, retrieval_ranks
from .topk import SCORE_CHUNK


class ClassificationConfig(StrictModel):
    """Which label of which split is guessed from which prompts."""

    #: Evaluation split this applies to; None: every split that has the label.
    split: str | None = None
    #: The label field of the samples, for example "script".
    label: str
    #: Label value -> word or words put into the templates. None: the values found in the split, as they are.
    classes: dict[str, str | list[str]] | None = None
    #: Each holds "{}", where the word goes.
    templates: list[str] = Field(default_factory=lambda: ["{}"], min_length=1)

    @field_validator("templates")
    @classmethod
    def _has_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template needs exactly one '{{}}' where the class name goes, got '{template}'")
        return templates

    @field_validator("classes")
    @classmethod
    def _has_words(cls, classes: dict[str, str | list[str]] | None) -> dict[str, str | list[str]] | None:
        if classes is not None and len(classes) < 2:
            raise ValueError(f"classes needs at least two entries to tell apart, got {list(classes)}")
        for name, words in (classes or {}).items():
            if not words or not all(words):
                raise ValueError(f"class '{name}' has no words; leave it out or give at least one")
        return classes


class ClassificationResult(StrictModel):
    """Accuracies are fractions in [0, 1]."""

    label: str
    top1: Measure
    top5: Measure
    #: Mean of the per-class top-1 accuracies over the classes that occur: every class counts the same.
    mean_per_class: Measure
    #: Share of the commonest class: what always guessing it would give as top-1.
    majority: Measure
    per_class: dict[str, Measure]
    samples_per_class: dict[str, int]
    samples: int
    #: Samples without the label or with a value outside the classes.
    excluded: int


def class_words(config: ClassificationConfig, labels: Sequence[str | None]) -> dict[str, list[str]]:
    """Label value -> prompt words, from the configuration or from the values found."""
    if config.classes is None:
        found = sorted({label for label in labels if label is not None})
        if len(found) < 2:
            raise PairtileError(f"classification needs at least two values of label '{config.label}', found {found}")
        return {name: [name] for name in found}
    return {name: [words] if isinstance(words, str) else list(words) for name, words in config.classes.items()}


def zero_shot_weights(
    embed_texts: Callable[[list[str]], Tensor], classes: dict[str, list[str]], templates: Sequence[str]
) -> Tensor:
    """One unit vector per class: the mean over words and templates of the unit text embeddings (Radford et al., 2021).

    Args:
        embed_texts: T texts -> [T, D].
        classes: class name -> words.
        templates: each with one "{}".

    Returns:
        float32 [number of classes, D] in the order of ``classes``.
    """
    prompts = [[template.replace("{}", word) for word in words for template in templates] for words in classes.values()]
    features = F.normalize(embed_texts([prompt for group in prompts for prompt in group]).float(), dim=1)
    means = torch.stack([part.mean(dim=0) for part in features.split([len(group) for group in prompts])])
    return F.normalize(means, dim=1)


def classify(
    image_features: Tensor,
    labels: Sequence[str | None],
    class_names: Sequence[str],
    class_weights: Tensor,
    *,
    label: str,
    chunk: int = SCORE_CHUNK,
) -> ClassificationResult:
    """Accuracy of choosing the class with the highest score; ties and NaN count against the model, as in retrieval.

    Args:
        image_features: [N, D], same device as class_weights [C, D].
        labels: N label values, None where a sample has none.
        class_names: C names in the order of the weights.
        label: name of the label field, for the result.
        chunk: scores held at once.
    """
    number = {name: row for row, name in enumerate(class_names)}
    known = [row for row, value in enumerate(labels) if value in number]
    targets = torch.tensor([number[labels[row]] for row in known], dtype=torch.int64)  # type: ignore[index]
    device = image_features.device
    ranks = retrieval_ranks(
        image_features[torch.tensor(known, dtype=torch.int64, device=device)],
        class_weights,
        targets.to(device).unsqueeze(1),
        torch.arange(len(class_names), device=device).unsqueeze(1),
        chunk=chunk,
    ).cpu()
    metrics = rank_metrics(ranks, len(class_names))
    counts = targets.bincount(minlength=len(class_names))
    hits = targets[ranks == 1].bincount(minlength=len(class_names))
    present = counts > 0
    per_class = hits.double() / counts
    return ClassificationResult(
        label=label,
        top1=metrics.recall_at_1,
        top5=metrics.recall_at_5,
        mean_per_class=float(per_class[present].mean()),
        majority=float(counts.max() / counts.sum()),
        per_class={name: float(per_class[row]) for row, name in enumerate(class_names) if present[row]},
        samples_per_class={name: int(counts[row]) for row, name in enumerate(class_names) if present[row]},
        samples=len(known),
        excluded=len(labels) - len(known),
    )
