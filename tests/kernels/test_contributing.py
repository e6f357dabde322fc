"""The loss that CONTRIBUTING.md writes as an example: run as it stands there, against its formula."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from against_float64 import assert_as_exact

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def loss_class():
    section = CONTRIBUTING.read_text().split("## Add a loss")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(code, str(CONTRIBUTING), "exec"), names)
    return names["DecoupledLoss"]


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_example_equals_its_dense_formula(backend, loss_class, embeddings, reduction, scale):
    def dense(logits, x, y):
        scores = logits(x, y)
        others = scores.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
        terms = (others.logsumexp(1) + others.logsumexp(0)) / 2 - scores.diagonal()
        return getattr(terms, reduction)()

    assert_as_exact(loss_class(reduction=reduction), dense, embeddings(35, 35, 11), scale)


def test_the_example_checks_and_reduces_like_the_losses_it_stands_for(backend, loss_class, embeddings):
    x, y = (each.float() for each in embeddings(6, 6, 4))
    torch.testing.assert_close(loss_class(reduction="none")(x, y, 3.0).mean(), loss_class()(x, y, 3.0))
    with pytest.raises(ValueError, match="row i of both must embed the same pair"):
        loss_class()(x, y[1:], 3.0)
