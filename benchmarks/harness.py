"""How the suites measure one row: agreement, errors, interleaved rounds, the floor, peak memory, bars.

A suite describes each row as a `Case`; `measure(case)` runs it and returns a `Result`.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bars import Bar, Judgement, NotMeasured
from .floor import Floor, FloorMeter
from .peak import peak_memory
from .work import Work

#: One call: forward and backward, returning what `Case.results` names.
Call = Callable[[], list[Tensor]]
#: Given the leaves, returns the call.
Prepare = Callable[[list[Tensor]], Call]

#: Seconds. Shorter calls are repeated within a round until they last as long, so that the first of them, which finds
#: the caches as another contender left them, weighs little.
_LEAST_BURST = 0.02

#: Seconds. Shorter calls are made once, unmeasured, before each round's measured ones: what memory costs is then that of
#: a loop of this call, and not of what ran before. On virtual machines with free page reporting freed memory goes back
#: to the host within a second or two, and to touch it again takes ten times as long: 200 MB took 0.3 s more.
_LONGEST_SETTLED = 2.0


@dataclass(frozen=True)
class Contender:
    """One implementation in a row.

    Attributes:
        name: as printed.
        prepare: a module's function or a partial of one: it is pickled for the memory run.
        missing: why it cannot take part here; None if it can.
        ours: it is one of ours; the first of ours that is there is the one that bars speak of.
        compiled: it compiles for the sizes it sees first.
        comparable: it computes what the others do; False: it is timed beside them, and neither compared nor exact.
    """

    name: str
    prepare: Prepare
    missing: str | None = None
    ours: bool = False
    compiled: bool = False
    comparable: bool = True


@dataclass(frozen=True)
class Case:
    """A row: one piece of work, and those who do it on the same inputs.

    Attributes:
        name: as printed, e.g. "ClipLoss float32".
        inputs: makes the leaves of given sizes, the same ones each time; pickled like `Contender.prepare`.
        sizes: keyword arguments of `inputs` for the measured call.
        work: what the floor is computed from.
        contenders: ours first.
        results: names of what a call returns, the value first, e.g. ("value", "dx", "dy", "dscale").
        matrix_gradients: those of `results` that the table's column of gradient errors is about.
        exact: the dense formula, given float64 leaves: the truth of the error columns.
        error_sizes: where the errors are measured, if float64 at `sizes` takes over 4 GB or too long.
        small_sizes: sizes of the memory run's first call; None: peak memory is not measured.
        agreement: largest relative norm by which the contenders may differ from ours before anything is timed.
        bars: what the row is held to.
        rounds: interleaved rounds.
    """

    name: str
    inputs: Callable[..., list[Tensor]]
    sizes: Mapping[str, int]
    work: Work
    contenders: Sequence[Contender]
    results: Sequence[str]
    matrix_gradients: Sequence[str]
    agreement: float
    exact: Prepare | None = None
    error_sizes: Mapping[str, int] | None = None
    small_sizes: Mapping[str, int] | None = None
    bars: Sequence[Bar] = ()
    rounds: int = 5


@dataclass
class Measured:
    """Of one contender: seconds of one call in each round, peak bytes, and the error of each result.

    On a GPU also the seconds after which the host has launched a call, which then may still run.
    """

    seconds: list[float]
    calls_per_round: int
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    host_seconds: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def interquartile(self) -> float:
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


@dataclass
class Result:
    """What `measure` found. Methods that get no name speak of our own first contender.

    Attributes:
        subject: its name.
        threads: of the CPU.
        missing: the contenders that did not take part, and why.
        gradient_bytes: what the gradients take, in everybody's peak.
        call: our own, for pytest-benchmark; dropped afterwards, since it holds the leaves.
        place: what the row ran on, as printed; None: the CPU's threads.
        remarks: what else a reader of the row should know.
    """

    case: Case
    subject: str
    threads: int
    floor: Floor
    measured: dict[str, Measured]
    missing: dict[str, str]
    gradient_bytes: int
    call: Call | None
    judgements: list[Judgement] = field(default_factory=list)
    place: str | None = None
    remarks: list[str] = field(default_factory=list)

    def _of(self, name: str | None) -> Measured:
        name = name or self.subject
        if name not in self.measured:
            raise NotMeasured(f"{name}: {self.missing.get(name, 'not a contender of this row')}")
        return self.measured[name]

    def median(self, name: str | None = None) -> float:
        return self._of(name).median

    def peak(self, name: str | None = None) -> int:
        peak = self._of(name).peak_bytes
        if peak is None:
            raise NotMeasured("peak memory was not measured")
        return peak

    def floor_seconds(self) -> float:
        return self.floor.seconds(self.case.work)

    def share(self, name: str | None = None) -> float:
        """The floor of the row's algorithm over the time taken, whatever algorithm took it."""
        return self.floor_seconds() / self.median(name)


def forward_and_backward(make_loss: Callable[[], Callable[..., Tensor]], leaves: list[Tensor]) -> Call:
    """A training step of a loss: its value, then the gradient of each leaf that requires one."""
    loss = make_loss()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def call() -> list[Tensor]:
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, wanted)]

    return call


def forward_alone(make_function: Callable[[], Callable[..., Tensor]], leaves: list[Tensor]) -> Call:
    """The value of an evaluation: nothing is kept for a backward."""
    function = make_function()

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [function(*leaves)]

    return call


def in_float32(prepare: Prepare, leaves: list[Tensor]) -> Call:
    """`prepare` on float32 copies of 16-bit leaves, made before the clock runs."""
    return prepare(converted(leaves, torch.float32))


def measure(case: Case, meter: FloorMeter | None = None) -> Result:
    """Run one row.

    Args:
        case: the row.
        meter: what measures the floor, three times per row; one for the row's dtype if none is given.

    Raises:
        AssertionError: contenders that do not compute the same function, or a result that is not finite.
        ValueError: none of ours can run.
    """
    torch.compiler.reset()  # recompilations of earlier rows would count towards dynamo's limit
    present = [each for each in case.contenders if each.missing is None]
    missing = {each.name: each.missing for each in case.contenders if each.missing is not None}
    subject = next((each.name for each in present if each.ours), None)
    if subject is None:
        raise ValueError(f"{case.name}: none of our own contenders can run here: {missing}")

    leaves = case.inputs(**case.sizes)
    calls = {each.name: each.prepare(leaves) for each in present}
    assert_agreement(case, {each.name: calls[each.name] for each in present if each.comparable}, subject)
    for each in present:
        if not each.comparable:
            calls[each.name]()
    meter = meter or FloorMeter(case.work.dtype, read_only=case.work.read_only)
    measured = timed(calls, case.rounds, between=meter.sample)
    errors = measured_errors(case, [each for each in present if each.comparable])
    for each in present:
        measured[each.name].errors = errors.get(each.name, {})
        if case.small_sizes is not None:
            measured[each.name].peak_bytes = peak_memory(
                case.inputs, case.sizes, case.small_sizes, each.prepare, compiled=each.compiled
            )
    result = Result(
        case=case,
        subject=subject,
        threads=torch.get_num_threads(),
        floor=meter.floor(),
        measured=measured,
        missing=missing,
        gradient_bytes=sum(leaf.nbytes for leaf in leaves if leaf.requires_grad),
        call=calls[subject],
    )
    result.judgements = [bar.judge(result) for bar in case.bars]
    return result


def assert_agreement(case: Case, calls: Mapping[str, Call], subject: str) -> None:
    """All contenders compute one function, on the inputs that are timed; also their first warm-up."""
    ours = calls[subject]()
    for name, call in calls.items():
        given = ours if name == subject else call()
        for result, ours_of_it, others_of_it in zip(case.results, ours, given, strict=True):
            difference = relative_error(others_of_it, ours_of_it)
            where = f"{case.name}: {result} of {name}"
            assert bool(others_of_it.isfinite().all()), f"{where} is not finite"
            assert difference <= case.agreement, f"{where} differs from {subject}'s by {difference:.1e}"


def relative_error(given: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    given, truth = given.detach().double(), truth.detach().double()
    return float((given - truth).norm() / truth.norm().clamp(min=torch.finfo(torch.float32).tiny))


def measured_errors(case: Case, contenders: Sequence[Contender]) -> dict[str, dict[str, float]]:
    """The relative error of each result of each contender against the dense formula in float64."""
    if case.exact is None:
        return {}
    leaves = case.inputs(**(case.error_sizes or case.sizes))
    truth = case.exact(converted(leaves, torch.float64))()
    return {
        each.name: {
            result: relative_error(given, expected)
            for result, given, expected in zip(case.results, each.prepare(leaves)(), truth, strict=True)
        }
        for each in contenders
    }


def timed(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    between: Callable[[], None] = lambda: None,
    burst: Callable[[Call, int], float] | None = None,
    least_burst: float | None = None,
) -> dict[str, Measured]:
    """Seconds of each round of each contender; every one has been called at least once before.

    The contenders take turns within a round, and each round begins with another one: a machine that slows down
    or speeds up during the run changes all of them alike, and nobody always runs on a neighbour's warm cache.
    A call of at most two seconds is made once more before each of its rounds, unmeasured, unless there is one round.
    `between` is called before, halfway through and after the rounds. `burst` is the clock, seconds per call of so
    many calls, by default the host's; a round of a contender lasts for `least_burst` seconds at least (0: one call).
    """
    names = list(calls)
    burst = burst or _burst
    least = _LEAST_BURST if least_burst is None else least_burst
    # A row of a single round is one whose calls take long: no second warm-up.
    once = rounds == 1 or least_burst == 0
    length = {name: math.inf if once else burst(calls[name], 1) for name in names}
    repeats = {name: max(1, math.ceil(least / length[name])) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    between()
    with _no_garbage_collection():
        for turn in range(rounds):
            if turn > 0 and turn == rounds // 2:
                between()
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if length[name] <= _LONGEST_SETTLED:
                    calls[name]()
                seconds[name].append(burst(calls[name], repeats[name]))
    between()
    return {name: Measured(seconds[name], repeats[name]) for name in names}


def _burst(call: Call, calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # A collection takes longer than a small row, and would hit whoever runs when it is due.
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def converted(leaves: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another floating dtype that require gradients where the leaves do."""
    return [
        leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) if leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
