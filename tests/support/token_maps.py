"""The two maps of a matching, merge and its transpose, beside float64 matrices."""

from __future__ import annotations

import torch

from pairtile.kernels.token_merging.combine import combine, spread
from pairtile.kernels.token_merging.matching import Matching


def assert_both_maps_round_once(matching: Matching, tokens: int, width: int, dtype: torch.dtype) -> None:
    """Of 2 samples, strided; sizes are drawn."""
    x = torch.randn(tokens, 2, width).to(dtype).transpose(0, 1)
    size = torch.randint(1, 5, (2, tokens)).float()
    total = size.gather(1, matching.kept).scatter_add(1, matching.places, size.gather(1, matching.sources))
    alone = torch.ones_like(total).scatter_(1, matching.places, 0.0) == 1
    assigned = torch.zeros(2, matching.kept.shape[1], tokens, dtype=torch.float64)
    assigned.scatter_(1, matching.place_of().unsqueeze(1), size.double().unsqueeze(1))
    assigned /= total.double().unsqueeze(-1)

    found = combine(x, matching, size, total)
    assert found.dtype == dtype
    assert torch.equal(found[alone], x.gather(1, matching.kept.unsqueeze(-1).expand(-1, -1, width))[alone])
    # Half a unit in the last place, and the rounding of a float32 sum of up to 41 tokens.
    tolerance = {"atol": 1e-6, "rtol": torch.finfo(dtype).eps / 2 + 1e-6}
    torch.testing.assert_close(found.double(), assigned @ x.double(), **tolerance)

    leaf = x.detach().requires_grad_()
    upstream = torch.randn(found.shape).to(dtype)
    (gradient,) = torch.autograd.grad(combine(leaf, matching, size, total), leaf, upstream)
    torch.testing.assert_close(gradient.double(), assigned.mT @ upstream.double(), **tolerance)
    assert torch.equal(spread(found, matching), found.gather(1, matching.place_of()[..., None].expand(-1, -1, width)))
