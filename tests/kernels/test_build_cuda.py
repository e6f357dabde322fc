"""The CUDA build without a GPU: what it is asked for, what is missing and said once, and who serves then."""

from __future__ import annotations

import functools
import sys
import warnings

import pytest
import torch

from pairtile.kernels import build, info
from pairtile.kernels.build_cuda import architectures, build_cuda, cuda_build_directory, missing_cuda_tool, with_cuda

MODULE = sys.modules["pairtile.kernels.build_cuda"]
GPU, CPU = torch.device("cuda"), torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """As in test_build.py; an architecture is named, and a toolkit made up."""
    monkeypatch.setenv("PAIRTILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.delenv("PAIRTILE_CUDA", raising=False)
    monkeypatch.setattr(MODULE, "cuda_operators_obstacle", functools.cache(MODULE.cuda_operators_obstacle.__wrapped__))
    monkeypatch.setattr(MODULE, "warn_once", functools.cache(MODULE.warn_once.__wrapped__))
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'tools, release {torch.version.cuda}, V1' || exit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))


def test_what_is_missing_is_said_in_words(monkeypatch, tmp_path):
    if (lacking := missing_cuda_tool()) is not None:
        pytest.skip(lacking)
    nvcc = tmp_path / "bin" / "nvcc"
    told = nvcc.read_text()
    nvcc.write_text(told.replace(torch.version.cuda, "7.5"))
    MODULE._nvcc_version.cache_clear()
    assert "is of CUDA 7.5 and torch of" in missing_cuda_tool()
    nvcc.write_text(told)
    MODULE._nvcc_version.cache_clear()
    (tmp_path / "include" / "cuda_runtime.h").unlink()
    assert "no include/cuda_runtime.h: set CUDA_HOME" in missing_cuda_tool()
    nvcc.unlink()
    assert missing_cuda_tool().startswith("no nvcc: install the CUDA toolkit")
    assert info().cuda_extension.startswith("cannot be built: no nvcc")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    if not torch.cuda.is_available():
        assert missing_cuda_tool() == "no GPU is found, and TORCH_CUDA_ARCH_LIST names none"


def test_triton_serves_after_one_warning_where_nothing_can_be_built(tmp_path):
    (tmp_path / "bin" / "nvcc").unlink()
    with pytest.warns(RuntimeWarning, match="are not built: no .*PAIRTILE_CUDA=0 says"):
        assert with_cuda("triton", GPU) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_cuda("triton", GPU) == "triton"


def test_a_build_that_fails_is_a_warning_too(monkeypatch):
    if (lacking := missing_cuda_tool()) is not None:
        pytest.skip(lacking)
    attempts = []

    def fail(*arguments, **options):
        attempts.append(arguments)
        raise RuntimeError("ninja: no")

    monkeypatch.setattr(MODULE, "compile_library", fail)
    with pytest.warns(RuntimeWarning, match="failed to build: ninja: no"):
        assert build_cuda() is None
    assert with_cuda("triton", GPU) == with_cuda("triton", GPU) == "triton"
    assert len(attempts) == 2, "once by build_cuda, once by the first operator"


def test_cuda_takes_the_place_of_triton_on_gpus_alone(monkeypatch):
    monkeypatch.setattr(MODULE, "cuda_operators_obstacle", lambda: None)
    assert with_cuda("triton", GPU) == "cuda"
    assert with_cuda("triton", CPU) == "triton"
    assert with_cuda("torch", GPU) == "torch"
    for no in ("0", "off"):
        monkeypatch.setenv("PAIRTILE_CUDA", no)
        assert with_cuda("triton", GPU) == "triton"


def test_build_asks_for_it_where_there_is_something_to_build_for(monkeypatch):
    asked = []
    monkeypatch.setattr(MODULE, "build_cuda", lambda **options: asked.append(options))
    monkeypatch.setattr(sys.modules["pairtile.kernels.build"], "_attempt", lambda verbose: (None, None))
    build()
    monkeypatch.setenv("PAIRTILE_CUDA", "0")
    build()
    assert asked == [{"verbose": False}]


def test_the_build_directory_depends_on_the_architectures(monkeypatch):
    first = cuda_build_directory()
    assert architectures() == "8.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    assert cuda_build_directory().name != first.name
