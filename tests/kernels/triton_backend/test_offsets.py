"""Addresses beyond 2^31 elements: no product of two sizes is a 32-bit number, and such rows are read where they lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from pairtile.kernels import use_backend
from triton_requests import request_case, run_request

WORKER = Path(__file__).resolve().parents[2] / "support" / "ttir_worker.py"


def test_no_product_of_two_sizes_has_32_bits():
    """An index is below N, M or D, and so is the product of a block size and the number of a block; a stride, or another
    length, makes it large."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, WORKER], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("planted"), "the search itself finds nothing"
    assert not found.pop("planted, wide")
    late = {"max_sweep", "max_long", "gather_sum", "soft_sweep", "soft_gradient"}
    tokens = {"partner_sweep", "energy_sweep", "combine_rows", "spread_rows"}
    assert set(found) >= {"reduce_tiles", "merge_partials", "weigh_tiles", "add_product"} | late | tokens
    assert not any(found.values()), found


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_rows_beyond_the_31st_bit(monkeypatch, arch):
    """The interpreter asserts that no 32-bit number overflows, and reads the true address."""
    from triton.runtime.interpreter import GridExecutor

    from pairtile.kernels.contrastive.triton_kernels import launching

    n, stride = 70, 2**25
    case = request_case("CLIP", n, n, 9, torch.float16, aligned=True)
    expected = run_request_on_triton(case)
    # 4 GiB of which 70 pages are ever touched.
    far = torch.empty(n * stride, dtype=torch.float16).as_strided((n, 9), (stride, 1))
    case.operands[1] = far.copy_(case.operands[1])
    monkeypatch.setattr(launching, "architecture", lambda device: arch)
    # On the CPU it copies each storage onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
    for given, near in zip(run_request_on_triton(case), expected, strict=True):
        torch.testing.assert_close(given, near, rtol=1e-3, atol=1e-6)  # other tiles, other sums


def run_request_on_triton(case):
    with use_backend("triton"):
        return run_request(case)
