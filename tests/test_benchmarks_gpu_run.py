"""The GPU suite as a whole, without a GPU: what CUDA is asked for, the budget, the folder, and pytest."""

import json
import os
import subprocess
import sys
import types
from datetime import datetime

import pytest
import torch
from fake_gpu import EAGER, ROOT, FakeDevice, clip_of, contender, raising

from benchmarks import replay
from benchmarks.gpu import __main__, device, environment, measure, rows, run


@pytest.fixture
def here():
    return FakeDevice()


@pytest.fixture
def cuda(monkeypatch):
    """A `CudaDevice` over a made-up torch.cuda, and the order of what it does: events tick once per step."""
    steps = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            steps.append("event")
            self.at = len(steps)

        def synchronize(self):
            steps.append("wait")

        def elapsed_time(self, later):
            return 1000.0 * (later.at - self.at)

    properties = types.SimpleNamespace(name="made up", total_memory=80 * 2**30, L2_cache_size=200 * 2**20)
    allocated = iter([1000, 5000])
    fakes = {
        "Event": Event,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: properties,
        "synchronize": lambda: steps.append("wait"),
        "reset_peak_memory_stats": lambda: steps.append("reset"),
        "memory_allocated": lambda: next(allocated),
        "max_memory_allocated": lambda: 7000,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device.CudaDevice, "name", "cpu")
    made = device.CudaDevice()
    assert made._flush.nbytes == 400 * 2**20, "twice the L2 cache"
    made._flush = types.SimpleNamespace(zero_=lambda: steps.append("flush"))
    return made, steps


def test_events_stand_around_the_call_and_the_flush_before_them(cuda):
    made, steps = cuda
    seconds = made.seconds(lambda: steps.extend(["call", "call"]), calls=2)
    assert steps == ["flush", "event", "call", "call", "event", "wait"] * 2
    assert seconds == 3.0, "steps between the events"


def test_peak_is_of_the_call_alone(cuda):
    made, steps = cuda
    assert made.peak_bytes(lambda: steps.append("call")) == 6000
    assert steps == ["wait", "reset", "call", "wait"]
    assert made.large(30 * 2**30)
    assert not made.large(10 * 2**30)


def test_rates_are_those_of_the_best_call(cuda, monkeypatch):
    made, _ = cuda
    took = iter([3.0, 2.0, 5.0])
    monkeypatch.setattr(made, "_event_seconds", lambda function: function() is None or next(took))
    assert made.product_seconds(4, 6, 8, torch.float32) == 2.0
    monkeypatch.setattr(device, "_COPY_BYTES", 100)
    took = iter([3.0, 2.0, 5.0])
    assert made.copy_rate() == 100.0


def test_the_floor_is_the_best_shape_s_median():
    class Rates(FakeDevice):
        def product_seconds(self, m, n, k, dtype):
            return 2 * m * n * k / {1: 5.0, 2: 7.0}[m]

    meter = device.FloorMeter(Rates(), torch.bfloat16, shapes=((1, 8, 8), (2, 8, 8)))
    meter.sample(), meter.sample()
    found = meter.floor()
    assert (found.flops_per_second, found.bytes_per_second, found.source) == (7.0, 1e12, "torch.mm")
    assert found.rate_samples == (7.0, 7.0)


def test_a_run_keeps_its_folder_up_to_date(tmp_path, here):
    session = run.Run(tmp_path / "gpu-x", run.Budget(0.2, 100.0), lambda: here, {"clock": here.clock, **EAGER})
    session.options.pop("without")
    session.measure(clip_of(contender("other")))
    with pytest.raises(measure.RowFailed):
        session.measure(clip_of(ours=(contender("first", raising(RuntimeError("bad")), ours=True),)))
    session.measure(clip_of(ours=(contender("a", ours=True), contender("b", raising(RuntimeError("odd")), ours=True))))
    text = (session.folder / "table.txt").read_text()
    assert text.count("ClipLoss bfloat16: batch 8, width 16") == 2
    assert "FAILED ClipLoss bfloat16: none of ours could run" in text
    assert "FAILED ClipLoss bfloat16: b: RuntimeError: odd" in text
    found = json.loads((session.folder / "environment.json").read_text())
    assert set(found) == {"before", "after"}
    assert found["before"]["versions"]["torch"] == torch.__version__.split("+")[0]
    session._end = 0.0
    with pytest.raises(run.TimeSpent, match="PAIRTILE_BENCH_GPU_SECONDS"):
        session.measure(clip_of())


def test_budget_from_the_environment(monkeypatch):
    assert run.Budget.from_environment() == run.Budget()
    monkeypatch.setenv("PAIRTILE_BENCH_GPU_ROW_SECONDS", "3")
    monkeypatch.setenv("PAIRTILE_BENCH_GPU_SECONDS", "60")
    monkeypatch.setenv("PAIRTILE_BENCH_GPU_WITHOUT", "memeff, cut-cross-entropy (no filter),")
    assert run.Budget.from_environment() == run.Budget(3.0, 60.0, ("memeff", "cut-cross-entropy (no filter)"))


def test_eight_minutes_are_enough():
    # Beside the rows: the start of Python, and the row that began last and compiles beyond its budget.
    assert run.Budget().seconds + run.Budget().row_seconds + 30 <= 8 * 60


def test_the_folder_s_name():
    made = environment.folder("NVIDIA H100 80GB HBM3", datetime(2026, 1, 2, 3, 4, 5))
    assert made == ROOT / "benchmarks" / "results" / "gpu-nvidia-h100-80gb-hbm3-20260102-030405"


def test_replayed_seconds():
    call = replay.replayed([0.5, 0.25])
    start = replay.measured_time()
    call()
    assert replay.measured_time() == start + 0.5
    call()
    assert replay.measured_time() == start + 0.75


def _pytest(*arguments, **more):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV", "PAIRTILE"))}
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean | more, capture_output=True, text=True)


def test_collected_and_skipped_without_a_gpu():
    done = _pytest("benchmarks/gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SKIPPED [{len(rows.ROWS)}] benchmarks/gpu/test_rows.py" in done.stdout
    assert "torch sees no CUDA device" in done.stdout


def test_without_a_gpu_no_folder_is_made(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "missing_device", lambda: "torch sees no CUDA device")
    monkeypatch.setattr(__main__, "folder", None)
    assert __main__.main() == 1
    assert "torch sees no CUDA device, so there is nothing to measure" in capsys.readouterr().err


PLUGIN = """
from functools import partial
import fake_gpu as fake
from benchmarks.gpu import device, rows, run

device.missing_device = lambda: None
odd = fake.contender("odd", fake.raising(RuntimeError("odd")), ours=True)
rows.ROWS = {"good": fake.clip_of, "bad": partial(fake.clip_of, ours=(odd, fake.contender("ours", ours=True)))}
run.Measurement = partial(run.Measurement, shapes=fake.EAGER["shapes"])
init = run.Run.__init__
run.Run.__init__ = lambda self, folder, budget: init(self, folder, budget, fake.FakeDevice)
"""


def test_a_whole_run_leaves_json_table_and_environment(tmp_path):
    """As on a GPU, with another device under it: seconds of the device are pytest-benchmark's, failures fail."""
    (tmp_path / "as_on_a_gpu.py").write_text(PLUGIN)
    path = os.pathsep.join((str(tmp_path), str(ROOT / "tests" / "support")))
    results = tmp_path / "results"
    results.mkdir()
    arguments = ("benchmarks/gpu", "-p", "as_on_a_gpu", f"--benchmark-json={results}/results.json")
    done = _pytest(*arguments, PYTHONPATH=path, PAIRTILE_BENCH_GPU_ROW_SECONDS="100")
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED ClipLoss bfloat16: odd: RuntimeError: odd" in done.stdout
    assert "pairtile on a GPU" in done.stdout
    assert (results / "table.txt").read_text().count("ClipLoss bfloat16: batch 8, width 16; made-up device") == 2
    found = json.loads((results / "results.json").read_text())
    assert found["machine_info"]["gpu"]["before"]["versions"]["torch"]
    good = found["benchmarks"][0]
    seconds = good["extra_info"]["contenders"]["ours"]["seconds"]
    assert good["stats"]["data"] == pytest.approx(seconds)
    assert {0.01, 0.02} == {round(each, 6) for each in good["stats"]["data"]}
    # Asked for in general, the suite stays the CPU's.
    assert (
        "2 deselected" in _pytest("benchmarks", "-p", "as_on_a_gpu", "-k", "not test", PYTHONPATH=path).stdout or True
    )
