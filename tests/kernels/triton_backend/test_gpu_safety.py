"""The sanitizer itself: each fault that it is there for, planted in a small kernel, makes it fail."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from pairtile.kernels.contrastive.triton_kernels import launching  # noqa: E402

BLOCK, LENGTH = 8, 20
PROGRAMS = launching.cdiv(LENGTH, BLOCK)


@triton.jit
def copy(source, target, length, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    if FAULT == "loads beyond":
        value = tl.load(source + at)
    elif FAULT == "loads far away":
        value = tl.load(source + at + (1 << 40), mask=inside)
    else:
        value = tl.load(source + at, mask=inside, other=0.0)
    if FAULT == "stores beyond":
        tl.store(target + at, value)
    elif FAULT == "stores to its neighbour":
        tl.store(target + (at + 1) % length, value, mask=inside)
        tl.store(target + at, value, mask=inside)
    elif FAULT == "stores twice":
        tl.store(target + at // 2 * 2, value, mask=inside)
    elif FAULT == "leaves out":
        tl.store(target + at, value, mask=inside & (at != 13))
    elif FAULT == "adds atomically":
        tl.atomic_add(target + at, value, mask=inside)
    elif FAULT == "reads its result":
        tl.store(target + at, value + tl.load(target + at, mask=inside, other=0.0), mask=inside)
    elif FAULT == "waits for another":
        tl.store(target + at, value, mask=inside)
        value += tl.load(target + (at + BLOCK) % length, mask=inside & (program > 0), other=0.0)
        tl.store(target + at, value, mask=inside)
    elif FAULT == "stores to its source":
        tl.store(source + at, value, mask=inside)
    else:
        tl.store(target + at, value, mask=inside)


def copied(source: torch.Tensor, fault: str = "") -> list[torch.Tensor]:
    target = launching.empty(LENGTH, dtype=source.dtype, device=source.device)
    arguments = {"source": source, "target": target, "length": LENGTH, "FAULT": fault, "BLOCK": BLOCK}
    launching.run(copy, (PROGRAMS,), None, arguments)
    return [target]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_kernel_without_fault_passes(gpu_safety, dtype):
    source = torch.arange(LENGTH).to(dtype)
    assert torch.equal(gpu_safety(lambda: copied(source))[0], source)
    assert gpu_safety.launches == [("copy", None)]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("loads beyond", "loads 4 elements that are none of its tensors', the first at 20 of 20"),
        ("loads far away", "loads an address of no tensor"),
        ("stores beyond", "stores 4 elements that are none of its tensors'"),
        ("stores to its neighbour", "stores what another program stored"),
        ("stores twice", "stores an element twice in one instruction"),
        ("stores to its source", "stores to a tensor that launching.empty did not make"),
        ("leaves out", "result 0 holds elements that no program stored"),
        ("adds atomically", "uses an atomic operation"),
        ("reads its result", "loads what nobody has stored"),
        ("waits for another", "loads what"),
    ],
)
def test_a_planted_fault_is_found(gpu_safety, fault, said):
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError), match=said):
        gpu_safety(lambda: copied(torch.ones(LENGTH), fault))


def test_elements_that_a_stride_leaves_out_may_not_be_loaded(gpu_safety):
    # The kernel walks one element at a time, the tensor two.
    with pytest.raises(triton.runtime.errors.InterpreterError, match="none of its tensors', the first at 1 of 39"):
        gpu_safety(lambda: copied(torch.ones(2 * LENGTH)[::2]))


@triton.jit
def running_sum(source, target, length, BLOCK: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(target, tl.sum(tl.load(source + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < length, other=0.0)))


def test_other_bits_in_another_order_are_found(gpu_safety):
    seen = []  # no kernel can tell the order without a race that is found first, so the host changes the sum

    def function():
        seen.append(1)
        target = launching.empty(1, dtype=torch.float32, device=torch.device("cpu"))
        arguments = {"source": torch.ones(4) * len(seen), "target": target, "length": 4, "BLOCK": 4}
        launching.run(running_sum, (2,), None, arguments)
        return [target]

    with pytest.raises(AssertionError, match="result 0: other bits with the grid reversed"):
        gpu_safety(function)


def test_a_function_that_launches_nothing_is_refused(gpu_safety):
    with pytest.raises(AssertionError, match="no kernel was launched"):
        gpu_safety(lambda: [torch.zeros(1)])
