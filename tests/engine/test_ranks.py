"""ZeRO stages and numbers of ranks: the same global batch gives the same curve."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from curves import environment, losses
from pairtile.engine.errors import PairtileError
from pairtile.engine.recipe import parse_recipe
from pairtile.engine.runtime import free_port
from pairtile.engine.train import train

WORKER = Path(__file__).parents[1] / "support" / "train_worker.py"
STEPS = 10
# by default ZeRO-3 leaves small parameters whole, and all of this model's are small
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def train_on(ranks: int, recipes: list[dict], folder: Path, timeout: float = 240) -> None:
    """Train the recipes in one group of processes; fails with what the ranks printed."""
    paths = []
    for position, recipe in enumerate(recipes):
        paths.append(folder / f"ranks{ranks}-{position}.json")
        paths[-1].write_text(json.dumps(recipe))
    port = free_port()
    processes = []
    for rank in range(ranks):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(WORKER), *map(str, paths)],
                env=environment(**where, MASTER_PORT=str(port)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(printed)[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.mark.slow
def test_zero_stages_and_ranks_give_one_curve(tiny, runs):
    configurations = [(ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3)]
    late = {"objectives": [{"name": "filip"}], "model.tokens": {"dim": 24}, "model.embed_dim": None}
    for ranks in (1, 2):
        recipes = [
            tiny(
                output=str(runs / f"{ranks}-{stage}"),
                deepspeed=PARTITIONED if stage == 3 else {},
                **{"train.steps": STEPS, "train.zero_stage": stage, "train.warmup_steps": 3},
            )
            for stage in (0, 1, 2, 3)
        ]
        recipes.append(tiny(output=str(runs / f"{ranks}-late"), **late, **{"train.steps": 4, "train.zero_stage": 2}))
        if ranks == 2:  # chunks of 6, 6 and 4 pairs on each rank
            for stage in (0, 2, 3):
                cached = {
                    "train.zero_stage": stage,
                    "train.warmup_steps": 3,
                    "train.steps": STEPS,
                    "train.cache_chunk": 6,
                }
                where = {"output": str(runs / f"cached-{stage}"), "deepspeed": PARTITIONED if stage == 3 else {}}
                recipes.append(tiny(**where, **cached))
        train_on(ranks, recipes, runs)
    expected = losses(runs / "1-0")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert expected[STEPS] < expected[1]
    for ranks, stage in configurations:
        # float32: ranks add gradients in another order and ZeRO updates flat buffers (other roundings of the same
        # operations, 6e-8 each); Adam's division by the root of small second moments makes them 1e-5 in ten steps
        assert losses(runs / f"{ranks}-{stage}") == pytest.approx(expected, rel=1e-5), (ranks, stage)
    for stage in (0, 2, 3):
        assert losses(runs / f"cached-{stage}") == pytest.approx(expected, rel=1e-5), stage
    assert losses(runs / "2-late") == pytest.approx(losses(runs / "1-late"), rel=1e-5)
    # consolidated weights: the same tensors whatever the stage
    reference = load_file(runs / "1-0" / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    for ranks, stage in configurations:
        weights = load_file(runs / f"{ranks}-{stage}" / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
        assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in reference.items()}
        for name, tensor in weights.items():
            # Adam moves a weight by up to lr = 3e-3 a step whatever the size of its gradient, so a rounding that
            # turns the sign of a gradient near zero shows in full; most weights agree far better
            difference = (tensor - reference[name]).abs()
            assert difference.mean() < 2e-5, (ranks, stage, name)


@pytest.mark.slow
def test_two_ranks_resume_accumulate_and_evaluate_like_one(tiny, runs):
    changes = {
        "train.steps": 4,
        "train.accumulation": 2,
        "train.precision": "bf16",
        "train.zero_stage": 2,
        "train.save_every": 2,
    }
    first = tiny(output=str(runs / "parts"), **changes)
    first["train"]["keep_last"] = 5
    train_on(2, [{**first, "train": {**first["train"], "schedule": "constant", "steps": 2}}], runs)
    whole = tiny(output=str(runs / "whole"), **changes)
    whole["train"]["schedule"] = "constant"
    train_on(2, [whole, {**first, "train": {**first["train"], "schedule": "constant"}}], runs)
    assert losses(runs / "parts") == losses(runs / "whole")
    evaluations = []
    for name in ("parts", "whole"):
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        evaluations.append([line for line in lines if line["kind"] == "eval" and line["step"] == 4])
    assert evaluations[0] == evaluations[1]
    assert math.isfinite(evaluations[0][0]["unseen/text_to_image/R@1"])


@pytest.mark.slow
def test_resume_at_another_number_of_ranks_and_zero_stage(tiny, runs):
    changes = {"train.steps": 6, "train.schedule": "constant", "train.save_every": 3, "train.keep_last": 9}
    whole = tiny(output=str(runs / "one-whole"), **changes, **{"train.zero_stage": 1})
    # ZeRO stage of the first half, which two ranks train; stage and ranks of the second half
    ways = {"2-2-1": (2, 2, 1), "2-1-1": (2, 1, 1), "0-0-1": (0, 0, 1), "2-1-2": (2, 1, 2)}
    parts = {name: tiny(output=str(runs / f"change-{name}"), **changes) for name in ways}
    for name, (before, _, _) in ways.items():
        parts[name]["train"] |= {"steps": 3, "zero_stage": before}
    train_on(2, list(parts.values()), runs)
    for name, (_, after, _) in ways.items():
        parts[name]["train"] |= {"steps": 6, "zero_stage": after}
    train_on(1, [whole, *(parts[name] for name, way in ways.items() if way[2] == 1)], runs)
    train_on(2, [parts[name] for name, way in ways.items() if way[2] == 2], runs)
    expected = losses(runs / "one-whole")
    for name in parts:
        # as between stages and ranks in one go, above
        assert losses(runs / f"change-{name}") == pytest.approx(expected, rel=1e-5), name
    assert (runs / "change-2-2-1" / "checkpoints" / "step-00000003" / "universal").is_dir()


def test_resume_where_the_conversion_is_not_exact_says_so(tiny):
    train(parse_recipe(tiny(**{"train.zero_stage": 2})))
    for stage in (0, 3):
        with pytest.raises(
            PairtileError, match=rf"under ZeRO 2 on 1 ranks, and now it is ZeRO {stage} on 1; .* 1 and 2 alone"
        ):
            train(parse_recipe(tiny(**{"train.zero_stage": stage})))
