"""What every shipped kernel must satisfy in every shipped configuration, whatever it may cost otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .count import Product
from .launches import Launch
from .machine_code import Program
from .targets import KIB, Target

_ATOMIC = re.compile(r"(REDG?|ATOMG?|UTMAREDG?|UBLKRED)\b")
_SPILL = re.compile(r"(STL|LDL)\b")


def nvidia_violations(
    launch: Launch, program: Program, shared: int, target: Target, product: Product | None
) -> list[str]:
    return [*_memory(program.stack, shared, target), *_instructions(launch, program, target, product)]


def _memory(stack: int, shared: int, target: Target) -> Iterator[str]:
    if stack:
        yield f"{stack} bytes of stack"
    if shared > target.shared_block:
        yield f"{shared} bytes of shared memory: {target.gpu} gives a block {target.shared_block // KIB} KiB"


def _instructions(launch: Launch, program: Program, target: Target, product: Product | None) -> Iterator[str]:
    if spilled := sum(bool(_SPILL.match(each.op)) for each in program):
        yield f"{spilled} loads and stores of spilled registers"
    # Atomics of shared memory, by which Blackwell allots tensor memory, order nothing that is summed.
    if atomics := {each.op for each in program if _ATOMIC.match(each.op)}:
        yield f"atomics: {', '.join(sorted(atomics))}"
    if product is not None:
        yield from _products(program, target, product)
    described = any(launch.arguments.get(name) for name in ("TMA", "TMA_WEIGHTS"))
    if described and not any(each.op.startswith("UTMALDG") for each in program):
        yield "is given descriptors and does not load through them"


def _products(program: Program, target: Target, product: Product) -> Iterator[str]:
    found = {each.op: each.kind for each in program if each.kind}
    if product.kind == "fma":
        if found:
            yield f"float32 products by {', '.join(sorted(found))}, which round their operands"
        return
    if not found:
        yield "no matrix instructions"
    if foreign := sorted(op for op in found if not op.startswith(target.matrix)):
        yield f"{', '.join(foreign)}: not the matrix instructions of {target.gpu}, {target.matrix}"
    if others := sorted(op for op, kind in found.items() if kind not in (product.kind, "?")):
        yield f"{', '.join(others)}: products are to be {_NAMES[product.kind]}"


_NAMES = {"16": "16 bits wide", "tf32": "tf32"}


def amd_violations(facts: dict[str, int], found: set[str], target: Target, product: Product | None) -> list[str]:
    """The same of gfx942, as far as the assembly's own notes tell: nobody has run these kernels.

    Its float32 matrix instructions do not round their operands, so `ieee` may use them.
    """
    problems = list(_memory(facts["private_segment_fixed_size"], facts["group_segment_fixed_size"], target))
    # Scalar registers spill into lanes of vector registers, which costs no memory.
    if spilled := facts["vgpr_spill_count"]:
        problems.append(f"{spilled} spilled registers")
    if product is not None and not found:
        problems.append("no matrix instructions")
    if product is not None and product.kind == "16" and (wider := sorted(op for op in found if op.endswith("f32"))):
        problems.append(f"{', '.join(wider)}: products are to be 16 bits wide")
    return problems
