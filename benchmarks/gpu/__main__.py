"""`python -m benchmarks.gpu` makes the folder of a run and prints it, for `make bench-gpu`."""

from __future__ import annotations

import sys
from datetime import datetime

import torch

from .device import missing_device
from .environment import folder


def main() -> int:
    if (obstacle := missing_device()) is not None:
        print(f"bench-gpu: {obstacle}, so there is nothing to measure; `make bench` is for the CPU", file=sys.stderr)
        return 1
    made = folder(torch.cuda.get_device_name(), datetime.now())
    made.mkdir(parents=True)
    print(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
