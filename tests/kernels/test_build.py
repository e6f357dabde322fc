"""The C++ build: what is missing is said once, a killed build is no obstacle, and it compiles."""

from __future__ import annotations

import fcntl
import functools
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

# The package's attribute `build` is the function; the module is found by name.
MODULE = sys.modules["pairtile.kernels.build"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No build of these tests meets the machine's own, and what becomes of it is not remembered by the process."""
    monkeypatch.setenv("PAIRTILE_CACHE", str(tmp_path / "cache"))
    forgetful = functools.cache(MODULE.operators_obstacle.__wrapped__)
    monkeypatch.setattr(MODULE, "operators_obstacle", forgetful)
    monkeypatch.setattr(sys.modules["pairtile.kernels.backends"], "operators_obstacle", forgetful)


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
    with pytest.warns(RuntimeWarning, match="The torch backend serves on the CPU.* failed to build: "):
        assert build() is None


def test_a_library_that_does_not_load_is_a_warning_too(monkeypatch):
    library = build_directory() / "pairtile_cpu.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    # Said once: by info(), if this process asks for the operators here for the first time, or by build().
    with pytest.warns(RuntimeWarning, match="The torch backend serves on the CPU.* failed to load: "):
        said, built = info().extension, build()
    assert "cannot be loaded" in said
    assert built is None


def test_the_build_directory_depends_on_the_flags_and_the_cache(monkeypatch, tmp_path):
    first = build_directory()
    assert first.parent == tmp_path / "cache"
    monkeypatch.setattr(MODULE, "_flags", lambda path: ("-O0",))
    assert build_directory().name != first.name
    monkeypatch.delenv("PAIRTILE_CACHE")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert build_directory().parent == tmp_path / "extensions" / "pairtile"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build_directory().parent == tmp_path / "xdg" / "pairtile"


def test_the_build_directory_depends_on_sources_and_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(MODULE, "_source_directory", lambda: tmp_path)
    names = {build_directory().name}
    for file, text in (("a.cpp", "1"), ("a.cpp", "2"), ("a.h", "1"), ("a.h", "2")):
        (tmp_path / file).write_text(text)
        names.add(build_directory().name)
    (tmp_path / "a.h").rename(tmp_path / "b.h")
    names.add(build_directory().name)
    assert len(names) == 6


def test_openmp_is_asked_for_where_the_compiler_has_it():
    """ATen's parallel_for runs on one thread in an extension that is compiled without."""
    if missing_tool() is not None:
        pytest.skip(str(missing_tool()))
    flags = MODULE._flags(compiler())
    linked = MODULE._link_flags(flags)
    assert ("-fopenmp" in flags) == bool(linked)
    own = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    assert not own or linked[0].startswith(str(own[0].parent)), "two runtimes would not know each other's threads"
    assert MODULE._link_flags(("-O3",)) == ()


SOURCE = """
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <atomic>

c10::Dict<std::string, std::string> cpu_features() {
  std::atomic<int> parts{0};
  at::parallel_for(0, 64, 1, [&](int64_t, int64_t) { ++parts; });
  c10::Dict<std::string, std::string> found;
  found.insert("parts", std::to_string(parts));
  return found;
}

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  m.def("cpu_features() -> Dict(str, str)", &cpu_features);
}
"""

COMPILE = """
import sys, time
from pathlib import Path
import torch
from pairtile.kernels import info
module = sys.modules["pairtile.kernels.build"]
module._source_directory = lambda: Path(sys.argv[1])
torch.set_num_threads(3)
for _ in range(2):
    start = time.monotonic()
    print(module.build())
    print(time.monotonic() - start)
print(info().cpu_features)
print(module.operators_obstacle())
"""


@pytest.mark.slow
@pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))
def test_a_source_compiles_and_loads(monkeypatch, tmp_path):
    """In a new process, since a loaded library cannot be unloaded; a stale lock is planted first.

    A small source, for the time it takes: the real ones are what every test of the cpp backend runs on.
    """
    (tmp_path / "trial.cpp").write_text(SOURCE)
    monkeypatch.setattr(MODULE, "_source_directory", lambda: tmp_path)
    directory = build_directory()
    (directory / "work").mkdir(parents=True)
    (directory / "work" / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, tmp_path], capture_output=True, text=True, env=os.environ, timeout=300
    )
    assert done.returncode == 0, done.stderr
    library = built_library()
    assert library is not None
    first, _, second, seconds, features, obstacle = done.stdout.splitlines()
    assert first == second == str(library)
    assert float(seconds) < 1.0, "found, not compiled, the second time"
    if "-fopenmp" in MODULE._flags(compiler()):
        assert features == "{'parts': '3'}", "the extension shares torch's threads"
    assert obstacle.startswith("lack similarity_reduce")
    assert not (directory / "work").exists()


def test_a_failure_is_remembered(monkeypatch):
    attempts = []
    monkeypatch.setattr(MODULE, "_attempt", lambda: (attempts.append(1), (None, "failed to build: no room"))[1])
    assert [MODULE.operators_obstacle() for _ in range(3)] == ["failed to build: no room"] * 3
    assert len(attempts) == 1
