"""How the suites measure: interleaved rounds, medians, and the peak memory of a run in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each contender, after one warm-up each.

    The contenders take turns within a round: a machine that slows down or speeds up during the run changes
    all of them alike, and ratios of medians stay comparable.
    """
    for contender in contenders.values():
        contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in seconds.items()}


# A child reports the high-water mark of its resident memory (VmHWM), reset after its inputs exist and one small
# run has loaded every library, minus what is resident at that moment.
_CHILD = """
import json, sys

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

exec(sys.argv[1])
small()
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")
before = status("VmRSS")
large()
print(json.dumps(status("VmHWM") - before))
"""


def peak_memory(setup: str) -> int:
    """Peak resident bytes that a run adds to its inputs, in a fresh Linux process.

    Args:
        setup: Python source that defines `large()`, the run to measure with its inputs made and touched, and
            `small()`, the same at a size that does not matter, which loads libraries and starts threads.
    """
    done = subprocess.run([sys.executable, "-c", _CHILD, setup], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the memory run failed:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))
