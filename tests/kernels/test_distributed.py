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


def with_negatives(sizes: list[int], negatives: dict[str, list[int]], **changes: object) -> dict:
    """A batch whose ranks bring extra negatives, `negatives[kind][rank]` of them."""
    generator = torch.Generator().manual_seed(1)
    extra = {
        f"negative_{kind}s": torch.randn(sum(counts), width, generator=generator, dtype=torch.float64)
        for kind, width, counts in (("image", 6, negatives.get("image", [])), ("text", 4, negatives.get("text", [])))
    }
    return batch(sizes, negatives=negatives, **extra, **changes)


def with_captions(sizes: list[int], *, from_hidden: bool, **changes: object) -> dict:
    """A batch with captions of 1 to 3 tokens, so that ranks have unequal numbers of them."""
    n = sum(sizes)
    labels = 1 + torch.arange(3 * n).view(n, 3) % 10
    labels[torch.arange(n) % 3 == 0, 1:] = 0
    labels[torch.arange(n) % 4 == 1, 2:] = 0
    return batch(sizes, loss="coca", labels=labels, from_hidden=from_hidden, **changes)


def with_ring(cases: list[dict]) -> list[dict]:
    """Each case by both strategies; of two or four ranks some rings go round inside nodes first."""
    rings = []
    for k, case in enumerate(cases):
        nodes = {"node_size": 2} if len(case["sizes"]) == 4 and k % 2 else {}
        rings.append(case | {"options": case["options"] | {"strategy": "ring"} | nodes})
    return cases + rings


def in_float32(case: dict) -> dict:
    tensors = {name: value for name, value in case.items() if isinstance(value, torch.Tensor)}
    return case | {"dtype": torch.float32} | {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def on_one_process(case: dict) -> dict:
    """The same batch through the same towers in this process, on the dense backend."""
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    of_ranks = ("local_loss", "strategy", "node_size")
    options = {key: value for key, value in case["options"].items() if key not in of_ranks}
    whole = case | {"sizes": [sum(case["sizes"])], "backend": "reference", "options": options, "by_group": False}
    if "text_sizes" in case:
        whole["text_sizes"] = [sum(case["text_sizes"])]
    whole["negatives"] = {kind: [sum(counts)] for kind, counts in case.get("negatives", {}).items()}
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
    cases = with_ring(cases)
    assert_ranks_equal_one_process(cases, spawn(cases, world, tmp_path))


def test_options_of_the_losses_on_two_ranks(tmp_path):
    cases = []
    for sizes in SHARDS[2]:
        for backend in ("torch", "reference"):
            options = {"label_smoothing": 0.2, "direction_weights": (0.3, 1.1)}
            few = {"text": [2, 3], "image": [0, 4]}
            cases += [
                batch(sizes, options=options, backend=backend),
                batch(sizes, options={"direction_weights": (1.0, 0.0)}, backend=backend),
                batch(sizes, options={"direction_weights": (0.0, 1.0)}, backend=backend),
                with_negatives(sizes, {"text": [1, 0]}, backend=backend),
                with_negatives(sizes, {"image": [2, 5]}, options=options, backend=backend),
                with_negatives(sizes, few, options=options | {"local_loss": True}, backend=backend),
                with_negatives(sizes, few, options={"reduction": "sum", "direction_weights": (0.0, 2.0)}),
                with_captions(sizes, from_hidden=True, backend=backend),
                with_captions(sizes, from_hidden=True, options={"reduction": "sum"}, backend=backend),
                with_captions(sizes, from_hidden=False, options={"local_loss": True}, backend=backend),
            ]
    cases = with_ring(cases)
    assert_ranks_equal_one_process(cases, spawn(cases, 2, tmp_path))


def assert_ranks_equal_one_process(
    cases: list[dict], ranks: list[list[dict]], tolerance: float = 1e-12, of_gradients: float = 1e-10
) -> None:
    """Value and mean gradient; with the default all is float64, and only the order of summation differs."""
    for k, case in enumerate(cases):
        truth, given = on_one_process(case), [rank[k] for rank in ranks]
        values = torch.stack([each["value"] for each in given]).double()
        if case["options"].get("local_loss"):
            torch.testing.assert_close(values.mean(), truth["value"], rtol=tolerance, atol=tolerance)
        else:
            torch.testing.assert_close(values[0], truth["value"], rtol=tolerance, atol=tolerance)
            assert (values == values[0]).all(), "the value differs between ranks"
        for name, gradient in truth["gradients"].items():
            mean = torch.stack([each["gradients"][name] for each in given]).double().mean(0)
            torch.testing.assert_close(
                mean,
                gradient,
                rtol=of_gradients,
                atol=of_gradients,
                msg=lambda m, n=name, c=case: f"{n} {c} {m}",
            )


def test_the_cpp_backend_on_two_ranks(cpp, tmp_path):
    smooth = {"label_smoothing": 0.2, "direction_weights": (0.3, 1.1)}
    cases = [batch([4, 4], loss=loss) for loss in ("clip", "siglip")]
    cases += [
        batch([0, 6], options={"reduction": "sum"}),
        with_negatives([7, 2], {"text": [2, 3], "image": [0, 4]}, options=smooth),
        with_captions([7, 2], from_hidden=True),
    ]
    narrow = [in_float32(case) | {"backend": "cpp"} for case in with_ring(cases)]
    # A few roundings of float32 in sums of size 10; gradients of parameters lie behind two layers more.
    assert_ranks_equal_one_process(cases, spawn(narrow, 2, tmp_path), tolerance=1e-6, of_gradients=5e-6)


def test_terms_bfloat16_and_disagreement_on_two_ranks(tmp_path):
    none = batch([3, 4], options={"reduction": "none"})
    narrow = batch([3, 4], dtype=torch.bfloat16)
    narrow |= {"images": narrow["images"].bfloat16(), "texts": narrow["texts"].bfloat16()}
    smooth = {"reduction": "none", "label_smoothing": 0.1, "direction_weights": (1.0, 0.5)}
    none_of_all = with_negatives([3, 4], {"text": [1, 2], "image": [2, 0]}, options=smooth)
    differ = [{"differ": what} for what in ("width", "dtype", "rank", "negatives")]
    ranks = spawn([none, narrow, *differ, none_of_all], 2, tmp_path)

    for k, case in ((0, none), (-1, none_of_all)):
        terms = torch.cat([rank[k]["value"] for rank in ranks])
        torch.testing.assert_close(terms, on_one_process(case)["value"], rtol=1e-12, atol=1e-12)

    truth, given = on_one_process(narrow), [rank[1] for rank in ranks]
    assert given[0]["value"].dtype == torch.float32
    torch.testing.assert_close(given[0]["value"], truth["value"], rtol=2e-6, atol=0)
    for name in ("scale", "bias"):
        mean = torch.stack([each["gradients"][name].float() for each in given]).mean(0)
        # Each rank's gradient is rounded to bfloat16, the parameter's own dtype.
        torch.testing.assert_close(mean, truth["gradients"][name].float(), rtol=2e-2, atol=1e-3)

    for rank in ranks:
        for case, width, dtype, negatives in (
            (5, 5, "float32", "width 5 float32"),
            (2, 6, "float32", "none"),
            (3, 5, "float64", "none"),
        ):
            kinds = f"rank 1: gathered features: width {width} {dtype}, {negatives}, width {width} {dtype}, none"
            assert (
                "rank 0: gathered features: width 5 float32, none, width 5 float32, none; " + kinds
                in rank[case]["message"]
            )
    assert "made with world_size=2, rank=1, but the process group has world_size=2, rank=0" in ranks[0][4]["message"]


def over_pairs(loss: str, sizes: list[int], *, options: dict | None = None, numbers: int = 1, **given: dict) -> dict:
    """A batch for a loss by its public name; `given` holds more tensors of its images and texts."""
    return batch(sizes, loss=loss, options=options or {}, numbers=numbers, **given)


def with_ids(loss: str, sizes: list[int], text_sizes: list[int], **changes: object) -> dict:
    """More or fewer texts than images, of which some share ids across ranks and some have none to share."""
    generator = torch.Generator().manual_seed(2)
    case = over_pairs(loss, sizes, **changes)
    n, m = sum(sizes), sum(text_sizes)
    case |= {"texts": torch.randn(m, 4, generator=generator, dtype=torch.float64), "text_sizes": text_sizes}
    return case | {"of_images": {"image_ids": torch.arange(n) % 4}, "of_texts": {"text_ids": torch.arange(m) % 6 - 1}}


MIL_NCE = {"positives": "inside", "denominator": "mil_nce"}


def test_losses_over_pairs_and_ids_on_two_ranks(tmp_path):
    cases = []
    for sizes, text_sizes in (([5, 2], [4, 7]), ([0, 6], [9, 0])):
        generator = torch.Generator().manual_seed(3)
        peer = torch.randn(2, sum(sizes), 3, generator=generator, dtype=torch.float64)
        private = torch.randn(sum(sizes), 2, 5, generator=generator, dtype=torch.float64)
        peers = {"of_images": {"peer_image_features": peer[0], "peer_text_features": peer[1]}}
        cases += [
            with_ids("SigLipPlusLoss", sizes, text_sizes, numbers=2),
            over_pairs("SigLipPlusLoss", sizes, numbers=2),
            over_pairs("DecoupledContrastiveLoss", sizes, options={"weighted": True, "intra": True}),
            over_pairs("DebiasedContrastiveLoss", sizes, options={"beta": 0.5}),
            over_pairs("HardNegativeLoss", sizes, options={"k": 2}, of_images={"negative_features": private}),
            over_pairs("HardNegativeLoss", sizes, options={"k": None, "direction_weights": (0.0, 1.0)}),
            over_pairs("TripletLoss", sizes, options={"local_loss": True}),
            over_pairs("TripletLoss", sizes, options={"mining": "hardest", "peer_form": "absolute"}, **peers),
            with_ids("CircleLoss", sizes, text_sizes, numbers=0, options={"gamma": 4.0}),
            with_ids("MultiPositiveLoss", sizes, text_sizes, options={"direction_weights": (0.3, 1.1)}),
            with_ids("MultiPositiveLoss", sizes, text_sizes, options={"reduction": "sum"} | MIL_NCE),
            with_ids("MultiPositiveLoss", sizes, text_sizes, options={"direction_weights": (0.0, 1.0)} | MIL_NCE),
            with_ids("MultiPositiveLoss", sizes, text_sizes, options={"denominator": "others_excluded"}),
        ]
    cases = with_ring(cases)
    assert_ranks_equal_one_process(cases, spawn(cases, 2, tmp_path))
