"""The audit as text."""

from __future__ import annotations

from collections.abc import Iterable

from .count import COUNTED, Account
from .examine import Examined, label_of
from .peer_figures import PeerFigure
from .targets import KIB, Target
from .total import FLOPS, Total

LEGEND = """\
One line is one compiled kernel of a shipped configuration; w/st: warps and stages. Nothing here is a timing.
Exact: reg, stack (bytes), smemKB, blk (blocks that an SM holds at a time), and from MUFU to all: instructions that one
  warp issues for one tile (spill: loads and stores of spilled registers; RED: atomics of global memory). Where branches
  exclude each other they are those of the cheapest way that does the tile's work, which nearly every tile takes: no
  edge of S in it, no pair that a rule names. `worst` is `serial` on the dearest way.
Nearly exact: KB between global memory and the SM (masked lanes count), B/clk: the same in each clock of useful work. An
  SM draws some 30 to 45 B/clk from L2: far above that L2 is the limit, whatever `share` says; the notes then say so.
Taken from the source: useful FLOPs of a tile and trips of its main loop. MMAx: executed over useful FLOPs, 1.00 where the
  instructions found and those trips are the useful work (3.00 for tf32x3, which multiplies three times).
Estimates, in clocks of one SM: mma clk: executed FLOPs at the dense peak; ex2: special functions at 16 a clock; fp32:
  additions, products and maxima at the FMA rate; issue: 4 warp instructions a clock, as if every warp issued what the
  busiest one does. share: clocks of the useful FLOPs at the peak over the largest of mma clk, ex2, fp32: all overlapped,
  memory free, an upper bound. share4: issue is a fourth limit. serial: over mma clk + max(ex2, issue): no overlap, a lower
  bound but for memory. Peak: that of the product asked for (16 bits, tf32 at half of it, tf32x3 at a sixth, FMAs).
All launches: clocks of a complete forward (backward), every launch times its grid, against 2 (6) N M D at the peak.
"""

_HEAD = ("kernel", "tile", "w/st", "reg", "stack", "smemKB", "blk")
_CLOCKS = {"mma clk": "tensor", "ex2": "ex2", "fp32": "fp32", "issue": "issue"}
_SHARES = ("share", "share4", "serial")
_COLUMNS = (*_HEAD, *COUNTED, "KB", "B/clk", "MMAx", *_CLOCKS, *_SHARES, "worst")
_WIDTHS = {"kernel": -28, "tile": -12, "reg": 4, "blk": 4, "all": 6, "KB": 6, "issue": 7}
#: Bytes in a clock above which a row is marked: a third more than the most that an SM draws from L2.
_L2_BYTES = 60


def _cells(values: dict[str, object]) -> str:
    widths = {name: _WIDTHS.get(name, max(len(name) + 1, 5)) for name in values}
    return " ".join(
        f"{value!s:<{-widths[name]}}" if widths[name] < 0 else f"{value!s:>{widths[name]}}"
        for name, value in values.items()
    )


def title(request: object, target: Target) -> str:
    return f"=== {target.arch} ({target.gpu}), {request}"


def heading() -> str:
    return _cells({name: name for name in _COLUMNS}) + "  matrix instructions  [notes]"


def line(examined: Examined) -> str:
    config, arguments = examined.launch.config, examined.launch.arguments
    values: dict[str, object] = dict.fromkeys(_COLUMNS, "-")
    values |= {
        "kernel": label_of(examined.launch),
        "tile": examined.work.tile,
        "w/st": f"{config.num_warps}/{config.num_stages}" if config else f"{arguments.get('num_warps', 4)}/3",
        "reg": examined.registers,
        "stack": examined.stack,
        "smemKB": round(examined.shared / KIB),
    }
    notes = list(examined.violations)
    if examined.usual is not None:
        values |= {"blk": examined.resident} | _counted(examined, examined.usual)
        notes += [*examined.usual.remarks, *_limits(examined, examined.usual)]
    return f"{_cells(values)}  {_products(examined)}  [{'; '.join(notes)}]"


def _counted(examined: Examined, usual: Account) -> dict[str, object]:
    values: dict[str, object] = {name: usual.counted[name] for name in COUNTED}
    values |= {name: round(usual.clocks[key]) for name, key in _CLOCKS.items()}
    values["KB"] = round(usual.bytes / KIB)
    if examined.work.flops:
        values |= {name: f"{usual.clocks[name]:.0%}" for name in _SHARES}
        values["worst"] = f"{examined.worst.clocks['serial']:.0%}" if examined.worst else "-"
        values["B/clk"] = round(usual.bytes / usual.clocks["useful"])
        values["MMAx"] = f"{usual.executed:.2f}" if usual.products else "-"
    return values


def _limits(examined: Examined, usual: Account) -> Iterable[str]:
    """What keeps a row below its peak, if it is not the products themselves."""
    if not examined.work.flops:
        return
    first = max(("tensor", "ex2", "fp32", "issue"), key=lambda name: usual.clocks[name])
    if first != "tensor" and usual.products:
        yield f"limited by {first}"
    if usual.bytes / usual.clocks["useful"] > _L2_BYTES:
        yield "L2"


def _products(examined: Examined) -> str:
    if examined.usual is None:
        return f"{examined.matrix_instructions} MFMA in the code, untested" if examined.matrix_instructions else ""
    return " + ".join(f"{n} {op}" for op, n in examined.usual.products.items())


def total_lines(totals: Iterable[Total]) -> Iterable[str]:
    for each in totals:
        scores = "small scores" if each.small_scores else "large scores"
        parts = ", ".join(f"{name} {part:.0%}" for name, part in each.parts.items())
        name = f"ours, all launches, {scores}"
        yield f"   {each.phase:<9} {name:<35} {_shares(each.share4, each.serial)}   clocks: {parts}"


def peer_lines(peers: Iterable[PeerFigure]) -> Iterable[str]:
    """Peers' shares, and the same of the FLOPs that the phase needs."""
    for each in peers:
        fair = FLOPS[each.phase] / each.counted
        own = f"{each.remark}; of the {each.counted} that it counts: {_shares(each.share4, each.serial)}"
        name = f"{each.library} {each.kernel}"
        yield f"   {each.phase:<9} {name:<35} {_shares(each.share4 * fair, each.serial * fair)}   {own}"


def totals_heading() -> str:
    return f"   {'of 2 (6) N M D at the peak':<45} share4 serial"


def _shares(share4: float, serial: float) -> str:
    return f"{share4:>6.0%} {serial:>6.0%}"
