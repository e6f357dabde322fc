"""Which backend serves, and that importing the kernels needs nothing but torch and disturbs nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pairtile.kernels import ClipLoss, LogSumExp, info, similarity_reduce, use_backend
from pairtile.kernels.backends import expected_backend, select_backend
from pairtile.kernels.build import operators_obstacle

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def default_backend() -> str:
    return "cpp" if operators_obstacle() is None else "torch"


def gpu_backend() -> str:
    return "triton" if find_spec("triton") is not None else "torch"


def test_the_innermost_choice_wins_over_the_environment(monkeypatch):
    monkeypatch.delenv("PAIRTILE_BACKEND", raising=False)
    assert select_backend(CPU) == (default_backend(), "default for cpu")
    assert select_backend(torch.device("cuda")) == (gpu_backend(), "default for cuda")
    monkeypatch.setenv("PAIRTILE_BACKEND", "reference")
    assert select_backend(CPU) == ("reference", "PAIRTILE_BACKEND")
    with use_backend("torch"):
        with use_backend("reference"):
            assert select_backend(CPU) == ("reference", "use_backend")
        assert select_backend(CPU) == ("torch", "use_backend")
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert select_backend(CPU) == ("torch", "use_backend")


def test_a_choice_belongs_to_its_thread(monkeypatch):
    monkeypatch.delenv("PAIRTILE_BACKEND", raising=False)
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(select_backend(CPU)[0]))
        thread.start()
        thread.join()
    assert seen == [default_backend()]


def test_unknown_backends_are_refused_with_the_list(monkeypatch):
    with (
        pytest.raises(ValueError, match="use_backend: no backend 'cuda'; available here: reference, torch, cpp"),
        use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv("PAIRTILE_BACKEND", "fast")
    with pytest.raises(ValueError, match="PAIRTILE_BACKEND: no backend 'fast'"):
        ClipLoss()(torch.zeros(2, 3), torch.zeros(2, 3), 1.0)


def test_the_backward_keeps_the_backend_of_its_forward():
    x = torch.randn(4, 3, requires_grad=True)
    with use_backend("torch"):
        loss = ClipLoss()(x, torch.randn(4, 3), 1.0)
    with use_backend("reference"), pytest.raises(RuntimeError, match="twice on the torch backend"):
        torch.autograd.grad(torch.autograd.grad(loss, x, create_graph=True)[0].sum(), x)


def test_cpp_serves_what_it_can_and_torch_the_rest(cpp):
    for dtype, served in ((torch.float32, "pairtile"), (torch.bfloat16, "pairtile"), (torch.float64, "_Similarity")):
        x = torch.ones(2, 3, dtype=dtype, requires_grad=True)
        (lse,), _ = similarity_reduce(x, x, scale=1.0, rows=[LogSumExp()])
        assert served in lse.grad_fn.name()
    with pytest.raises(ValueError, match='the backend "cpp", which serves the CPU alone, but tensors are on meta'):
        select_backend(torch.device("meta"))


def test_triton_serves_cpu_tensors_in_its_interpreter_alone(monkeypatch):
    pytest.importorskip("triton")
    with use_backend("triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert select_backend(CPU) == ("triton", "use_backend")
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(
            ValueError, match='asks for the backend "triton", which serves GPUs, but tensors are on cpu'
        ):
            select_backend(CPU)
        assert select_backend(torch.device("cuda")) == ("triton", "use_backend")


def test_gpus_without_triton_fall_back_to_torch_after_a_warning(tmp_path):
    code = """
import sys, warnings
sys.modules["triton"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch
from pairtile.kernels import use_backend
from pairtile.kernels.backends import select_backend
with warnings.catch_warnings(record=True) as caught:
    for _ in range(3):
        print(select_backend(torch.device("cuda"))[0])
print([str(each.message) for each in caught])
try:
    with use_backend("triton"):
        pass
except RuntimeError as error:
    print(error)
"""
    printed = python(code, tmp_path, PAIRTILE_BACKEND="")
    assert printed.startswith("torch\ntorch\ntorch\n")
    assert printed.count("The torch backend serves on the GPU, which is slower, because the package triton is not") == 1
    assert 'use_backend asks for the backend "triton", but the package triton is not installed' in printed


FIRST_USE = """
import threading, torch
from pairtile.kernels import ClipLoss
together, values = threading.Barrier(4), []
def use():
    together.wait()
    values.append(ClipLoss()(torch.eye(3), torch.eye(3), 2.0).item())
threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(values), len(set(values)))
"""


def test_threads_may_share_the_first_use(tmp_path):
    assert python(FIRST_USE, tmp_path, PAIRTILE_BACKEND="").strip() == "4 1"


@pytest.mark.parametrize("chosen", ["use_backend", "environment"])
def test_cpp_by_name_is_an_error_where_it_cannot_be_built(tmp_path, chosen):
    code = f"""
import torch
from pairtile.kernels import ClipLoss, info, use_backend
try:
    with use_backend("{"cpp" if chosen == "use_backend" else "torch"}"):
        pass
    ClipLoss()(torch.eye(3), torch.eye(3), 2.0)
except RuntimeError as error:
    print(error)
    print(info().serves)
"""
    environment = {"PAIRTILE_BACKEND": "cpp" if chosen == "environment" else ""}
    printed = python(code, tmp_path, CXX="no-such-compiler", PAIRTILE_CACHE=str(tmp_path), **environment)
    given_by = {"use_backend": "use_backend", "environment": "PAIRTILE_BACKEND"}[chosen]
    assert printed.startswith(f'{given_by} asks for the backend "cpp", but pairtile\'s C++ operators are not built')
    assert "no-such-compiler is not on the PATH" in printed


def test_the_default_falls_back_to_torch_after_one_warning(tmp_path):
    code = """
import warnings, torch
from pairtile.kernels import ClipLoss, build
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        ClipLoss()(torch.eye(3), torch.eye(3), 2.0)
    build()
print([str(each.message) for each in caught])
"""
    printed = python(code, tmp_path, CXX="no-such-compiler", PAIRTILE_CACHE=str(tmp_path), PAIRTILE_BACKEND="")
    assert printed.count("The torch backend serves on the CPU, because pairtile's C++ operators are not built") == 1
    assert printed.count("no-such-compiler is not on the PATH") == 1


def test_what_would_serve_is_told_without_building_it(monkeypatch, tmp_path):
    built = operators_obstacle() is None
    monkeypatch.setenv("PAIRTILE_CACHE", str(tmp_path))
    monkeypatch.delenv("PAIRTILE_BACKEND", raising=False)
    if built:
        assert expected_backend(CPU) == ("cpp", "for cpu; compiled on first use")
    monkeypatch.setenv("PAIRTILE_BACKEND", "cpp")
    assert expected_backend(torch.device("cuda"))[0] == "none"
    with pytest.raises(ValueError, match='PAIRTILE_BACKEND asks for the backend "cpp", which serves the CPU alone'):
        select_backend(torch.device("cuda"))
    monkeypatch.setenv("PAIRTILE_BACKEND", "fast")
    assert expected_backend(CPU)[0] == "none"
    assert "no backend 'fast'" in str(info())
    assert not list(tmp_path.iterdir())


def test_info_reports_this_machine():
    found = info()
    assert found.versions["torch"] == torch.__version__.split("+")[0] or found.versions["torch"] == torch.__version__
    assert found.serves["cpu"][0] in found.backends
    for expected in ("versions", "compiler", "served by", "reference"):
        assert expected in str(found)


BLOCKED = """
import sys, time
class Blocker:
    names = {"triton", "deepspeed", "timm", "transformers", "typer", "pydantic", "open_clip", "numpy", "setuptools"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
import torch
sys.modules["fcntl"] = None  # Windows has none
start = time.perf_counter()
import pairtile.kernels
seconds = time.perf_counter() - start
x = torch.eye(3, requires_grad=True)
pairtile.kernels.ClipLoss()(x, torch.eye(3), 2.0).backward()
assert x.grad.abs().sum() > 0
print(pairtile.kernels.info())
print("seconds", seconds)
"""


def test_torch_alone_is_enough(tmp_path):
    printed = python(BLOCKED, tmp_path, CXX="no-such-compiler")
    assert "cannot be built: no C++ compiler: no-such-compiler is not on the PATH" in printed
    # Beside torch itself there is nothing to load: milliseconds, with room for a busy machine.
    assert float(printed.rsplit("seconds", 1)[1]) < 1.0


def test_python_m_info_prints_one_page_and_no_warning():
    done = subprocess.run(
        [sys.executable, "-m", "pairtile.kernels.info"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "served by" in done.stdout
    assert "RuntimeWarning" not in done.stderr


SHADOW = """
import sys
sys.path.insert(0, "")
import transformers
from transformers.utils import is_kernels_available
assert is_kernels_available() is False
from transformers import CLIPTextModel
import kernels
assert kernels.__file__.endswith("kernels/__init__.py")
assert not hasattr(kernels, "__version__") and not hasattr(kernels, "ClipLoss")
assert [name for name in sys.modules if name.startswith("kernels.")] == [], "the folder did work under a foreign name"
import pairtile.kernels
print(pairtile.kernels.ClipLoss.__module__)
"""


def test_the_folder_is_not_taken_for_the_package_that_transformers_looks_for():
    pytest.importorskip("transformers")
    assert python(SHADOW, ROOT).strip() == "pairtile.kernels.losses.clip"
