"""The benchmark harness at sizes that take no time: what it computes and prints, never how fast anything is."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def _load_benchmarks():
    """The folder as the package `benchmarks`, without the root on sys.path."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


_load_benchmarks()

from benchmarks import (  # noqa: E402
    bars,
    contrastive,
    floor,
    harness,
    late_interaction,
    objectives,
    peak,
    peers,
    report,
    test_contrastive,
    test_late_interaction,
    test_loader,
    test_objectives,
    test_token_merging,
    test_token_merging_vit,
    test_trainer,
    token_merging_vit,
    work,
)


@pytest.fixture
def quick():
    """No memory runs, no compilation, two rounds, and a floor of 1 ms micro-benchmarks."""

    def run(case, **changes):
        eager = [each for each in case.contenders if not each.compiled]
        changes = {"contenders": eager, "rounds": 2, "small_sizes": None} | changes
        meter = floor.FloorMeter(case.work.dtype, seconds=0.001, copy_bytes=2**20)
        return harness.measure(dataclasses.replace(case, **changes), meter)

    return run


@pytest.fixture
def result():
    """A row with made-up figures: ours takes 1 s where the floor is 0.8 s and the other takes 2 s."""
    names = {"pairtile": True, "other": False}
    contenders = [harness.Contender(name, lambda leaves: list, ours=ours) for name, ours in names.items()]
    case = test_contrastive.clip_case(64, 8, contenders=contenders)
    measured = {
        "pairtile": harness.Measured([1.0, 0.9, 1.2], 1, {"value": 1e-8, "dx": 2e-7, "dy": 3e-7, "dscale": 1.0}, 10**8),
        "other": harness.Measured([2.0, 2.0, 2.0], 1, {}, 10**9),
    }
    rates = floor.Floor(case.work.flops / 0.8, 1e12, "brgemm", (1.0,), (1.0,))
    missing = {"absent": "not installed: pip install absent"}
    return harness.Result(case, "pairtile", 2, rates, measured, missing, 4096, None)


def test_work_counts_products_and_what_is_made_again():
    assert work.kept_share(100, 100, 64 * 2**20) == 1
    # 50 MiB are left beside the panels: 6 of the 32 chunks of 256 rows, 8 MiB each.
    assert work.kept_share(8192, 8192, 64 * 2**20) == 6 / 32
    size = 8192 * 8192 * 512
    symmetric = work.symmetric_work(8192, 8192, 512, torch.float32, 64 * 2**20)
    assert symmetric.flops == pytest.approx((8 - 2 * 6 / 32) * size)
    assert work.one_sweep_work(8192, 8192, 512, torch.bfloat16).flops == 6 * size
    # x, y, dx and dy
    assert symmetric.least_bytes == 4 * 8192 * 512 * 4


def test_floor_is_the_slower_of_products_and_copies():
    rates = floor.Floor(100.0, 10.0, "brgemm", (), ())
    assert rates.seconds(work.Work(200.0, 10.0, torch.float32, "")) == 2.0
    assert rates.seconds(work.Work(200.0, 50.0, torch.float32, "")) == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floor_samples_both_rates(dtype):
    meter = floor.FloorMeter(dtype, seconds=0.001, copy_bytes=2**20, read_only=dtype == torch.bfloat16)
    meter.sample()
    meter.sample()
    found = meter.floor()
    built = peers.missing_backend("cpp") is None
    assert found.source.startswith("brgemm" if built else "torch.mm")
    assert len(found.rate_samples) == len(found.bandwidth_samples) == 2
    assert found.flops_per_second > 1e8
    assert found.bytes_per_second > 1e7


def test_rounds_begin_with_each_contender_in_turn():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = []
    # a call of no length would be repeated thousands of times
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_LEAST_BURST", 0.0)
        measured = harness.timed(calls, 4, between=lambda: samples.append(len(order)))
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc", "once unmeasured, once measured"
    assert samples == [3, 15, 27], "before, halfway through and after the rounds"
    assert all(len(each.seconds) == 4 for each in measured.values())


def test_short_calls_are_repeated():
    measured = harness.timed({"a": lambda: None}, 2)
    assert measured["a"].calls_per_round > 100


def test_disagreement_and_values_that_are_not_finite_stop_a_row():
    case = test_contrastive.clip_case(8, 4)
    right = [torch.ones(3)] * 4
    for wrong, said in ((right[0] * 1.01, "differs from ours's by"), (right[0] / 0, "not finite")):
        calls = {"ours": lambda: right, "other": lambda wrong=wrong: [right[0], wrong, right[0], right[0]]}
        with pytest.raises(AssertionError, match=f"dx of other .*{said}"):
            harness.assert_agreement(case, calls, "ours")


def test_bars(result):
    judged = [
        (bars.faster_than("other", 2.0), True, 2.0),
        (bars.faster_than("other", 3.0), False, 2.0),
        (bars.faster_than_best(["other"], 0.9), True, 2.0),
        (bars.leaner_than("other", 1 / 8), True, 0.1),
        (bars.leaner_than("other", 1 / 12), False, 0.1),
        (bars.leaner_beyond_gradients("other", 1 / 8), True, (1e8 - 4096) / (1e9 - 4096)),
        (bars.share_of_floor(0.75), True, 0.8),
        (bars.share_of_floor(0.9), False, 0.8),
        (bars.peak_below(2**30), True, 10**8 / 2**20),
        (bars.peak_below(2**20), False, 10**8 / 2**20),
    ]
    for bar, met, measured in judged:
        judgement = bar.judge(result)
        assert judgement.met is met
        assert judgement.measured == pytest.approx(measured)
        assert ("MISSED" in judgement.text) is not met
    absent = bars.faster_than("absent", 3.0).judge(result)
    assert absent.met is None
    assert "pip install absent" in absent.text


def test_table_and_record(result):
    asked = (bars.faster_than("other", 3.0), bars.share_of_floor(0.75), bars.faster_than("absent", 3.0))
    result.judgements = [bar.judge(result) for bar in asked]
    lines = list(report.table([result]))
    text = "\n".join(lines)
    (ours,) = (line for line in lines if line.startswith("  pairtile"))
    for figure in ("1000", "900", "1200", "80%", "100 MB", "1e-08", "3e-07", "of the floor: met", "not judged"):
        assert figure in ours
    assert "1e+00" not in ours, "the scale's error is no part of the gradient column"
    assert ">= 3x other: MISSED, 2.00" in next(line for line in lines if line.startswith("  other"))
    assert "absent: not installed: pip install absent" in text
    assert "bars: 1 of 3 met" in text
    # its rounds are 0.9 to 1.2 s: a second run's ratio may be off by 20%
    assert "2.00 noisy" in next(line for line in lines if line.startswith("  other"))
    titles, line = report.summary([result])
    assert titles.split()[:3] == ["row", "pairtile", "best"]
    for figure in ("1.00 s", "other", "2.00 s", "2.00x", "10x", "800 ms", "80%", "3e-07"):
        assert figure in line
    assert json.loads(json.dumps(report.record(result)))["contenders"]["pairtile"]["seconds"] == [1.0, 0.9, 1.2]


@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        ("clip_case", (48, 24)),
        ("clip_case", (40, 100, 100.0)),
        ("clip_bf16_case", (48, 24)),
        ("siglip_case", (48, 24)),
        ("linear_cross_entropy_case", (24, 100, 16)),
    ],
)
def test_rows_of_the_contrastive_suite(row, sizes, quick):
    case = getattr(test_contrastive, row)(*sizes)
    if all(each.missing for each in case.contenders if each.ours):
        pytest.skip(case.contenders[0].missing)
    result = quick(case)
    # The agreement between contenders was asserted on the way; here all are held to the dense float64 formula.
    # float32: logits up to 30 have rounding errors of 2e-6. bfloat16: gradients are rounded to 8 bits, 2e-3 of each.
    rounding = 1e-2 if case.work.dtype == torch.bfloat16 else 1e-5
    for name, each in result.measured.items():
        for gradient in case.matrix_gradients:
            assert each.errors[gradient] < rounding, (name, gradient)
        assert len(each.seconds) == 2
    assert result.judgements == [bar.judge(result) for bar in case.bars]
    assert list(report.table([result]))


def test_a_peer_that_is_not_installed_is_named_and_left_out(quick, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "open_clip", peers.Peer("no_such_module", "no-such-distribution"))
    result = quick(test_contrastive.clip_case(16, 8), bars=[bars.faster_than("open_clip", 3.0)])
    assert result.missing["open_clip"] == "not installed: pip install no-such-distribution"
    assert "open_clip" not in result.measured
    assert result.judgements[0].met is None


def test_peak_memory_counts_the_logits_and_not_the_inputs():
    one_product = functools.partial(contrastive.eager, contrastive.one_product_clip)
    prepare = functools.partial(harness.forward_and_backward, one_product)
    sizes = {"batch": 2048, "width": 64}
    logits = 4 * 2048**2
    found = peak.peak_memory(contrastive.clip_inputs, sizes, {"batch": 64, "width": 64}, prepare)
    # The logits, one log-softmax per direction and its gradient are alive at once, five matrices at most.
    assert 3 * logits < found < 6.5 * logits


def test_run_with_bars_fails_and_leaves_table_and_json(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    # At this size a call is all fixed cost: 75% of the floor is out of reach on any machine.
    environment |= {
        "PAIRTILE_BENCH_LARGE_BATCH": "32",
        "PAIRTILE_BENCH_WIDTH": "8",
        "PAIRTILE_BENCH_FLOOR_SECONDS": "0.001",
        "PAIRTILE_BENCH_BARS": "1",
    }
    json_file = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "large_batch", f"--benchmark-json={json_file}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ClipLoss float32 (batch 32, width 8): >= 75% of the floor: MISSED" in done.stdout
    assert "bars: 1 of 2 met" in done.stdout
    (row,) = json.loads(json_file.read_text())["benchmarks"]
    assert row["extra_info"]["sizes"] == {"batch": 32, "width": 8}
    assert [bar["met"] for bar in row["extra_info"]["bars"]] == [False, True]


@pytest.mark.parametrize("name", list(objectives.rows()))
def test_a_row_of_every_objective(quick, name):
    """Ours, ours in less memory, the dense formula, open_clip's and the four calls agree before they are timed."""
    found = quick(test_objectives.case_of(name, 24, 64), rounds=1)
    assert set(found.measured) >= {found.subject, objectives.LEAN, "dense"}
    # Float32's rounding, which the least exact of the dense formulas takes tenfold through its exponentials.
    assert all(error < 1e-4 for each in found.measured.values() for error in each.errors.values())


@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        ("scoring_case", (6, 40)),
        ("scoring_case", (6, 40, torch.bfloat16)),
        ("ragged_case", (7, 2, 20)),
        ("topk_case", (2, 120, 10)),
        ("filip_case", (5,)),
        ("colbert_case", (4,)),
        ("projection_case", (4, 60)),
        ("alignment_case", ("sinkhorn_similarity", 3)),
        ("alignment_case", ("soft_dtw", 3)),
    ],
)
def test_rows_of_the_late_interaction_suite(row, sizes, quick):
    """Whoever is installed agrees with ours, and all are held to float64; memory as the bars have it is not measured."""
    *sizes, dtype = sizes if row == "scoring_case" and len(sizes) == 3 else (*sizes, torch.float32)
    changes = {"dtype": dtype} if row == "scoring_case" else {}
    case = getattr(test_late_interaction, row)(*sizes, **changes)
    if all(each.missing for each in case.contenders if each.ours):
        pytest.skip(case.contenders[0].missing)
    result = quick(case, rounds=1)
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for name, each in result.measured.items():
        assert all(error < rounding for error in each.errors.values()), name
        assert set(each.errors) == (set(case.results) if case.exact else set())


def test_ragged_documents_are_padded_before_the_clock_runs():
    """For whom has no path for packed ones: the padding is told from tokens by the mask."""
    leaves = late_interaction.ragged_inputs(2, 5, 1, 6, 8)
    seen = []
    late_interaction.on_padded(lambda given: seen.extend(given), leaves)
    q, padded, mask = seen
    assert torch.equal(mask.sum(1), leaves[2])
    assert torch.equal(padded[mask], leaves[1])
    torch.testing.assert_close(late_interaction.dense_ragged(q, padded, mask), late_interaction.our_ragged(*leaves))


@pytest.mark.parametrize("name", ["tome", "pitome"])
def test_rows_of_the_token_merging_suite(name, quick):
    found = quick(test_token_merging.case_of(name, "forward + backward", 33, 8, 3.0, batch=2))
    assert set(found.measured) >= {found.subject, "eager"}
    # Float32's rounding of averages of at most 16 tokens.
    assert all(error < 1e-6 for each in found.measured.values() for error in each.errors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_whole_vision_transformer(dtype, quick, monkeypatch):
    """Ours and ToMe written out give the same logits; the model without merging is timed beside them, not compared."""
    monkeypatch.setattr(token_merging_vit, "MODEL", "vit_tiny_patch16_224")
    case = test_token_merging_vit.case_of(dtype, 8, batch=1)
    if all(each.missing for each in case.contenders if each.ours):
        pytest.skip(case.contenders[0].missing)
    found = quick(case, rounds=1)
    assert list(found.measured) == [each.name for each in case.contenders]
    (judgement,) = found.judgements
    assert judgement.measured == pytest.approx(
        found.median(token_merging_vit.UNMERGED)
        / found.median()
        / (token_merging_vit.flops(1, 224, 0) / case.work.flops)
    )


def test_flops_of_a_vision_transformer_are_torchs_own_count():
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.zeros(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        model = token_merging_vit.timm.create_model(token_merging_vit.MODEL)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert token_merging_vit.flops(1, 224, 0) == counter.get_total_flops()


def test_row_of_the_loader(quick):
    """Everybody decodes the same images and reads the same captions."""
    found = quick(test_loader.loader_case(128, 40, 32), rounds=1)
    assert list(found.measured) == ["pairtile", "webdataset, PIL", "webdataset, torchvision.io"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_the_trainer(precision, quick):
    """Both trainers start from the same weights and find the same loss."""
    case = test_trainer.trainer_case(precision, 4)
    if all(each.missing for each in case.contenders if each.ours):
        pytest.skip(case.contenders[0].missing)
    found = quick(case, rounds=1)
    assert set(found.measured) | set(found.missing) == {"pairtile", "open_clip"}
