"""The drawn report and the comparison of runs, on rows that a run on two cores recorded (tests/recorded)."""

import contextlib
import copy
import fnmatch
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).parent / "recorded" / "contrastive.json"


def _load_benchmarks():
    """The folder as the package `benchmarks`, without the root on sys.path."""
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])


_load_benchmarks()

from benchmarks import regressions, selection  # noqa: E402
from benchmarks.drawn import ReportError, families, figures, results, spread, tables, theme, words, write_report  # noqa: E402
from benchmarks.drawn import audit as audits  # noqa: E402


@pytest.fixture(scope="module")
def rows():
    return results.read_results([RECORDED])


@pytest.fixture
def stored():
    return json.loads(RECORDED.read_text())


def rounds(run, part, *, times=1.0, ours=1.0, only=""):
    """A run of every other recorded round: two parts are two runs whose difference is what the machine really does.

    Everybody's time is multiplied by `times`, ours in rows whose name has `only` by `ours` as well.
    """
    run = copy.deepcopy(run)
    for row in run["benchmarks"]:
        info = row["extra_info"]
        for name, each in info["contenders"].items():
            factor = times * (ours if name == info["ours"] and only in row["name"] else 1.0)
            each["seconds"] = [second * factor for second in each["seconds"][part::2]]
        row["stats"]["median"] = results.row_of(row).ours.median
    return run


def changes(then, now):
    return {
        new["name"]: regressions.change_of(results.row_of(old), results.row_of(new))
        for old, new in zip(then["benchmarks"], now["benchmarks"], strict=True)
    }


def test_rows_as_they_were_recorded(rows):
    row = next(row for row in rows if row.sizes == {"batch": 8192, "width": 512})
    assert (row.suite, row.subject, row.place) == ("contrastive", "pairtile cpp", "2 threads")
    assert row.torch is None, "older JSONs do not say"
    assert row.best_other.name == "one product (compiled)"
    assert row.ratio("open_clip") == pytest.approx(4.407 / 1.435, rel=1e-3)
    assert row.ours.value_error == pytest.approx(6.87e-10, rel=1e-3)
    assert row.ours.gradient_error == pytest.approx(2.958e-07, rel=1e-3), "the worst of dx and dy"
    assert [name for name, each in row.contenders.items() if each.ours] == ["pairtile cpp", "pairtile torch"]
    assert "262 GFLOP (7.62 N M D) at 221 GFLOP/s" in row.floor


def test_uncertainty_of_a_ratio():
    assert spread.ratio_uncertainty([1.0] * 9, [2.0] * 9) == 0
    assert spread.is_noisy([1.0], [2.0]), "of one round nothing is known"
    # Quartiles 0.9 and 1.1 around 1, nine rounds: the error of the median, in each of the two runs.
    rounds = [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2]
    error = 1.2533 / 1.349 * 0.2 / 3
    assert spread.ratio_uncertainty(rounds, [1.0] * 9) == pytest.approx(1.645 * 2**0.5 * error)
    assert spread.is_noisy(rounds, [1.0] * 9)
    assert not spread.is_noisy(rounds * 4, [1.0] * 9), "four times the rounds halve it"


def test_families(rows):
    (series,) = families.series_of(rows)
    assert (series.case, series.key, series.fixed) == ("ClipLoss float32", "batch", "width 768")
    assert [row.sizes["batch"] for row in series.rows] == [64, 256, 1024]
    assert not series.has_memory
    names = [row.title for row in families.headline_rows(rows, [series])]
    assert "ClipLoss float32, batch 1,024, width 768" in names
    assert "ClipLoss float32, batch 64, width 768" not in names
    assert families.ranks_of(rows[0]) is None


def test_the_newest_run_of_a_row_counts(tmp_path, stored):
    stored["datetime"] = "2027-01-01T00:00:00"
    stored["benchmarks"] = stored["benchmarks"][:1]
    (tmp_path / "later.json").write_text(json.dumps(stored))
    rows = results.read_results([RECORDED, tmp_path / "later.json"])
    assert [row.run.file for row in rows if row.sizes == {"batch": 64, "width": 768}] == ["later.json"]
    assert len(rows) == 5


def test_markdown_tables(rows):
    (line,) = (line for line in tables.summary(rows).markdown().splitlines() if "8,192" in line)
    for cell in ("1.44 s", "one product (compiled)", "1.99 s", "1.39x", "101 MB", "5.50x", "1.18 s", "82%", "3e-07"):
        assert f"| {cell} |" in line
    row = next(row for row in rows if "8,192" in row.title)
    (noisy,) = (line for line in tables.contenders(row).markdown().splitlines() if "| open_clip |" in line)
    assert "| noisy ±11%, 3.07x |" in noisy
    assert [words.duration(each) for each in (2.5e-5, 0.00125, 0.25, 12.0)] == [
        "25.0 µs",
        "1.25 ms",
        "250 ms",
        "12.0 s",
    ]


def test_report_is_whole_and_needs_no_network(tmp_path, stored):
    """Rows over ranks and an audit beside the recorded ones: every kind of figure is drawn."""
    single = next(row for row in stored["benchmarks"] if row["name"] == "test_clip")
    over_ranks = copy.deepcopy(single)
    over_ranks["extra_info"]["case"] += " on 2 ranks"
    stored["benchmarks"].append(over_ranks)
    stored["pairtile"] = {"command": "pytest benchmarks -k 'clip & <b>'"}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    bound = {"gpu": "H100", "request": "CLIP", "phase": "forward", "library": "pairtile", "kernel": "", "share4": 0.98}
    audit = {"date": "2026-11-22", "triton": "3.8.0", "bounds": [bound | {"serial": 0.64}]}
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    page = write_report([tmp_path / "run.json"], tmp_path / "report", tmp_path / "audit.json")
    drawn = {file.name for file in page.parent.glob("*.png")}
    for name in ("ratios_contrastive", "time_cliploss_float32", "errors_contrastive", "ranks", "audit"):
        assert {f"{name}.png", f"{name}-dark.png"} <= drawn
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(drawn)
    assert not re.search(r"(src|href|srcset)=\"(?!data:|#)", text), "nothing is fetched"
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert "-k &#39;clip &amp; &lt;b&gt;&#39;</code>" in text
    for said in ("AMD EPYC, 2 cores", "2 threads", "2026-11-22", "noisy", "98%", "floor"):
        assert said in text
    markdown = (page.parent / "report.md").read_text()
    assert all(name in markdown for name in drawn)
    # every figure says on what, when and how
    assert markdown.count("AMD EPYC, 2 cores, Linux x86_64; 2 threads") >= 5


def test_command(tmp_path, monkeypatch):
    """`pairtile report` is the same code under its installed name."""
    from pairtile.engine import cli

    for given, code in ((RECORDED, 0), (tmp_path / "absent.json", 2)):
        monkeypatch.setattr(sys, "argv", ["pairtile", "report", str(given), "--out", str(tmp_path / "out")])
        monkeypatch.setattr("pairtile.report.page.figures", lambda rows, audit: [])
        with pytest.raises(SystemExit) if code == 0 else contextlib.nullcontext() as stopped:
            assert cli.run() == code
        assert code or stopped.value.code in (0, None)
    assert (tmp_path / "out" / "report.md").is_file()


def test_what_cannot_be_read_is_named(tmp_path):
    for text, said in (("{", "no JSON"), ("[]", "not a JSON of pytest-benchmark"), (None, "No such file")):
        if text is not None:
            (tmp_path / "given.json").write_text(text)
        with pytest.raises(ReportError, match=said):
            results.read_results([tmp_path / ("given.json" if text else "absent.json")])
    (tmp_path / "given.json").write_text(json.dumps({"machine_info": {}, "benchmarks": []}))
    with pytest.raises(ReportError, match=r"no rows in .*given.json"):
        results.read_results([tmp_path / "given.json"])
    with pytest.raises(ReportError, match="not an export of the audit"):
        audits.read_audit(tmp_path / "given.json")


def test_without_matplotlib_it_says_what_to_install(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"pip install 'pairtile\[report\]'"):
        figures.figures(rows, None)


def test_a_palette_that_everybody_can_tell_apart():
    """Luminance: a figure keeps its meaning where colours are lost, and stands out from its page."""

    def luminance(color):
        channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted(map(luminance, (one, other)))
        return (high + 0.05) / (low + 0.05)

    for each in (theme.LIGHT, theme.DARK):
        assert contrast(each.ink, each.background) > 7, "WCAG AAA"
        assert contrast(each.muted, each.background) > 4.5, "WCAG AA"
        for color in (each.ours, *each.others):
            assert contrast(color, each.background) > 3, f"{color}: WCAG's limit for graphics"


def test_noise_is_no_regression_and_a_slower_machine_neither(stored):
    for name, change in changes(rounds(stored, 0), rounds(stored, 1, times=1.6)).items():
        assert change.slower / (1 + change.uncertainty) < 1.15, name
        assert 1.3 < change.yardstick < 2.0, name


def test_a_planted_slowdown_is_found_in_its_row_alone(stored):
    found = changes(rounds(stored, 0), rounds(stored, 1, times=0.7, ours=1.3, only="siglip"))
    slower = {name for name, change in found.items() if change.slower / (1 + change.uncertainty) > 1.15}
    assert slower == {"test_siglip_sizes[1024-2048]"}


def test_a_row_of_ours_alone_is_held_to_the_floor(stored):
    run = rounds(stored, 0)
    for row in run["benchmarks"]:
        info = row["extra_info"]
        info["contenders"] = {info["ours"]: info["contenders"][info["ours"]]}
    slow = rounds(run, 0, ours=1.3)
    for row in slow["benchmarks"]:
        row["extra_info"]["floor"]["seconds"] *= 2
    for change in changes(run, slow).values():
        assert change.beside == "floor"
        assert change.yardstick == pytest.approx(2)


REPLAYED = """
import json, os
import pytest
from benchmarks.regressions import tell
from benchmarks.replay import measured_time

ROWS = json.load(open(os.environ["RECORDED_ROWS"]))["benchmarks"]

@pytest.mark.benchmark(timer=measured_time)
@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_row(row, request, benchmark):
    info = row["extra_info"]
    tell(request.config, benchmark, info, info["contenders"][info["ours"]]["seconds"])
"""


def test_bench_compare_fails_for_a_planted_slowdown_alone(tmp_path, stored):
    """The options of `make bench-compare`, with pytest-benchmark itself, over recorded rounds."""
    (options,) = re.findall(r"--benchmark-compare-fail=\S+", (ROOT / "Makefile").read_text())
    (tmp_path / "test_replayed.py").write_text(REPLAYED)
    then = rounds(stored, 0)
    for row in then["benchmarks"]:
        row["fullname"] = f"test_replayed.py::test_row[{row['name']}]"
    (tmp_path / "then.json").write_text(json.dumps(then))
    for planted, expected in ((1.0, 0), (1.3, 1)):
        now = rounds(stored, 1, times=1.4, ours=planted, only="siglip")
        (tmp_path / "now.json").write_text(json.dumps(now))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "test_replayed.py",
            "-p",
            "benchmarks.regressions",
            "-q",
            "--rootdir=.",
        ]
        command += ["-p", "no:cacheprovider", f"--benchmark-compare={tmp_path / 'then.json'}", options]
        environment = {"PYTHONPATH": str(ROOT), "RECORDED_ROWS": "now.json", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == expected, done.stdout + done.stderr
        regressed = re.findall(r"test_row\[(\S+)\] \S+ - Field 'median' has failed", done.stdout + done.stderr)
        assert regressed == (["test_siglip_sizes[1024-2048]"] if expected else []), done.stdout + done.stderr


def test_rows_of_the_short_run_exist():
    """Every name in the selection is a row, and the selection is what `pytest benchmarks` keeps."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "BENCH"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    kept = re.findall(r"^benchmarks/(test_\w+\.py)::(.*)$", done.stdout, re.MULTILINE)
    for file, names in selection.SHORT.items():
        rows = [name for where, name in kept if where == file]
        for pattern in names:
            assert any(fnmatch.fnmatchcase(row, pattern) for row in rows), f"{file}: no row is called {pattern}"
        assert all(any(fnmatch.fnmatchcase(row, pattern) for pattern in names) for row in rows)
    assert "deselected" in done.stdout
