"""Zero-shot classification against a dense computation, and its configuration."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from pairtile.engine.errors import PairtileError
from pairtile.engine.evaluate import ClassificationConfig, PooledScorer, classify, zero_shot_weights
from pairtile.engine.evaluate.classification import class_prompts, class_words


def embed(texts: list[str]) -> torch.Tensor:
    """A different vector for each text, not of unit length."""
    rows = [torch.randn(8, generator=torch.Generator().manual_seed(sum(map(ord, text)))) * len(text) for text in texts]
    return torch.stack(rows)


def test_weights_are_the_mean_of_unit_vectors() -> None:
    classes = {"greek": ["Greek", "Hellenic"], "latin": ["Latin"]}
    templates = ["a {} letter", "{} (script)", "the {} glyph"]
    greek, latin = class_prompts(classes, templates)
    weights = zero_shot_weights(embed([*greek, *latin]), [len(greek), len(latin)])
    prompts = [t.replace("{}", word) for word in classes["greek"] for t in templates]
    assert greek == prompts
    expected = F.normalize(F.normalize(embed(prompts), dim=1).mean(dim=0), dim=0)
    torch.testing.assert_close(weights[0], expected)
    assert weights.shape == (2, 8)
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(2))


def test_accuracies_equal_the_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"class {number}" for number in range(9)]
    images, weights = torch.randn(101, 8, generator=generator), torch.randn(9, 8, generator=generator)
    targets = torch.randint(0, 8, (101,), generator=generator)  # the last class never occurs
    labels: list[str | None] = [names[target] for target in targets]
    labels[3], labels[50] = None, "unheard of"
    kept = [row for row in range(101) if row not in (3, 50)]
    result = classify(PooledScorer(images, weights), labels, names, label="kind", chunk=40)

    scores, targets = (images @ weights.T)[kept], targets[kept]
    top5 = scores.topk(5, dim=1).indices
    hits = top5[:, 0] == targets
    assert result.top1 == pytest.approx(hits.double().mean().item())
    assert result.top5 == pytest.approx((top5 == targets[:, None]).any(1).double().mean().item())
    per_class = {names[c]: hits[targets == c].double().mean().item() for c in range(8)}
    assert result.per_class == pytest.approx(per_class)
    assert result.mean_per_class == pytest.approx(sum(per_class.values()) / 8)
    assert result.majority == pytest.approx(targets.bincount().max().item() / 99)
    assert (result.samples, result.excluded, sum(result.samples_per_class.values())) == (99, 2, 99)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_collapsed_model_guesses_nothing(value: float) -> None:
    labels = ["a", "b", "c"] * 4
    scorer = PooledScorer(torch.full((12, 4), value), torch.ones(3, 4))
    result = classify(scorer, labels, ["a", "b", "c"], label="kind")
    assert result.top1 == 0


def test_words_come_from_the_data_or_the_configuration() -> None:
    assert class_words(ClassificationConfig(label="x"), ["b", None, "a", "b"]) == {"a": ["a"], "b": ["b"]}
    config = ClassificationConfig(label="x", classes={"a": "ay", "b": ["bee", "B"]})
    assert class_words(config, []) == {"a": ["ay"], "b": ["bee", "B"]}
    with pytest.raises(PairtileError, match="at least two values"):
        class_words(ClassificationConfig(label="x"), ["a", None])


@pytest.mark.parametrize(
    "wrong",
    [
        {"templates": ["no place"]},
        {"templates": []},
        {"templates": ["{} and {}"]},
        {"classes": {"only": "one"}},
        {"classes": {"a": [], "b": "bee"}},
        {"lable": "x"},
    ],
)
def test_wrong_configurations_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        ClassificationConfig(**{"label": "x", **wrong})
