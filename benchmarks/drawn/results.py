"""Results as read back from pytest-benchmark's JSON: rows, their contenders, and the runs that measured them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .spread import quartiles, ratio_uncertainty

_SCALARS = ("dscale", "dbias")


class ReportError(ValueError):
    """Results that cannot be read or drawn; one line that says what was given, what was expected and what to do."""


@dataclass(frozen=True)
class Run:
    """One run of pytest: where its figures come from.

    Attributes:
        file: name of the JSON.
        date: of its end, ISO 8601.
        machine: processor, cores and system, in words.
        command: how pytest was called; None where the JSON does not say.
        commit: of the repository, abbreviated, with a mark where it had changes.
    """

    file: str
    date: str
    machine: str
    command: str | None
    commit: str | None

    @property
    def day(self) -> str:
        return self.date[:10]


@dataclass(frozen=True)
class Contender:
    """One implementation in a row: seconds of one call in each round, bytes above the inputs, relative errors."""

    name: str
    seconds: tuple[float, ...]
    peak_bytes: int | None
    value_error: float | None
    gradient_error: float | None
    ours: bool
    comparable: bool
    compiled: bool

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.seconds)


@dataclass(frozen=True)
class Row:
    """One piece of work and those who did it on the same inputs.

    Attributes:
        case: its name, e.g. "ClipLoss float32".
        suite: the file it is in, e.g. "contrastive".
        sizes: e.g. {"batch": 8192, "width": 512}.
        error_sizes: where the errors were measured, which float64 may keep below `sizes`.
        place: the device, or so many threads.
        torch: version; None where the JSON does not say.
        subject: the first of ours, which ratios are relative to.
        contenders: by name.
        missing: who did not take part, and why.
        floor_seconds: no run of the work can be faster.
        floor: what that is made of, in words.
        bars: texts of the requirements and what became of them.
    """

    case: str
    suite: str
    sizes: Mapping[str, int]
    error_sizes: Mapping[str, int]
    place: str
    torch: str | None
    subject: str
    contenders: Mapping[str, Contender]
    missing: Mapping[str, str]
    floor_seconds: float
    floor: str
    bars: tuple[str, ...]
    run: Run

    @property
    def ours(self) -> Contender:
        return self.contenders[self.subject]

    @property
    def others(self) -> list[Contender]:
        """Those who compute the same and are not ours."""
        return [each for each in self.contenders.values() if not each.ours and each.comparable]

    @property
    def best_other(self) -> Contender | None:
        return min(self.others, key=lambda each: each.median, default=None)

    @property
    def sizes_text(self) -> str:
        return _text(self.sizes)

    @property
    def error_sizes_text(self) -> str:
        return _text(self.error_sizes)

    @property
    def title(self) -> str:
        return f"{self.case}, {self.sizes_text}"

    def ratio(self, name: str) -> float:
        """Of the medians: how many times our time it takes."""
        return self.contenders[name].median / self.ours.median

    def uncertainty(self, name: str) -> float:
        """See `spread.ratio_uncertainty`."""
        return ratio_uncertainty(self.ours.seconds, self.contenders[name].seconds)


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size:,}" for name, size in sizes.items())


def read_results(files: Sequence[Path]) -> list[Row]:
    """The rows of all files; of a row that was run several times under one torch and on one device, the newest.

    Args:
        files: what ``pytest benchmarks --benchmark-json=FILE`` wrote.

    Raises:
        ReportError: a file is missing, is no such JSON, or no file has a row.
    """
    newest: dict[tuple[object, ...], Row] = {}
    rows = [row for file in files for row in _rows_of(file)]
    for row in sorted(rows, key=lambda row: row.run.date):
        key = (row.suite, row.case, tuple(row.sizes.items()), row.torch, row.place)
        newest[key] = row
    if not newest:
        names = ", ".join(str(each) for each in files) or "no file"
        raise ReportError(f"no rows in {names}: expected the JSON of `pytest benchmarks --benchmark-json=FILE`")
    # in the order of the suites, not in that of the dates
    return [row for row in rows if any(row is each for each in newest.values())]


def _rows_of(file: Path) -> Iterable[Row]:
    try:
        stored = json.loads(file.read_text())
    except OSError as error:
        raise ReportError(f"{file}: {error.strerror}; expected a JSON that `make bench` wrote") from None
    except ValueError as error:
        raise ReportError(f"{file}: no JSON ({error}); expected what --benchmark-json writes") from None
    if not isinstance(stored, dict) or "benchmarks" not in stored or "machine_info" not in stored:
        raise ReportError(f"{file}: not a JSON of pytest-benchmark; expected what `make bench` writes")
    run = _run_of(file, stored)
    for each in stored["benchmarks"]:
        if "contenders" in each.get("extra_info", {}):
            yield row_of(each, run)


def _run_of(file: Path, stored: Mapping[str, Any]) -> Run:
    machine, commit = stored["machine_info"], stored.get("commit_info") or {}
    cpu = machine.get("cpu", {})
    words = [
        cpu.get("brand_raw") or machine.get("processor") or machine.get("machine", "unknown processor"),
        f"{cpu['count']} cores" if "count" in cpu else "",
        f"{machine.get('system', '')} {machine.get('machine', '')}".strip(),
    ]
    identity = commit.get("id")
    return Run(
        file=file.name,
        date=stored.get("datetime", ""),
        machine=", ".join(word for word in words if word),
        command=stored.get("pairtile", {}).get("command"),
        commit=f"{identity[:9]}{' with changes' if commit.get('dirty') else ''}" if identity else None,
    )


_UNKNOWN_RUN = Run("", "", "", None, None)


def row_of(stored: Mapping[str, Any], run: Run = _UNKNOWN_RUN) -> Row:
    """One row from what pytest-benchmark keeps of a test: its "fullname" and the "extra_info" of ours."""
    info = stored["extra_info"]
    suite = stored["fullname"].split("::")[0].rsplit("/", 1)[-1].removesuffix(".py").removeprefix("test_")
    threads = info.get("threads")
    return Row(
        case=info["case"],
        suite=suite,
        sizes=info["sizes"],
        error_sizes=info.get("error_sizes") or info["sizes"],
        place=info.get("place") or (f"{threads} threads" if threads else "unknown threads"),
        torch=info.get("torch"),
        subject=info["ours"],
        contenders={name: _contender_of(name, each, info) for name, each in info["contenders"].items()},
        missing=info.get("missing", {}),
        floor_seconds=info["floor"]["seconds"],
        floor=_floor_text(info),
        bars=tuple(each["text"] for each in info.get("bars", ())),
        run=run,
    )


def _contender_of(name: str, stored: Mapping[str, Any], info: Mapping[str, Any]) -> Contender:
    errors = dict(stored.get("errors") or {})
    value = next(iter(errors), None)
    matrices = info.get("matrix_gradients") or [each for each in errors if each not in (value, *_SCALARS)]
    gradients = [errors[each] for each in matrices if each in errors]
    return Contender(
        name=name,
        seconds=tuple(stored["seconds"]),
        peak_bytes=stored.get("peak_bytes"),
        value_error=errors[value] if value is not None else None,
        gradient_error=max(gradients, default=None),
        ours=stored.get("ours", name == info["ours"] or name.startswith("pairtile")),
        comparable=stored.get("comparable", True),
        compiled=name.endswith("(compiled)"),
    )


def _floor_text(info: Mapping[str, Any]) -> str:
    work, floor = info["work"], info["floor"]
    return (
        f"{work['flops'] / 1e9:.3g} GFLOP ({work['formula']}) at {floor['flops_per_second'] / 1e9:.0f} GFLOP/s "
        f"({floor['source']}, {work['dtype']}), {work['least_bytes'] / 1e6:.3g} MB at "
        f"{floor['bytes_per_second'] / 1e9:.1f} GB/s"
    )
