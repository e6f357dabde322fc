"""The audit of the machine code: what it reads off a listing, and that a kernel which crosses a hard line fails it.

What compiles runs in processes of its own, without TRITON_INTERPRET: a kernel made under it has no machine code.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# One program of a kernel: a loop whose first trip lies before it, and a branch of one instruction or three.
LISTING = """
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24 ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
.L_x_2:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11+0x30000], R3 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   BRA.U UP1, `(.L_x_3) ;
        /*0070*/                   MUFU.EX2 R1, R1 ;
        /*0080*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0090*/                   MUFU.EX2 R1, R1 ;
        /*00a0*/                   FADD2 R1, R1, R2 ;
        /*00b0*/                   FMNMX R1, R1, R2, PT ;
        /*00c0*/                   STL [R1+0x158], R15 ;
.L_x_4:
        /*00d0*/                   STG.E.64 [R2.64], R4 ;
        /*00e0*/                   EXIT ;
"""
ONE_PRODUCT = 2 * 64 * 128 * 16  # of a group of four warps


@pytest.fixture(scope="module")
def audit():
    """The folder as the package `benchmarks.audit`, without the root on sys.path."""
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    from benchmarks.audit import count, flow, hard_lines, machine_code, targets, work

    class Modules:
        pass

    modules = Modules()
    modules.count, modules.flow, modules.hard_lines = count, flow, hard_lines
    modules.machine_code, modules.targets, modules.work = machine_code, targets, work
    return modules


@pytest.fixture
def program(audit):
    return audit.machine_code.Program(64, 0, audit.machine_code.blocks_of(LISTING, warps=4))


def test_loops_are_found_and_run_as_often_as_a_tile_needs(audit, program):
    flow = audit.flow.Flow(program.blocks)
    assert sorted(len(body) for body in flow.loops.values()) == [1, 3]  # the wait, and the products with it inside

    work = audit.work.Work(flops=8 * ONE_PRODUCT, trips=8, streamed=0, tile="")
    target, product = audit.targets.TARGETS["sm90"], audit.count.Product("16")
    cheapest = audit.count.account(program, work, 4, target, product)
    dearest = audit.count.account(program, work, 4, target, product, dearest=True)

    # Seven trips of five instructions, since the first product lies before the loop.
    assert cheapest.products == {"HGMMA.64x128x16": 8}
    assert cheapest.executed == 1.0
    assert cheapest.counted["all"] == 1 + 7 * 5 + 1 + 2 + 2
    assert dearest.counted["all"] == cheapest.counted["all"] - 2 + 4
    assert (cheapest.counted["MUFU"], dearest.counted["MUFU"]) == (1, 1)
    assert (cheapest.counted["FP32"], dearest.counted["FP32"]) == (0, 3)  # FADD2 adds two numbers
    assert (cheapest.counted["spill"], dearest.counted["spill"]) == (0, 1)
    assert cheapest.bytes == 128 * (7 * 16 + 8)
    assert cheapest.clocks["tensor"] == cheapest.clocks["useful"] == 8 * ONE_PRODUCT / 4096


def test_a_product_made_twice_shows(audit, program):
    work = audit.work.Work(flops=4 * ONE_PRODUCT, trips=8, streamed=0, tile="")
    found = audit.count.account(program, work, 4, audit.targets.TARGETS["sm90"], audit.count.Product("16"))
    assert found.executed == 2.0
    assert found.clocks["share"] == 0.5


def test_tensor_core_instructions_of_each_generation(audit):
    listing = """
        /*0000*/                   UMOV UR41, 0x8200490 ;
        /*0010*/                   UTCHMMA gdesc[UR6], gdesc[UR14], tmem[UR9], tmem[UR40], idesc[UR41], !UPT ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/                   HGMMA.64x64x8.F32.TF32 R4, R8, gdesc[UR4], R4 ;
        /*0040*/                   UIADD3 UR41, UR41, 0x1, URZ ;
        /*0050*/                   UTCHMMA gdesc[UR6], gdesc[UR14], tmem[UR9], tmem[UR40], idesc[UR41], UPT ;
        /*0060*/                   EXIT ;
    """
    (block,) = audit.machine_code.blocks_of(listing, warps=8)[:1]
    found = [(each.flops, each.kind, each.rows) for each in block.code if each.kind]
    assert found == [
        (2 * 128 * 128 * 16, "16", 128),  # by one thread for the block
        (2 * 16 * 8 * 16 * 8, "16", 16),  # by each warp
        (2 * 64 * 64 * 8 * 2, "tf32", 64),  # by each group of four
        (0, "?", 0),  # whose shape is not written in the code
    ]


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_shipped_kernels_keep_the_hard_lines():
    """A few that span kernels, targets and kinds of product; `python -m benchmarks.audit --check` takes them all."""
    done = _python("-m", "benchmarks.audit", "--check", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in ("sm80", "sm90", "sm100", "gfx942"):
        assert f"{arch}, " in done.stdout


def test_a_planted_spill_fails_the_check():
    """256 x 128 numbers in the registers of four warps are 256 for each thread, which has 255 for everything."""
    tile = "reduce=256x128x64,4,2"
    done = _python(
        "-m", "benchmarks.audit", "--check", "--quick", "--arch", "90", "--only", "reduce_tiles", "--config", tile
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bytes of stack" in done.stdout
    assert "loads and stores of spilled registers" in done.stdout


def test_a_planted_tf32_product_fails_the_check():
    """A host that casts bfloat16 features to float32 on the way to the kernel, as some do."""
    done = _python(
        "-c",
        textwrap.dedent("""
            import dataclasses, torch
            from benchmarks.audit.check import checked
            from benchmarks.audit.requests import request
            from benchmarks.audit.targets import TARGETS

            asked, wide = (request("cross-entropy", kind, 512, batch=8192) for kind in (torch.bfloat16, torch.float32))
            planted = dataclasses.replace(asked, operands=wide.operands, plan=wide.plan, precision="tf32")
            for each in checked(TARGETS["sm90"], [planted], only="weigh_tiles"):
                print(*each.violations, sep="\\n")
        """),
    )
    assert done.returncode == 0, done.stderr
    assert "TF32: products are to be 16 bits wide" in done.stdout


def test_tensors_without_memory_compile_as_real_ones_do():
    done = _python(
        "-c",
        textwrap.dedent("""
            import dataclasses, torch
            from benchmarks.audit import launches
            from benchmarks.audit.requests import request
            from benchmarks.audit.targets import TARGETS, compiling_for

            def identities(request):
                recorded = launches.recorded(request, target)
                return [(each.name, each.compiled().hash) for each in recorded if "tiles" not in each.name]

            target, asked = TARGETS["sm90"], request("CLIP", torch.bfloat16, 64, batch=200)
            real = asked.operands._replace(x=torch.ones(200, 64).bfloat16(), y=torch.ones(200, 64).bfloat16())
            real = dataclasses.replace(asked, operands=real._replace(scale=torch.ones(())))
            with compiling_for(target):
                found = identities(asked)
                launches._located = lambda value: value
                assert identities(real) == found, (identities(real), found)
            print(len(found))
        """),
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-m", "benchmarks.audit"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
