"""What every shipped Triton kernel costs, read off its machine code. Needs no GPU.

python -m benchmarks.audit [--arch 90] [--only WORD] [--peers]      the table
python -m benchmarks.audit --json FILE                              the bounds as well, for pairtile report --audit FILE
python -m benchmarks.audit --check [--quick]                        the hard lines; 1 if one is crossed
python -m benchmarks.audit --config reduce=128x256x64,8,4           another configuration than the shipped one
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
import triton

from pairtile.kernels.contrastive.triton_kernels.configurations import KERNELS, Config

from . import export, table
from .cases import headline, shipped, spanning
from .check import checked
from .examine import Examiner, label_of
from .launches import AnyRequest, Overrides, recorded
from .peer_figures import peers_of
from .requests import Request
from .targets import TARGETS, Target, compiling_for
from .total import totals


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels made under it have no machine code; unset it and try again")
    overrides = dict(options.config)
    targets = options.arch or [each for each in TARGETS.values() if options.check or each.nvidia]
    if options.check:
        return max(_check(target, options.quick, options.only, overrides) for target in targets)
    print(table.LEGEND)
    bounds = [
        bound
        for target in targets
        for request in headline()
        for bound in _show(target, request, options.only, options.peers, overrides)
    ]
    if options.json is not None:
        export.write(options.json, bounds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=_target, action="append", help="80, 90, 100 or gfx942; may be repeated")
    parser.add_argument("--only", default="", metavar="WORD", help='part of "REQUEST KERNEL", as the table writes them')
    parser.add_argument("--peers", action="store_true", help="other libraries' figures beside ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what bounds each phase, peers included")
    parser.add_argument("--check", action="store_true", help="hold every shipped configuration to the hard lines")
    parser.add_argument("--quick", action="store_true", help="with --check: a few that span them")
    parser.add_argument("--config", action="append", type=_override, default=[], metavar="KERNEL=MxNxK,WARPS,STAGES")
    return parser


def _target(text: str) -> Target:
    name = f"sm{text}" if text.isdigit() else text
    if name not in TARGETS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def _override(text: str) -> tuple[str, Config]:
    found = re.fullmatch(r"(\w+)=(\d+)x(\d+)x(\d+),(\d+),(\d+)(?:,(\d+))?", text)
    if not found or found[1] not in KERNELS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected KERNEL=MxNxK,WARPS,STAGES[,GROUP] with KERNEL one of {', '.join(KERNELS)}"
        )
    return found[1], Config(*(int(each) for each in found.groups()[1:] if each is not None))


def _show(target: Target, request: AnyRequest, only: str, peers: bool, overrides: Overrides) -> list[export.Bound]:
    """Prints the table of one request; returns what bounds its phases."""
    launches = recorded(request, target, overrides)
    chosen = [each for each in launches if only in f"{request} {label_of(each)}"]
    if not chosen:
        return []
    print(f"{table.title(request, target)}\n{table.heading()}")
    examiner, seen, examined = Examiner(target), set(), []
    with compiling_for(target):
        for launch in chosen:
            examined.append(examiner.examine(launch, request))
            if examined[-1].identity not in seen:
                seen.add(examined[-1].identity)
                print(table.line(examined[-1]), flush=True)
    others = peers_of(target.arch, request.name)
    bounds: list[export.Bound] = []
    if not isinstance(request, Request):
        bounds += export.of_kernels(target, request, examined)
    elif len(chosen) == len(launches) and all(each.usual for each in examined):
        found = totals(examined, request)
        print(table.totals_heading())
        print("\n".join(table.total_lines(found)))
        bounds += export.of_totals(target, request, found)
        if request.dtype != torch.bfloat16:  # what their figures were taken with
            others = []
    else:
        others = []
    if peers:
        print("\n".join(table.peer_lines(others)))
    print(flush=True)
    return [*bounds, *export.of_peers(target, request, others)]


def _check(target: Target, quick: bool, only: str, overrides: Overrides) -> int:
    requests = spanning(target) if quick else shipped(target)
    crossed = 0
    for each in checked(target, requests, only, overrides):
        if not each.kernels:
            continue
        crossed += each.violations.total()
        name = f"{target.arch}, {each.request}"
        print(f"{name}: {each.kernels} kernels, {each.violations.total()} violations", flush=True)
        for violation, times in each.violations.items():
            print(f"  {name}: {violation}{f' (in {times} of its variants)' if times > 1 else ''}")
    return int(crossed > 0)


if __name__ == "__main__":
    sys.exit(main())
