"""The C++ build: what is missing is said once, a killed build is no obstacle, and it compiles."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.file_baton import FileBaton

from pairtile.kernels import build, info
from pairtile.kernels.build import build_directory, built_library, compiler, exclusive_build, missing_tool


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAIRTILE_CACHE", str(tmp_path / "cache"))


HOLD = """
import sys, time
from pathlib import Path
from pairtile.kernels.build import exclusive_build
with exclusive_build(sys.argv[1]):
    (Path(sys.argv[1]) / "op").mkdir(exist_ok=True)
    (Path(sys.argv[1]) / "op" / "lock").touch()
    print("held", flush=True)
    time.sleep(60)
"""


def test_locks_of_a_killed_build_are_cleared(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert killed.stdout.readline() == "held\n"
        killed.send_signal(signal.SIGKILL)
    finally:
        killed.kill()
        killed.wait()
    baton = FileBaton(tmp_path / "op" / "lock")
    assert not baton.try_acquire(), "the killed process left torch's lock behind"
    with exclusive_build(tmp_path) as directory:
        assert directory == tmp_path
        assert baton.try_acquire()


def test_a_living_build_is_waited_for(tmp_path):
    living = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("sleep(60)", "sleep(0.7)"), tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert living.stdout.readline() == "held\n"
    start = time.monotonic()
    with exclusive_build(tmp_path):
        waited = time.monotonic() - start
    assert living.wait() == 0
    assert waited > 0.5


def test_a_lock_that_a_living_process_holds_by_flock_is_left(tmp_path):
    with open(tmp_path / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with exclusive_build(tmp_path):
            assert (tmp_path / "lock").exists()
    with exclusive_build(tmp_path):
        assert not (tmp_path / "lock").exists()


def test_a_lock_that_is_none_of_ours_is_no_obstacle(tmp_path):
    (tmp_path / "op" / "lock").mkdir(parents=True)
    with exclusive_build(tmp_path):
        assert (tmp_path / "op" / "lock").is_dir()


def test_a_build_of_its_own_below_the_directory_is_left_alone(tmp_path):
    with exclusive_build(tmp_path / "inner"):
        (tmp_path / "inner" / "lock").touch()
        with exclusive_build(tmp_path):
            assert (tmp_path / "inner" / "lock").exists()


def test_a_missing_compiler_is_said_once_and_by_info(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler-here")
    with pytest.warns(RuntimeWarning, match="no-such-compiler-here is not on the PATH"):
        assert build() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build() is None
    assert info().compiler is None
    assert "no-such-compiler-here" in info().extension


def test_a_compiler_that_fails_is_a_warning_too(monkeypatch, tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(RuntimeWarning, match="failed to build; the torch backend serves meanwhile"):
        assert build() is None


def test_a_library_that_does_not_load_is_a_warning_too(monkeypatch):
    library = build_directory() / "pairtile_cpu.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    assert "cannot be loaded" in info().extension
    with pytest.warns(RuntimeWarning, match="failed to load; the torch backend serves meanwhile"):
        assert build() is None


def test_the_build_directory_depends_on_the_flags_and_the_cache(monkeypatch, tmp_path):
    first = build_directory()
    assert first.parent == tmp_path / "cache"
    # The package's attribute `build` is the function; the module is found by name.
    monkeypatch.setattr(sys.modules["pairtile.kernels.build"], "_flags", lambda path: ("-O0",))
    assert build_directory().name != first.name
    monkeypatch.delenv("PAIRTILE_CACHE")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert build_directory().parent == tmp_path / "extensions" / "pairtile"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build_directory().parent == tmp_path / "xdg" / "pairtile"


@pytest.mark.slow
@pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))
def test_the_sources_compile_load_and_report(tmp_path):
    """In a new process, since a loaded library cannot be unloaded; a stale lock is planted first."""
    directory = build_directory()
    (directory / "work").mkdir(parents=True)
    (directory / "work" / "lock").touch()
    code = "from pairtile.kernels import build, info; print(build()); print(info())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ, timeout=120
    )
    library = built_library()
    assert library is not None
    assert done.stdout.splitlines()[0] == str(library)
    assert "brgemm_float32" in done.stdout
    assert not (directory / "work").exists()
    # Found, not compiled, the second time; and the compiler is then not needed at all.
    assert Path(compiler() or "").exists()
    start = time.monotonic()
    assert build() == library
    assert time.monotonic() - start < 1.0
    assert torch.ops.pairtile.cpu_features()["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
