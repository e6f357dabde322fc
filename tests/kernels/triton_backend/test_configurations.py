"""Every configuration that ships, in the interpreter and under the sanitizer: against float64, with and without TMA."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from pairtile.kernels import Diagonal, use_backend
from pairtile.kernels.contrastive import arguments
from pairtile.kernels.contrastive.sums import sigmoid_sum
from pairtile.kernels.contrastive.triton_kernels import launching
from pairtile.kernels.contrastive.triton_kernels.configurations import (
    ARCHITECTURES,
    KERNELS,
    PRECISIONS,
    offered,
    pick_config,
)
from similarity_cases import NAMES, Case, cancelling_sizes
from triton_requests import REQUESTS, request_case, run_request

KINDS = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), *((torch.float32, each) for each in PRECISIONS)]


def kinds(arch: str) -> list[tuple[torch.dtype, str]]:
    return [(dtype, precision) for dtype, precision in KINDS if precision in offered(arch)]


@dataclass(frozen=True)
class Variant:
    """What a launch can be in the interpreter: warps and stages do not show there, and one architecture's tiles may
    be another's."""

    arch: str
    dtype: torch.dtype
    precision: str
    tma: bool

    def __str__(self) -> str:
        return f"{self.arch}-{str(self.dtype)[6:]}-{self.precision}-{'descriptors' if self.tma else 'pointers'}"

    def tiles(self, pressure: int = 0) -> tuple:
        """Block sizes and group of each kernel, for a wide D and for a narrow one."""
        picked = [self.config(kernel, d, pressure) for kernel in KERNELS for d in (4096, WIDTHS[self.tma])]
        return tuple((each.block_m, each.block_n, each.block_k, each.group) for each in picked)

    def config(self, kernel: str, d: int, pressure: int = 0):
        more = {"columns": d if kernel == "product" else None, "aligned": self.tma, "pressure": pressure}
        return pick_config(self.arch, kernel, self.dtype, d, self.precision, **more)


#: D, no multiple of a block: rows of a multiple of 16 bytes, and others.
WIDTHS = {True: 72, False: 69}


def spanning_variants(pressure: int = 0) -> list[Variant]:
    """One variant for each set of tiles, dtype and way of loading; bfloat16 and float16 differ in nothing else."""
    found: dict[tuple, Variant] = {}
    for arch in ARCHITECTURES:
        for tma in (True, False) if arch in ("sm90", "sm100") else (False,):
            for dtype, precision in kinds(arch):
                variant = Variant(arch, dtype, precision, tma)
                kind = "16 bit" if dtype != torch.float32 else "float32"
                found.setdefault((kind, tma, variant.tiles(pressure)), variant)
    return list(found.values())


def spanning_cases() -> list[tuple[Variant, str]]:
    """Every variant with one of the requests, every request with some variant."""
    names = list(REQUESTS)
    return [(variant, names[k % len(names)]) for k, variant in enumerate(spanning_variants())]


def test_every_shipped_configuration_is_in_some_case():
    tested = {(variant.tma, variant.tiles()) for variant, _ in spanning_cases()}
    for arch in ARCHITECTURES:
        for dtype, precision in kinds(arch):
            assert (False, Variant(arch, dtype, precision, False).tiles()) in tested
    assert {name for _, name in spanning_cases()} == set(REQUESTS)


def assert_like_float64(found: list[torch.Tensor], case: Case) -> None:
    with use_backend("reference"):
        expected = run_request(case, dtype=torch.float64)
    results = [f"result {k}" for k in range(len(case.rows) + len(case.cols))]
    present = [f"d{name}" for name, each in zip(NAMES, case.operands, strict=True) if each is not None]
    # What passes through zero is measured against the sum of the absolute values of its terms.
    sizes = cancelling_sizes(case)
    assert_close(found, expected, [sizes.get(name, 0.0) for name in (*results, *present)])


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], sizes: list[float]) -> None:
    for k, (given, truth, size) in enumerate(zip(found, expected, sizes, strict=True)):
        finite = truth.isfinite()
        assert torch.equal(given.isfinite(), finite), f"result {k}"
        # The interpreter multiplies in float32 whatever the precision. Results carry float32 sums and scores of size
        # 14; gradients of 16-bit features, and the weights they are made of, are rounded to the features' dtype.
        bound = 5e-6 if given.dtype == torch.float32 else 2 * torch.finfo(given.dtype).eps
        error = (given[finite].double() - truth[finite]).norm() / max(truth[finite].norm(), size)
        assert error < bound, f"result {k}: {error:.2g}"


@pytest.mark.parametrize(("variant", "name"), spanning_cases(), ids=str)
def test_a_shipped_configuration(gpu_safety, monkeypatch, variant, name):
    monkeypatch.setattr(launching, "architecture", lambda device: variant.arch)
    d = WIDTHS[variant.tma]
    tile = variant.config("reduce", d)
    # One line over a tile in one direction, some short of one in the other.
    n, m = (
        (tile.block_m + 1, tile.block_n - 3)
        if name in ("CLIP", "everything", "distillation")
        else (tile.block_m - 3, tile.block_n + 1)
    )
    case = request_case(name, n, m, d, variant.dtype, aligned=variant.tma)
    found = gpu_safety(lambda: run_request(case, precision=variant.precision))
    used = {kernel: config for kernel, config in gpu_safety.launches if config is not None}
    assert used["reduce_tiles"] in [variant.config("reduce", d, pressure) for pressure in range(4)]
    assert used["add_product"] == variant.config("product", d)
    assert_like_float64(found, case)


def sigmoid_and_gradients(case: Case, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The sum of the sigmoid loss, whose terms and weights are made of a tile at once."""
    x, y, scale, bias = (each.detach().requires_grad_() for each in (case.to(dtype) if dtype else case.operands)[:4])
    value = sigmoid_sum(x, y, scale=scale, bias=bias, positive=Diagonal(2))
    return [value.detach(), *torch.autograd.grad(value, (x, y, scale, bias))]


@pytest.mark.parametrize(
    ("pressure", "variant"),
    [
        (pressure, variant)
        for pressure in range(4)
        for variant in spanning_variants(pressure)
        # The sigmoid sum multiplies as torch was told to, which has no word for tf32x3; and most tiles of the highest
        # pressure are those of the one below it.
        if (pressure != 1 or variant.precision != "tf32x3") and (pressure != 3 or variant.tiles(3) != variant.tiles(2))
    ],
    ids=str,
)
def test_a_shipped_configuration_of_each_pressure(gpu_safety, monkeypatch, pressure, variant):
    monkeypatch.setattr(launching, "architecture", lambda device: variant.arch)
    monkeypatch.setattr(arguments, "_torch_rounds", lambda: variant.precision == "tf32")
    d = WIDTHS[variant.tma]
    weigh = variant.config("weigh", d, pressure)
    # Multiples of 16: where edges are ragged even the lightest request gets a smaller tile.
    n, m = weigh.block_m + 16, weigh.block_n + 32
    name = ("CLIP", "SigLIP", "everything", "distillation")[pressure]
    case = request_case(name, n, m, d, variant.dtype, aligned=variant.tma)
    if pressure == 1:
        found = gpu_safety(lambda: sigmoid_and_gradients(case))
        with use_backend("reference"):
            assert_close(found, sigmoid_and_gradients(case, torch.float64), [0.0] * 5)
    else:
        found = gpu_safety(lambda: run_request(case, precision=variant.precision))
        assert_like_float64(found, case)
    used = {kernel: config for kernel, config in gpu_safety.launches if config is not None}
    assert used["weigh_tiles"] == weigh


@pytest.mark.parametrize(("budget", "dtype"), [(1, torch.float16), (100_000, torch.float32)])
def test_several_panels_in_both_directions(gpu_safety, budget, dtype):
    """dx and dy are continued from panel to panel, and the last panel is shorter than its buffer."""
    case = request_case("CLIP", 150, 270, 8, dtype, aligned=True)
    case.budget = budget
    found = gpu_safety(lambda: run_request(case))
    assert [name for name, _ in gpu_safety.launches].count("add_product") > 2
    assert_like_float64(found, case)


@pytest.mark.parametrize("name", ["distillation", "above and largest"])
def test_several_panels_of_every_kind_of_partial_result(gpu_safety, name):
    """The columns' sums, means and largest scores are continued from panel to panel."""
    case = request_case(name, 130, 70, 8, torch.float32, aligned=False)
    case.budget = 1
    found = gpu_safety(lambda: run_request(case))
    assert [name for name, _ in gpu_safety.launches].count("reduce_tiles") > 2
    assert_like_float64(found, case)
