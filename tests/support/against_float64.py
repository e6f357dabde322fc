"""Holding a loss in float32 to its dense formula in float64: value and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pairtile.kernels.backends import select_backend


class Logits:
    """`logits(x, y)` is scale * x y^T, and remembers how large the sums were that became the scale's gradient."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        product = x @ y.T
        logits = self.scale * product
        if logits.requires_grad:
            logits.retain_grad()
        self._seen.append((product.detach(), logits))
        return logits

    def size_of_scale_gradient(self) -> float:
        """sum |G_ij <x_i, y_j>|, G = d loss / d logits: the gradient of the scale passes through zero, this does not."""
        used = [(product, logits.grad) for product, logits in self._seen if logits.grad is not None]
        return sum((grad * product).abs().sum().item() for product, grad in used)


def relative_error(given: Tensor, truth: Tensor, size: float = 0.0) -> float:
    """Norm of the difference over the norm of the truth, or over `size` if that is larger."""
    given, truth = given.detach().double(), truth.detach().double()
    return ((given - truth).norm() / max(truth.norm().item(), size, 1e-30)).item()


def assert_as_exact(
    ours: Callable[..., Tensor], dense: Callable[..., Tensor], features: Sequence[Tensor], scale: float
) -> None:
    """Our error against float64 is at most twice that of the dense formula in float32, or 2e-6 (5e-6 on triton).

    Args:
        ours: called as ours(*features, scale), returns a scalar.
        dense: called as dense(logits, *features) with `Logits`, the formula as in the paper.
        features: float64 tensors; rounded to float32 first, so that this rounding is nobody's error.
        scale: the logit scale.
    """
    rounded = [each.float().double() for each in (*features, torch.tensor(scale))]

    def formula(*leaves: Tensor) -> tuple[Tensor, Logits]:
        logits = Logits(leaves[-1])
        return dense(logits, *leaves[:-1]), logits

    truth, logits = _value_and_gradients(formula, rounded, torch.float64)
    eager, _ = _value_and_gradients(formula, rounded, torch.float32)
    given, _ = _value_and_gradients(lambda *leaves: (ours(*leaves), None), rounded, torch.float32)
    # Where the truth vanishes (the gradient of a batch of one, say) errors count absolutely, in units of 1e-3.
    sizes = [1e-3] * (1 + len(features)) + [logits.size_of_scale_gradient()]
    names = ["value", *(f"gradient of features[{k}]" for k in range(len(features))), "gradient of the scale"]
    # triton multiplies the scale by log2(e) before the cosines: one rounding that moves all scores of a row alike.
    floor = 5e-6 if select_backend(torch.device("cpu"))[0] == "triton" else 2e-6
    for name, right, plain, fast, size in zip(names, truth, eager, given, sizes):
        assert fast.shape == right.shape, name
        bound = max(floor, 2 * relative_error(plain, right, size))
        assert bound < 0.01, f"{name}: the bound must mean something"
        assert relative_error(fast, right, size) <= bound, name


def _value_and_gradients(function, inputs, dtype):
    leaves = [each.detach().to(dtype, copy=True).requires_grad_() for each in inputs]
    value, logits = function(*leaves)
    value.backward()
    # What a loss does not depend on (a direction of weight 0) has no gradient, or one of zeros.
    return [value.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)], logits
