"""How a row is measured on a GPU: within a budget of seconds, and whatever a contender runs into, the row goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..harness import Call, Case, Contender, Measured, Result, converted, relative_error, timed
from .device import MM_SHAPES, Device, FloorMeter, matmul_precision

#: Of the row's seconds, for first calls: imports, compilation, agreement, memory. The rounds get the rest.
_FIRST_CALLS = 0.7
#: More rounds than this do not change a median.
_MOST_ROUNDS = 30
#: The host's seconds per call are worth a remark where they are more than this share of the call's.
_HOST_SHARE = 0.5
#: Elements of a result that are compared at a time, in float64.
_COMPARED = 2**25


@dataclass(frozen=True)
class GpuCase(Case):
    """A row.

    Attributes:
        matmul: what torch.set_float32_matmul_precision is for everybody in this row.
        rate: the same, for the floor's product.
        source: how the floor's product is called.
    """

    matmul: str = "highest"
    rate: str = "highest"
    source: str = "torch.mm"


@dataclass
class GpuResult(Result):
    """Attributes:
    failures: of ours that raised, or that computed something else; a row with one of them is not passed.
    """

    failures: dict[str, str] = field(default_factory=dict)


class RowFailed(Exception):
    """None of ours could run; the text says why."""


class DeviceLost(Exception):
    """A contender's error that the process cannot recover from, such as an illegal memory access."""


@dataclass
class _Guarded:
    """A call that never raises: the first error is kept and ends its part in the rounds."""

    call: Call
    rehearse: bool
    failed: str | None = None

    def __call__(self) -> list[Tensor]:
        if self.failed is None:
            try:
                return self.call()
            except Exception as error:
                self.failed = explained(error)
        return []


class Measurement:
    """One row: `result()` runs it.

    Args:
        case: the row.
        device: where.
        seconds: the row's budget. What has begun is ended, so that a compilation may exceed it.
        without: names of contenders that are left out.
        clock: tells the time.
        shapes: of the floor's products.

    Raises:
        RowFailed, DeviceLost: from `result()`.
    """

    def __init__(
        self,
        case: GpuCase,
        device: Device,
        seconds: float,
        *,
        without: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
        shapes: tuple[tuple[int, int, int], ...] = MM_SHAPES,
    ) -> None:
        self._case, self._device, self._clock, self._without = case, device, clock, without
        self._start, self._seconds = clock(), seconds
        self._meter = FloorMeter(device, case.work.dtype, case.source, shapes)
        self._missing: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._remarks: list[str] = []
        self._peaks: dict[str, int] = {}
        self._errors: dict[str, dict[str, float]] = {}
        self._subject: str | None = None
        self._expected: list[Tensor] = []

    def result(self) -> GpuResult:
        if any(each.compiled and each.name not in self._without for each in self._case.contenders):
            torch.compiler.reset()  # recompilations of earlier rows would count towards dynamo's limit
        with matmul_precision(self._case.matmul):
            leaves = self._case.inputs(**self._case.sizes, device=self._device.name)
            truth = self._truth(leaves)
            calls = {}
            for contender in self._case.contenders:
                if not contender.ours and self._subject is None:
                    break
                call = self._first_call(contender, leaves, truth)
                if call is not None:
                    calls[contender.name] = call
            if self._subject is None:
                raise RowFailed(f"{self._case.name}: none of ours could run: {self._missing}")
            self._expected, truth = [], None
            try:
                return self._timed(calls, leaves)
            except (RowFailed, DeviceLost):
                raise
            except Exception as error:  # of the device itself: a call's own are caught where it is called
                reason = explained(error)
            names = ", ".join(calls)
            self._check_device(f"timing ({reason})", f"One of {names} did it: PAIRTILE_BENCH_GPU_WITHOUT leaves it out")
            raise RowFailed(f"{self._case.name}: while timing {names}: {reason}")

    def _truth(self, leaves: list[Tensor]) -> list[Tensor] | None:
        if self._case.exact is None:
            return None
        try:
            return self._case.exact(converted(leaves, torch.float64))()
        except torch.OutOfMemoryError as error:
            self._remarks.append(f"no errors: float64 is {explained(error)}")
            return None
        finally:
            self._device.free()

    def _first_call(self, contender: Contender, leaves: list[Tensor], truth: list[Tensor] | None) -> Call | None:
        """The contender's call, after its first two; None, with the reason in `_missing`, where it takes no part."""
        name, spent = contender.name, self._clock() - self._start
        reason = contender.missing
        if name in self._without:
            reason = "left out by PAIRTILE_BENCH_GPU_WITHOUT"
        elif self._subject is not None and spent > _FIRST_CALLS * self._seconds:
            reason = (
                f"not run: {spent:.0f} of the row's {self._seconds:.0f} s were spent (PAIRTILE_BENCH_GPU_ROW_SECONDS)"
            )
        if reason is None:
            try:
                call = contender.prepare(leaves)
                given = call()
                self._device.synchronize()
                reason = self._judged(contender, given, truth)
                given = None  # the peak is measured without it
                if reason is None:
                    self._peaks[name] = self._device.peak_bytes(call)
                    return call
            except Exception as error:
                reason = explained(error)
            given = call = None  # whatever they hold is memory for others
            self._leave_out(contender, reason)
        else:
            self._missing[name] = reason
        return None

    def _judged(self, contender: Contender, given: list[Tensor], truth: list[Tensor] | None) -> str | None:
        """Why its results are wrong; None, with the errors noted, if they are right."""
        name, results = contender.name, self._case.results
        assert len(given) == len(results), f"{name} returned {len(given)} results, expected {results}"
        for result, each in zip(results, given):
            if each is not None and not bool(each.isfinite().all()):
                return f"wrong: its {result} is not finite"
        if self._subject is None:
            self._subject, self._expected = name, given
        for result, each, expected in zip(results, given, self._expected):
            if each is None:
                continue
            if (difference := norm_of_difference(each, expected)) > self._case.agreement:
                return f"wrong, not timed: its {result} differs from {self._subject}'s by {difference:.1e}"
        if lacking := [result for result, each in zip(results, given) if each is None]:
            self._remarks.append(f"{name}: does not compute {', '.join(lacking)}")
        if truth is not None:
            pairs = zip(results, given, truth)
            self._errors[name] = {result: relative_error(one, right) for result, one, right in pairs if one is not None}
        return None

    def _leave_out(self, contender: Contender, reason: str) -> None:
        name = contender.name
        self._missing[name] = reason
        if contender.ours:
            self._failures[name] = reason
        self._check_device(f"{name} ({reason})", f"Run again with PAIRTILE_BENCH_GPU_WITHOUT={name!r}")

    def _check_device(self, after: str, advice: str) -> None:
        try:
            self._device.free()
            self._device.synchronize()
        except Exception as error:
            raise DeviceLost(
                f"{self._case.name}: after {after} the device answers nothing but {explained(error)!r}. {advice}"
            ) from None

    def _timed(self, calls: dict[str, Call], leaves: list[Tensor]) -> GpuResult:
        guarded = {name: _Guarded(call, self._device.large(self._peaks[name])) for name, call in calls.items()}
        before = self._clock()
        for each in guarded.values():
            self._burst(each)
        once = self._clock() - before
        left = self._seconds - (self._clock() - self._start)
        rounds = max(1, min(_MOST_ROUNDS, int(left / max(once, 1e-6))))
        case = replace(self._case, rounds=rounds)
        measured = timed(guarded, rounds, between=self._sample, burst=self._burst, least_burst=0.0)
        hosts = {name: self._device.host_seconds(each) for name, each in guarded.items()}
        contenders = {each.name: each for each in case.contenders}
        for name, each in guarded.items():
            if each.failed is not None:
                del measured[name]
                self._leave_out(contenders[name], each.failed)
        if self._subject not in measured:
            raise RowFailed(f"{case.name}: {self._subject}: {self._missing[str(self._subject)]}")
        for name, each in measured.items():
            each.errors, each.peak_bytes = self._errors.get(name, {}), self._peaks[name]
            each.host_seconds = hosts[name]
            self._remark_on_host(name, each)
        return GpuResult(
            case=case,
            subject=self._subject,
            threads=torch.get_num_threads(),
            floor=self._meter.floor(),
            measured=measured,
            missing=self._missing,
            gradient_bytes=sum(leaf.nbytes for leaf in leaves if leaf.requires_grad) if len(case.results) > 1 else 0,
            call=None,
            place=self._device.title,
            remarks=self._remarks,
            failures=self._failures,
        )

    def _sample(self) -> None:
        with matmul_precision(self._case.rate):
            self._meter.sample()

    def _burst(self, call: Call, calls: int = 1) -> float:
        if isinstance(call, _Guarded) and call.rehearse:
            call()
        return self._device.seconds(call, calls)

    def _remark_on_host(self, name: str, each: Measured) -> None:
        if each.host_seconds is not None and each.host_seconds > _HOST_SHARE * each.median:
            spent, whole = (f"{seconds * 1e3:.3g}" for seconds in (each.host_seconds, each.median))
            self._remarks.append(f"{name}: the host needs {spent} ms of a call's {whole} ms, to launch or to wait")


def norm_of_difference(given: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64, a part at a time."""
    if given.shape != expected.shape:
        return float("inf")
    off = size = 0.0
    for one, other in zip(given.detach().reshape(-1).split(_COMPARED), expected.detach().reshape(-1).split(_COMPARED)):
        off += float((one.double() - other.double()).square().sum())
        size += float(other.double().square().sum())
    return (off / max(size, 1e-300)) ** 0.5


def explained(error: BaseException) -> str:
    """In one line, without the traceback, whose frames hold tensors."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
