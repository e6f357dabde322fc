"""Peak memory of one contender, in a fresh process.

The child reports the high-water mark of its resident memory (VmHWM) during one run, minus what was resident before
it: inputs made and touched, libraries loaded and threads started by a run at a small size. Outputs and gradients
therefore count, inputs do not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_ROOT = Path(__file__).resolve().parent.parent


def peak_memory(
    inputs: Callable[..., list[Tensor]],
    sizes: Mapping[str, int],
    small_sizes: Mapping[str, int],
    prepare: Callable[[list[Tensor]], Callable[[], object]],
    *,
    compiled: bool = False,
) -> int:
    """Peak resident bytes that one call adds to its inputs. Linux only.

    Args:
        inputs: makes the leaves of given sizes. It and `prepare` are pickled: functions of a module, or partials.
        sizes: of the call that is measured.
        small_sizes: of the call before it, at which memory does not matter.
        prepare: given the leaves, returns the call.
        compiled: make the first call at the full size: torch.compile would otherwise be measured compiling.

    Raises:
        RuntimeError: the child failed; its traceback is in the message.
    """
    first = sizes if compiled else small_sizes
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak"],
        input=pickle.dumps((inputs, dict(sizes), dict(first), prepare, torch.get_num_threads())),
        capture_output=True,
        check=False,
        cwd=_ROOT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the memory run failed:\n{done.stderr.decode(errors='replace')}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _give_back_free_memory() -> None:
    # What glibc keeps of the first call would be resident already, and hide as much of the second one's peak.
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # musl has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _child() -> None:
    inputs, sizes, first, prepare, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    if first == sizes:  # compiled for these sizes alone, hence on the same leaves
        call = prepare(inputs(**sizes))
        call()
    else:
        prepare(inputs(**first))()
        call = prepare(inputs(**sizes))
    _give_back_free_memory()
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # sets VmHWM to what is resident now
    before = _status("VmRSS")
    call()
    print(json.dumps(_status("VmHWM") - before))


if __name__ == "__main__":
    _child()
