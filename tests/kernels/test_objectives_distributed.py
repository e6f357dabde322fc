"""The losses of test_objectives.py on two gloo processes against one: value and gradients, unequal and empty shards."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from objectives import OBJECTIVES
from two_ranks import on_two_ranks

WORKER = Path(__file__).with_name("objectives_worker.py")


def on_one_process(name: str, sizes: list[int], options: dict) -> dict:
    spec = importlib.util.spec_from_file_location("objectives_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    kept = {key: value for key, value in options.items() if key != "local_loss"}
    return worker.run(name, sizes, slice(None), "reference", kept)


def test_two_ranks_equal_one_process(tmp_path):
    cases = [(name, sizes, {}) for name in OBJECTIVES for sizes in ([4, 3], [0, 6])]
    cases += [(name, sizes, {"strategy": "ring"}) for name in OBJECTIVES for sizes in ([4, 3], [0, 6])]
    cases += [(name, [2, 5], {"local_loss": True}) for name in ("distill", "alignment_uniformity", "matryoshka")]
    # One of each way in which terms are put together.
    several = ("distill", "momentum", "sdm_by_id", "matryoshka")
    cases += [(name, [3, 4], {"reduction": reduction}) for name in several for reduction in ("sum", "none")]
    cases += [(name, [3, 4], {"reduction": "none", "strategy": "ring"}) for name in several]
    ranks = on_two_ranks(WORKER, cases, tmp_path)
    for k, (name, sizes, options) in enumerate(cases):
        truth, given = on_one_process(name, sizes, options), [rank[k] for rank in ranks]
        values = [each["value"] for each in given]
        if options.get("reduction") == "none":
            value = torch.cat(values)
        else:
            assert options.get("local_loss") or values[0] == values[1], (name, "the value differs between ranks")
            value = torch.stack(values).mean()
        # float64: only the order of summation differs.
        close = {"rtol": 1e-10, "atol": 1e-11, "msg": lambda said, case=cases[k]: f"{case}: {said}"}
        torch.testing.assert_close(value, truth["value"], **close)
        if options.get("reduction") == "none":
            continue  # backward of terms is the caller's sum, of this rank's alone
        x, y, scale = zip(*(each["gradients"] for each in given))
        # The trainer takes the mean over ranks; a rank has the features of its own rows alone.
        torch.testing.assert_close(torch.cat(x) / 2, truth["gradients"][0], **close)
        torch.testing.assert_close(torch.cat(y) / 2, truth["gradients"][1], **close)
        torch.testing.assert_close(torch.stack(scale).mean(0), truth["gradients"][2], **close)
