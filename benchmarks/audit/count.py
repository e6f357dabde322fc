"""The account of one tile: how many instructions of which kind, and how long they take at the least."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field

from .flow import Flow
from .machine_code import Instruction, Program
from .targets import BLOCKS, ISSUES, KIB, MUFU_LANES, REGISTERS, TENSOR_COLUMNS, THREADS, Target
from .work import Work

#: Column -> names of the instructions that it counts.
COUNTED = {
    "MUFU": r"MUFU",
    "EX2": r"MUFU\.EX2",
    "FP32": r"F(ADD|MUL|FMA|MNMX)",
    "LDGSTS": r"LDGSTS",
    "TMA": r"UTMALDG",
    "LDG": r"LDG\b",
    "STG": r"STG\b",
    "RED": r"(REDG?|ATOMG?)\b",
    "BAR": r"BAR\.",
    "spill": r"(STL|LDL)\b",
    "all": r"",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in COUNTED.items()}
_MOVES = re.compile(r"(LDGSTS|LDG|STG|REDG?|ATOMG?)\b")
_WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))\b")


@functools.cache
def columns_of(op: str) -> dict[str, int]:
    """How much an instruction adds to each column; 2 where it adds or multiplies a pair of numbers."""
    pair = 2 if re.match(r"F(ADD|MUL|FMA|MNMX)2", op) else 1
    return {name: pair if name == "FP32" else 1 for name, pattern in _PATTERNS.items() if pattern.match(op)}


def moved(instruction: Instruction) -> int:
    """Bytes that one lane moves between registers, or shared memory, and global memory."""
    if not _MOVES.match(instruction.op):
        return 0
    width = _WIDTH.search(instruction.op)
    return 4 if width is None else int(width[1] or width[2]) // 8


@dataclass(frozen=True)
class Account:
    """What one tile costs.

    Attributes:
        counted: instructions that one warp issues for one tile, by column.
        products: matrix instructions of one warp, by name.
        bytes: between global memory and the SM.
        clocks: useful, tensor, ex2, fp32, issue, and their sums and shares (`_clocks`).
        executed: FLOPs over useful ones.
    """

    counted: Counter[str]
    products: Counter[str]
    bytes: float
    clocks: dict[str, float]
    executed: float = 0.0
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Product:
    """What the kernel multiplies: "16", "tf32" or "fma", and matrix products executed for each useful one."""

    kind: str
    times: int = 1


def account(
    program: Program,
    work: Work,
    warps: int,
    target: Target,
    product: Product,
    *,
    dearest: bool = False,
) -> Account:
    """The account of the cheapest way through the kernel, or of the dearest."""
    times = _times(program, work, dearest)
    counted: Counter[str] = Counter()
    products: Counter[str] = Counter()
    executed: Counter[str] = Counter()
    lane_bytes, remarks = 0, []
    for b, n in times.items():
        for each in program.blocks[b].code:
            for column, weight in columns_of(each.op).items():
                counted[column] += n * weight
            lane_bytes += n * moved(each)
            if each.kind:
                products[re.sub(r"\.F32|\.BF16|\.F16", "", each.op)] += n
            if each.kind == "?":
                remarks = ["a matrix instruction's shape is not in the code"]
            elif each.kind:
                # tcgen05 takes as long for 64 rows as for 128.
                half = each.op.startswith("UTC") and each.rows == 64
                executed[each.kind + "/64" * half] += n * each.flops
    return Account(
        counted,
        products,
        work.streamed + lane_bytes * 32 * warps,
        _clocks(counted, executed, work, warps, target, product),
        sum(executed.values()) / work.flops if work.flops else 0.0,
        remarks,
    )


def _times(program: Program, work: Work, dearest: bool) -> dict[int, int]:
    """How often each block runs for one tile."""
    flow = Flow(program.blocks)
    header = flow.main_loop(_weight)
    if header is None:
        return flow.way({}, dearest=dearest)
    times = flow.way({header: work.trips}, through=header, dearest=dearest)
    flops = {b: n * sum(each.flops for each in program.blocks[b].code) for b, n in times.items()}
    inside = sum(done for b, done in flops.items() if b in flow.loops[header])
    # What is multiplied outside are trips that the compiler has moved before the loop, or behind it.
    moved_out = round((sum(flops.values()) - inside) * work.trips / inside) if inside else 0
    return flow.way({header: work.trips - moved_out}, through=header, dearest=dearest) if moved_out else times


def _weight(instruction: Instruction) -> float:
    """What makes a loop the main one: matrix products before FMAs before loads."""
    fmas = instruction.op.startswith("FFMA")
    return instruction.flops * 2.0**20 + bool(instruction.kind) * 2.0**20 + fmas * 64 + bool(moved(instruction))


def _clocks(
    counted: Counter[str], executed: Counter[str], work: Work, warps: int, target: Target, product: Product
) -> dict[str, float]:
    """Clocks of one SM for one tile, from dense peaks."""
    rates = {"16": target.flops, "tf32": target.flops / 2, "fma": 2 * target.lanes}
    useful = product.times * work.flops / rates[product.kind]
    slower = {"16": 1, "tf32": 2, "16/64": 2, "tf32/64": 4}
    tensor = sum(flops * slower[kind] for kind, flops in executed.items()) / target.flops
    threads = 32 * warps
    found = {
        "useful": useful,
        "tensor": tensor,
        "ex2": counted["MUFU"] * threads / MUFU_LANES,
        "fp32": counted["FP32"] * threads / target.lanes,
        "issue": counted["all"] * warps / ISSUES,
    }
    found["least"] = max(found["tensor"], found["ex2"], found["fp32"])
    found["least4"] = max(found["least"], found["issue"])
    found["sum"] = tensor + max(found["ex2"], found["issue"])
    for share, clocks in (("share", "least"), ("share4", "least4"), ("serial", "sum")):
        found[share] = useful / found[clocks] if found[clocks] else 0.0
    return found


def resident(registers: int, shared: int, warps: int, tensor_columns: int, target: Target) -> int:
    """Blocks that one SM holds at a time; 0 if it cannot hold one."""
    if shared > target.shared_block:
        return 0
    per_warp = -(-registers // 8) * 8 * 32
    return min(
        REGISTERS // per_warp // warps,
        target.shared_sm // (shared + KIB),
        THREADS // (32 * warps),
        BLOCKS,
        TENSOR_COLUMNS // max(tensor_columns, 1),
    )
