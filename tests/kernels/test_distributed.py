"""1, 2 and 4 gloo processes against one: values, parameter gradients, unequal and empty shards."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def spawn(cases: list[dict], world: int, folder: Path) -> list[list[dict]]:
    """Results of each rank for each case; all cases share one start of the processes."""
    torch.save(cases, folder / "cases.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Errors go to a file: a full pipe would stop the worker.
    with open(folder / "stderr", "w+") as stderr:
        workers = [
            subprocess.Popen([sys.executable, WORKER, str(rank), str(world), folder], env=environment, stderr=stderr)
            for rank in range(world)
        ]
        try:
            codes = [worker.wait(timeout=60) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        stderr.seek(0)
        assert codes == [0] * world, stderr.read()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def batch(sizes: list[int], **changes: object) -> dict:
    generator = torch.Generator().manual_seed(sum(sizes))
    images, texts = (torch.randn(sum(sizes), d, generator=generator, dtype=torch.float64) for d in (6, 4))
    case = {"sizes": sizes, "images": images, "texts": texts, "loss": "clip", "backend": "torch", "options": {}}
    return case | {"dtype": torch.float64, "scale": 7.0} | changes


def on_one_process(case: dict) -> dict:
    """The same batch through the same towers in this process, on the dense backend."""
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    options = {key: value for key, value in case["options"].items() if key in ("reduction",)}
    whole = case | {"sizes": [sum(case["sizes"])], "backend": "reference", "options": options, "by_group": False}
    return worker.run(whole, 0, 1)


SHARDS = {1: [[5]], 2: [[4, 4], [7, 2], [0, 6], [3, 0]], 4: [[3, 3, 3, 3], [1, 5, 0, 2], [0, 0, 4, 0]]}


@pytest.mark.parametrize("world", SHARDS)
def test_ranks_together_equal_one_process(world, tmp_path):
    cases = []
    for sizes in SHARDS[world]:
        for loss in ("clip", "siglip"):
            cases += [batch(sizes, loss=loss, backend=backend) for backend in ("torch", "reference")]
            cases += [
                batch(sizes, loss=loss, by_group=True),
                batch(sizes, loss=loss, detach_empty=True),
                batch(sizes, loss=loss, options={"reduction": "sum"}),
                batch(sizes, loss=loss, options={"local_loss": True}),
            ]
    ranks = spawn(cases, world, tmp_path)
    for k, case in enumerate(cases):
        truth, given = on_one_process(case), [rank[k] for rank in ranks]
        values = torch.stack([each["value"] for each in given])
        # float64 throughout: only the order of summation differs.
        if case["options"].get("local_loss"):
            torch.testing.assert_close(values.mean(), truth["value"], rtol=1e-12, atol=1e-12)
        else:
            torch.testing.assert_close(values[0], truth["value"], rtol=1e-12, atol=1e-12)
            assert (values == values[0]).all(), "the value differs between ranks"
        for name, gradient in truth["gradients"].items():
            mean = torch.stack([each["gradients"][name] for each in given]).mean(0)
            torch.testing.assert_close(
                mean, gradient, rtol=1e-10, atol=1e-10, msg=lambda m, n=name, c=case: f"{n} {c} {m}"
            )


def test_terms_bfloat16_and_disagreement_on_two_ranks(tmp_path):
    none = batch([3, 4], options={"reduction": "none"})
    narrow = batch([3, 4], dtype=torch.bfloat16)
    narrow |= {"images": narrow["images"].bfloat16(), "texts": narrow["texts"].bfloat16()}
    differ = [{"differ": what} for what in ("width", "dtype", "rank")]
    ranks = spawn([none, narrow, *differ], 2, tmp_path)

    terms = torch.cat([rank[0]["value"] for rank in ranks])
    torch.testing.assert_close(terms, on_one_process(none)["value"], rtol=1e-12, atol=1e-12)

    truth, given = on_one_process(narrow), [rank[1] for rank in ranks]
    assert given[0]["value"].dtype == torch.float32
    torch.testing.assert_close(given[0]["value"], truth["value"], rtol=2e-6, atol=0)
    for name in ("scale", "bias"):
        mean = torch.stack([each["gradients"][name].float() for each in given]).mean(0)
        # Each rank's gradient is rounded to bfloat16, the parameter's own dtype.
        torch.testing.assert_close(mean, truth["gradients"][name].float(), rtol=2e-2, atol=1e-3)

    for rank in ranks:
        assert "rank 0: width 5, torch.float32, rank 1: width 6, torch.float32" in rank[2]["message"]
        assert "rank 1: width 5, torch.float64" in rank[3]["message"]
    assert "made with world_size=2, rank=1, but the process group has world_size=2, rank=0" in ranks[0][4]["message"]
