"""NVIDIA machine code (SASS) as basic blocks: instructions, the matrix work of each, and where control may go next."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9a-z_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L\w+):")
_JUMP = re.compile(r"`\((\.L\w+)\)")
_UNIFORM = re.compile(r"(UR\d+)\b")
_DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        op: its name with modifiers, such as HGMMA.64x256x16.F32.BF16.
        flops: of all warps of the block together, if it is a matrix instruction.
        kind: of its operands, "16", "tf32", or "?" where it is not written in the code; "" if it is none.
        rows: of the tile that one instruction multiplies.
    """

    op: str
    operands: str
    predicated: bool
    flops: int = 0
    kind: str = ""
    rows: int = 0


@dataclass
class Block:
    code: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    """A compiled kernel: bytes per thread of stack and local memory, registers per thread, and its code."""

    registers: int
    stack: int
    blocks: list[Block]

    def __iter__(self) -> Iterator[Instruction]:
        return (each for block in self.blocks for each in block.code)


def disassembled(cubin: bytes, warps: int) -> Program:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Program(found["REG"], found["STACK"] + found["LOCAL"], blocks_of(listing, warps))


def _tool(name: str, *arguments: str) -> str:
    """The tools lie in triton's wheel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def blocks_of(listing: str, warps: int) -> list[Block]:
    """The basic blocks of a listing, in the order of their addresses."""
    blocks, labels = [Block()], {}
    constants: dict[str, int | None] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].code:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif found := _INSTRUCTION.search(line):
            predicate, op, operands = found.groups()
            flops, kind, rows = _matrix_work(op, operands, constants, warps)
            _follow_constants(op, operands, constants)
            blocks[-1].code.append(Instruction(op, operands, bool(predicate), flops, kind, rows))
            if _leaves(blocks[-1].code[-1]):
                blocks.append(Block())
    if not blocks[-1].code:
        blocks.append(Block([Instruction("EXIT", "", False)]))
    for i, block in enumerate(blocks):
        block.successors = _successors(block, i, labels, len(blocks))
    return blocks


def _leaves(instruction: Instruction) -> bool:
    """Jumps and exits. A CALL of a local label is a jump over a long distance; other calls return."""
    name = instruction.op.partition(".")[0]
    return name in ("BRA", "EXIT", "RET") or (name == "CALL" and bool(_JUMP.search(instruction.operands)))


def _successors(block: Block, i: int, labels: dict[str, int], count: int) -> list[int]:
    following = [i + 1] if i + 1 < count else []
    last = block.code[-1] if block.code else None
    if last is None or not _leaves(last):
        return following
    target = _JUMP.search(last.operands)
    # A condition stands before the instruction, or as a uniform predicate before its target.
    always = not last.predicated and (target is None or last.operands.startswith("`"))
    taken = [labels[target[1]]] if target else []
    return taken if always else taken + following


def _follow_constants(op: str, operands: str, constants: dict[str, int | None]) -> None:
    """Which uniform registers hold a number that the code itself states."""
    target = _UNIFORM.match(operands)
    if target:
        number = re.fullmatch(r"UR\d+, (0x[0-9a-f]+)", operands)
        constants[target[1]] = int(number[1], 16) if op == "UMOV" and number else None


def _matrix_work(op: str, operands: str, constants: dict[str, int | None], warps: int) -> tuple[int, str, int]:
    """(FLOPs of all warps, kind, rows) of a matrix instruction."""
    kind = "tf32" if "TF32" in op else "16"
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):  # issued once by each group of four warps
        rows, cols, depth = map(int, shape.groups())
        return 2 * rows * cols * depth * warps // 4, kind, rows
    if shape := re.match(r"HMMA\.168(16|8|4)\b", op):  # by each warp
        return 2 * 16 * 8 * int(shape[1]) * warps, kind, 16
    if re.match(r"UTC\w*MMA", op):  # by one thread of the block; the shape is in a descriptor
        register = _DESCRIPTOR.search(operands)
        value = constants.get(register[1]) if register else None
        if value is None:
            return 0, "?", 0
        kind = "tf32" if value >> 7 & 7 == 2 else "16"
        rows, cols = (value >> 24 & 31) * 16, (value >> 17 & 63) * 8
        return 2 * rows * cols * (8 if kind == "tf32" else 16), kind, rows
    return 0, "", 0
