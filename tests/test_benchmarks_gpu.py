"""Rows of the GPU suite without a GPU: kernels in Triton's interpreter, a made-up clock, sizes that take no time."""

import importlib.util
import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from fake_gpu import EAGER, TINY, FakeDevice, clip_of, contender, raising

from benchmarks import late_interaction, peers, report, work
from benchmarks.gpu import contenders, measure, rows
from benchmarks.harness import Contender


@pytest.fixture
def here():
    return FakeDevice()


@pytest.fixture
def measured(here):
    """Measures a case within so many of the device's seconds."""

    def run_it(case, seconds=0.2, **changes):
        return measure.Measurement(case, here, seconds, clock=here.clock, **EAGER | changes).result()

    return run_it


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_row(name, measured):
    case = TINY[name]()
    result = measured(case)
    assert not result.failures
    assert result.subject == "pairtile triton"
    expected = {"pairtile triton", "pairtile torch", "eager PyTorch"}
    expected |= {"open_clip"} if "clip" in name else set()
    assert expected <= set(result.measured), result.missing
    # Bfloat16 rounds gradients to 8 bits, 4e-3 of each at most; open_clip and eager PyTorch the logits, too.
    bound = 1e-5 if "ieee" in name or "tf32" in name else 5e-2
    for who, each in result.measured.items():
        assert set(each.errors) == (set(case.results) if case.exact else set()), who
        assert all(error < bound for error in each.errors.values()), who
    text = "\n".join(report.table([result]))
    assert "made-up device, " in text
    assert "TFLOP" in text
    assert f"at 100 TFLOP/s ({case.source}, {report._short(case.work.dtype)})" in text
    assert "bars: 0" not in text
    kept = json.loads(json.dumps(report.record(result)))["contenders"]["pairtile triton"]
    assert len(kept["seconds"]) == result.case.rounds > 0
    assert kept["host_seconds"] == 0.001


def test_whatever_a_peer_runs_into_the_row_goes_on(measured):
    others = (
        contender("hungry", raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB"))),
        contender("broken", raising(RuntimeError("no kernel image\nis available"))),
        contender("unimportable", prepare_error=ImportError("cannot import name 'tl'")),
        contender("wrong", lambda results: [results[0], 2 * results[1], *results[2:]]),
        contender("short", lambda results: results[:2]),
        contender("nan", lambda results: [results[0] * math.nan, *results[1:]]),
        contender("without scale", lambda results: [*results[:3], None]),
        Contender("absent", None, missing="not installed: pip install absent"),
        contender("unwanted"),
    )
    result = measured(clip_of(*others), without=("unwanted",))
    assert set(result.measured) == {"ours", "without scale"}
    assert result.missing == {
        "hungry": "out of memory",
        "broken": "RuntimeError: no kernel image is available",
        "unimportable": "ImportError: cannot import name 'tl'",
        "wrong": "wrong, not timed: its dx differs from ours's by 1.0e+00",
        "short": "AssertionError: short returned 2 results, expected ('value', 'dx', 'dy', 'dscale')",
        "nan": "wrong: its value is not finite",
        "absent": "not installed: pip install absent",
        "unwanted": "left out by PAIRTILE_BENCH_GPU_WITHOUT",
    }
    assert result.remarks == ["without scale: does not compute dscale"]
    assert not result.failures
    text = "\n".join(report.table([result]))
    assert all(f"  {name}: {reason}" in text for name, reason in result.missing.items())


def test_an_error_during_the_rounds_ends_the_contender_alone(measured):
    seen = []

    def later(results):
        seen.append(None)
        if len(seen) == 4:
            raise torch.OutOfMemoryError("late")
        return results

    result = measured(clip_of(contender("late", later), contender("steady")))
    assert result.missing == {"late": "out of memory"}
    assert set(result.measured) == {"ours", "steady"}
    assert len(seen) == 4, "it is not called again"


def test_ours_that_fails_is_a_failure_and_the_next_one_is_the_measure(measured):
    ours = (contender("first", raising(RuntimeError("bad")), ours=True), contender("second", ours=True))
    result = measured(clip_of(contender("other"), ours=ours))
    assert result.subject == "second"
    assert result.failures == {"first": "RuntimeError: bad"}
    assert set(result.measured) == {"second", "other"}
    with pytest.raises(measure.RowFailed, match=r"none of ours could run: .*bad"):
        measured(clip_of(contender("other"), ours=ours[:1]))
    disagreeing = contender("third", lambda results: [each + 1 for each in results], ours=True)
    assert set(measured(clip_of(ours=(ours[1], disagreeing))).failures) == {"third"}


def test_a_lost_device_names_who_lost_it(measured, here):
    def lose(results):
        here.lost = True
        raise RuntimeError("illegal")

    with pytest.raises(measure.DeviceLost, match=r"after wild .*PAIRTILE_BENCH_GPU_WITHOUT='wild'"):
        measured(clip_of(contender("wild", lose), contender("other")))


def test_a_device_lost_while_timing_names_all(measured, here):
    peak_bytes = here.peak_bytes

    def lose(call):
        here.seconds = types.MethodType(lambda self, call, calls=1: exec("self.lost = True; self.synchronize()"), here)
        return peak_bytes(call)

    here.peak_bytes = lose
    with pytest.raises(measure.DeviceLost, match=r"after timing .*One of ours, other did it"):
        measured(clip_of(contender("other")))


def test_long_calls_get_fewer_rounds_and_late_contenders_none(measured, here):
    short = measured(clip_of(contender("other")), seconds=100.0)
    assert short.case.rounds == measure._MOST_ROUNDS
    # Two calls of 13 ms on average: a rehearsal of each, then rounds for what is left.
    few = measured(clip_of(contender("other")), seconds=0.12)
    assert 1 <= few.case.rounds <= 5
    assert measured(clip_of(contender("other")), seconds=0.001).case.rounds == 1

    def slow(results):
        here.now += 10
        return results

    late = measured(clip_of(contender("slow", slow), contender("late")), seconds=10.0)
    assert late.missing == {"late": "not run: 10 of the row's 10 s were spent (PAIRTILE_BENCH_GPU_ROW_SECONDS)"}


def test_large_calls_are_rehearsed(measured, here):
    calls = []
    here.large = lambda peak: True
    result = measured(clip_of(contender("other", lambda results: calls.append(None) or results)))
    # One for the agreement, two for the estimate, and two in each round.
    assert len(calls) == 1 + 2 + 2 * result.case.rounds


def test_the_host_is_named_where_it_is_slow(measured, here):
    here.host_seconds = lambda call: 0.008
    assert measured(clip_of()).remarks == ["ours: the host needs 8 ms of a call's 10 ms, to launch or to wait"]


def test_precision_of_products_is_the_rows_and_is_put_back(measured, here):
    seen = []

    def note(results):
        seen.append(torch.get_float32_matmul_precision())
        return results

    rates = []
    here.product_seconds = lambda *shape: rates.append(torch.get_float32_matmul_precision()) or 1.0
    for precision, matmul, rate in (
        ("ieee", "highest", "highest"),
        ("tf32", "high", "high"),
        ("tf32x3", "highest", "high"),
    ):
        seen.clear(), rates.clear()
        case = rows.clip_float32(8, 16, precision)
        measured(measure.replace(case, contenders=(contender("ours", note, ours=True),), exact=None))
        assert (set(seen), set(rates)) == ({matmul}, {rate})
        assert torch.get_float32_matmul_precision() == "highest"


def test_differences_are_relative_and_computed_in_parts(monkeypatch):
    monkeypatch.setattr(measure, "_COMPARED", 7)
    given, expected = torch.randn(5, 6), torch.randn(5, 6)
    dense = ((given - expected).double().norm() / expected.double().norm()).item()
    assert measure.norm_of_difference(given, expected) == pytest.approx(dense)
    assert measure.norm_of_difference(expected, expected.bfloat16().float()) < 2**-8
    assert measure.norm_of_difference(given[:4], expected) == math.inf


def test_work_of_the_rows():
    size = 65536 * 65536 * 512
    assert rows.ROWS["clip-65536"]().work == work.Work(8 * size, 4 * 65536 * 512 * 2, torch.bfloat16, "8 N M D")
    assert rows.ROWS["clip-forward-65536"]().work.flops == 2 * size
    assert rows.ROWS["siglip-65536"]().work.flops == 6 * size * 768 / 512
    gemma = rows.ROWS["lce-gemma2"]().work
    assert (gemma.flops, gemma.least_bytes) == (8 * 8192 * 256_000 * 2304, 2 * (8192 + 256_000) * 2304 * 2)
    assert rows.ROWS["clip-float32-tf32x3"]().work.flops == 24 * 8192 * 8192 * 512
    filip, pairs = rows.ROWS["filip-512"]().work, 512 * 512 * 256
    assert filip.flops == 2 * pairs * (196 * 32 + 2 * (196 + 32))
    assert rows.ROWS["maxsim-rerank"]().work.flops == 2 * 32 * 20_000 * 300 * 128
    assert rows.ROWS["siglip-8192"]().exact is not None
    assert rows.ROWS["siglip-32768"]().exact is None, "float64 would take 50 GB"


@pytest.fixture
def fake_peers(monkeypatch):
    """Modules with the interfaces of the peers' wheels: parameter names and what is returned, dense inside."""

    def install(name, **content):
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    class MemoryEfficientCLIPLoss:
        def __init__(self, temperature=0.07, normalized_inputs=False, stable=True, tau_plus=0.0, label_smoothing=0.0):
            assert normalized_inputs
            assert not stable
            self.scale = 1 / temperature

        def __call__(self, image_features, text_features, tau_plus=None):
            return contenders.mixed_clip(image_features, text_features, self.scale)

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        return F.cross_entropy(scale * q.float() @ k.float().T, torch.arange(len(q)), reduction="none")

    def fused_siglip_loss(img_features, txt_features, log_temperature, bias, use_fp8=False, backend="auto"):
        return contenders.mixed_siglip(img_features, txt_features, log_temperature.exp(), bias)

    def linear_cross_entropy(e, c, targets, ignore_index=-100, filter_eps="high"):
        assert filter_eps in (None, "high")
        return contenders.linear_then_cross_entropy(e, c, targets)

    class LigerFusedLinearCrossEntropyLoss:
        def __call__(self, lin_weight, _input, target, bias=None):
            return contenders.linear_then_cross_entropy(_input, lin_weight, target)

    def flash_maxsim_batched(Q, D, doc_lengths=None, shared_docs=True, query_lengths=None):
        return late_interaction.dense_maxsim(Q.half(), D.half()).float()

    def maxsim(Q, D, q_mask=None, d_mask=None, *, normalize=False, backward=None):
        return late_interaction.dense_maxsim(Q.float(), D.float())

    install("flash_maxsim", flash_maxsim_batched=flash_maxsim_batched, flash_maxsim_batched_train=flash_maxsim_batched)
    install("late_interaction_kernels", maxsim=maxsim)
    install("memeff", MemoryEfficientCLIPLoss=MemoryEfficientCLIPLoss)
    install("inf_cl", cal_flash_loss=cal_flash_loss)
    install("siglip_kernel", fused_siglip_loss=fused_siglip_loss)
    install("cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    install("liger_kernel")
    install("liger_kernel.transformers")
    install(
        "liger_kernel.transformers.fused_linear_cross_entropy",
        LigerFusedLinearCrossEntropyLoss=LigerFusedLinearCrossEntropyLoss,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", {"memeff", "inf-cl"}),
        ("clip forward", {"memeff", "inf-cl"}),
        ("clip tf32", {"memeff", "inf-cl"}),
        ("siglip", {"siglip-kernel"}),
        ("linear_cross_entropy", {"cut-cross-entropy", "cut-cross-entropy (no filter)", "liger-kernel"}),
        ("maxsim", {"flash-maxsim", "late-interaction-kernels"}),
        ("filip", {"flash-maxsim", "late-interaction-kernels"}),
    ],
)
def test_peers_take_part_where_they_are_installed(name, expected, fake_peers, measured):
    result = measured(TINY[name]())
    assert expected <= set(result.measured), result.missing
    if "memeff" in expected and name != "clip forward":
        assert result.remarks == ["memeff: does not compute dscale"]


def test_peers_that_are_not_installed_are_named(monkeypatch, measured):
    monkeypatch.setitem(peers.PEERS, "memeff", peers.Peer("no_such_module", "no-such-distribution"))
    assert measured(TINY["clip"]()).missing["memeff"] == "not installed: pip install no-such-distribution"
