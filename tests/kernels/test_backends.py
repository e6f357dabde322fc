"""Which backend serves, and that importing the kernels needs nothing but torch and disturbs nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pairtile.kernels import ClipLoss, info, use_backend
from pairtile.kernels.backends import select_backend

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_innermost_choice_wins_over_the_environment(monkeypatch):
    monkeypatch.delenv("PAIRTILE_BACKEND", raising=False)
    assert select_backend(CPU) == ("torch", "default for cpu")
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
    assert seen == ["torch"]


def test_unknown_backends_are_refused_with_the_list(monkeypatch):
    with (
        pytest.raises(ValueError, match="use_backend: no backend 'cuda'; available here: reference, torch"),
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
