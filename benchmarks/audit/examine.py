"""One launch, examined: compiled, disassembled, counted, and held to the hard lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from .count import Account, Product, account, resident
from .hard_lines import amd_violations, nvidia_violations
from .late_interaction import late_label
from .launches import AnyRequest, Launch
from .machine_code import Program, disassembled
from .targets import Target
from .token_merging import token_label
from .work import LATE, TOKENS, Work, work_of


@dataclass(frozen=True)
class Examined:
    """One launch and what was found of it.

    Attributes:
        usual, worst: the account of the cheapest and of the dearest way through the kernel; None off NVIDIA.
        identity: equal for launches that compile to the same kernel.
        resident: blocks of one SM.
        matrix_instructions: in the code, where it is not disassembled.
        violations: of the hard lines.
    """

    launch: Launch
    identity: str
    registers: int
    stack: int
    shared: int
    work: Work
    resident: int = 0
    usual: Account | None = None
    worst: Account | None = None
    matrix_instructions: int = 0
    violations: list[str] = field(default_factory=list)


class Examiner:
    """Examines launches for one target, inside `compiling_for(target)`. What was seen before is not read again."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._programs: dict[str, Program] = {}
        self._accounts: dict[tuple[str, Work], tuple[Account, Account]] = {}

    def examine(self, launch: Launch, request: AnyRequest) -> Examined:
        product, work = product_of(launch, request), work_of(launch)
        try:
            compiled = launch.compiled()
        except Exception as error:  # whatever the compiler refuses, the audit goes on to the next
            problem = " ".join(str(error).split())[-300:]
            return Examined(launch, problem, 0, 0, 0, work, violations=[f"does not compile: {problem}"])
        if not self.target.nvidia:
            return _of_assembly(launch, compiled, work, self.target, product)
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        if compiled.hash not in self._programs:
            self._programs[compiled.hash] = disassembled(compiled.asm["cubin"], warps)
        program, key = self._programs[compiled.hash], (compiled.hash, work)
        if key not in self._accounts:
            given = (program, work, warps, self.target, product or Product("16"))
            self._accounts[key] = account(*given), account(*given, dearest=True)
        return Examined(
            launch,
            compiled.hash,
            program.registers,
            program.stack,
            shared,
            work,
            resident(program.registers, shared, warps, compiled.metadata.tmem_size, self.target),
            *self._accounts[key],
            violations=nvidia_violations(launch, program, shared, self.target, product),
        )


def product_of(launch: Launch, request: AnyRequest) -> Product | None:
    """How the kernel multiplies; None if it does not."""
    if launch.name in ("merge_partials", "gather_sum", "combine_rows", "spread_rows"):
        return None
    if request.dtype != torch.float32:
        return Product("16")
    return {"ieee": Product("fma"), "tf32": Product("tf32"), "tf32x3": Product("tf32", 3)}[request.precision]


def _of_assembly(launch: Launch, compiled: Any, work: Work, target: Target, product: Product | None) -> Examined:
    """AMD's assembly is text that tells its own registers, stack and shared memory."""
    assembly = compiled.asm["amdgcn"]
    facts = {name: int(number) for name, number in re.findall(r"^\s+\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    facts["group_segment_fixed_size"] = max(facts["group_segment_fixed_size"], compiled.metadata.shared)
    products = re.findall(rf"\b{target.matrix}\w+", assembly)
    return Examined(
        launch,
        compiled.hash,
        facts["vgpr_count"],
        facts["private_segment_fixed_size"],
        facts["group_segment_fixed_size"],
        work,
        matrix_instructions=len(products),
        violations=amd_violations(facts, set(products), target, product),
    )


def label_of(launch: Launch) -> str:
    """The kernel and which of its variants."""
    given = launch.arguments
    parts = [launch.name]
    if launch.name == "add_product":
        parts += ["G^T x" if given["TRANSPOSED"] else "G y", "last" if given["out"] is not None else ""]
    if launch.name == "merge_partials":
        parts.append({0: "lse", 1: "softplus", 3: "mean", 4: "hinge", 5: "count"}[given["KIND"]])
    if launch.name in LATE:
        parts += late_label(given)
    if launch.name in TOKENS:
        parts += token_label(given)
    if given.get("CONTINUE"):
        parts.append("+=")
    if is_guarded(launch):
        parts.append({"CALM": "shifted", "ONE_EXPONENTIAL": "two exp"}[_guard(launch)] if not _serves(launch) else "")
    return " ".join(part for part in parts if part)


def _guard(launch: Launch) -> str:
    return "CALM" if launch.name == "reduce_tiles" else "ONE_EXPONENTIAL"


def is_guarded(launch: Launch) -> bool:
    """Whether the launch is one of two of which a flag on the device picks one; the other one returns at once."""
    return any(launch.arguments.get(flag) is not None for flag in ("calm", "one_exponential"))


def _serves(launch: Launch) -> bool:
    return bool(launch.arguments[_guard(launch)])


def runs_at(launch: Launch, small_scores: bool) -> bool:
    """Whether it does its work where scores are small enough for sums without shifts, or where they are not."""
    return not is_guarded(launch) or _serves(launch) == small_scores
