"""Zero-shot classification: class names in prompt templates, one averaged text embedding per class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from ..errors import PairtileError
from ..strict import StrictModel
from .measure import Measure
from .retrieval import Keys, rank_metrics, ranks_by
from .scorers import Scorer
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


def class_prompts(classes: dict[str, list[str]], templates: Sequence[str]) -> list[list[str]]:
    """Each class' words in all templates, in the order of ``classes``."""
    return [[template.replace("{}", word) for word in words for template in templates] for words in classes.values()]


def zero_shot_weights(features: Tensor, sizes: Sequence[int]) -> Tensor:
    """One unit vector per class: the mean over its prompts of their unit text embeddings (Radford et al., 2021).

    Args:
        features: [T, D], the prompts of all classes, one class behind the other.
        sizes: how many prompts each class has.

    Returns:
        float32 [number of classes, D].
    """
    means = [part.mean(dim=0) for part in F.normalize(features.float(), dim=1).split(list(sizes))]
    return F.normalize(torch.stack(means), dim=1)


def classify(
    scorer: Scorer,
    labels: Sequence[str | None],
    class_names: Sequence[str],
    *,
    label: str,
    device: torch.device | str = "cpu",
    chunk: int = SCORE_CHUNK,
) -> ClassificationResult:
    """Accuracy of choosing the class with the highest score; ties and NaN count against the model, as in retrieval.

    Args:
        scorer: of N images and C classes.
        labels: N label values, None where a sample has none.
        class_names: C names in the scorer's order.
        label: name of the label field, for the result.
        device: of the scores.
        chunk: scores held at once.
    """
    number = {name: row for row, name in enumerate(class_names)}
    # -1 agrees with no class: such an image asks nothing
    targets = torch.tensor([number.get(value, -1) if value is not None else -1 for value in labels], dtype=torch.int64)
    keys = Keys(targets.to(device).unsqueeze(1), torch.arange(len(class_names), device=device).unsqueeze(1))
    ranks = ranks_by(scorer, [keys], chunk=chunk)[0].cpu()
    known = targets >= 0
    targets, ranks = targets[known], ranks[known]
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
        samples=len(targets),
        excluded=len(labels) - len(targets),
    )
