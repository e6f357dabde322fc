"""Diagnostics against their formulas over dense matrices in float64."""

import math

import pytest
import torch

from pairtile.engine.evaluate import diagnose
from pairtile.engine.evaluate.diagnostics import uniformity


def unit(rows: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 9, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("chunk", [1, 37, 2**20])
def test_uniformity_is_the_formula(chunk: int) -> None:
    x = unit(31, 0)
    distances = torch.cdist(x.double(), x.double()).square()
    others = ~torch.eye(31, dtype=torch.bool)
    expected = (-2 * distances[others]).exp().mean().log().item()
    assert uniformity(x, chunk=chunk) == pytest.approx(expected, rel=1e-5)


def test_gap_and_alignment_are_the_formulas() -> None:
    images, texts = unit(12, 1), unit(7, 2)
    owner_image = torch.arange(12)
    owner_text = owner_image % 7
    found = diagnose(3 * images, texts, owner_text, owner_image)  # normalised inside
    assert found.modality_gap == pytest.approx((images.mean(0) - texts.mean(0)).norm().item(), rel=1e-5)
    assert found.alignment == pytest.approx((images - texts[owner_text]).square().sum(1).mean().item(), rel=1e-5)


def test_collapse_sampling_and_too_few() -> None:
    constant = unit(1, 3).expand(50, 9)
    assert uniformity(constant) == pytest.approx(0, abs=1e-5)
    x = unit(400, 4)
    assert uniformity(x, max_samples=200) == pytest.approx(uniformity(x), abs=0.1)
    assert math.isnan(uniformity(constant[:1]))
    assert math.isnan(uniformity(torch.full((4, 9), math.nan)))
    none = torch.zeros(0, dtype=torch.int64)
    assert math.isnan(diagnose(x, torch.zeros(0, 9), none, none).alignment)
