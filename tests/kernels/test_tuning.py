"""Tuned configurations: opt-in, from a file, the same on every rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from pairtile.kernels.contrastive.triton_kernels import tuning
from pairtile.kernels.contrastive.triton_kernels.configurations import Config, pick_config

LAUNCH = ("sm90", "reduce", torch.bfloat16, 512, "ieee")
SHIPPED = pick_config(*LAUNCH)
OTHER = Config(64, 64, 32, 4, 2)


@pytest.fixture(autouse=True)
def shipped_again():
    yield
    tuning.forget_tuned()


def written(folder, config=OTHER):
    file = folder / "tuned.json"
    arch, kernel, *rest = LAUNCH
    tuning.write(file, arch, *rest, {kernel: config})
    return file


def test_nothing_is_tuned_until_a_file_is_used(tmp_path):
    file = written(tmp_path)
    assert tuning.chosen_config(*LAUNCH) == SHIPPED
    tuning.use_tuned(file)
    assert tuning.chosen_config(*LAUNCH) == OTHER
    assert tuning.chosen_config("sm90", "weigh", *LAUNCH[2:]) == pick_config("sm90", "weigh", *LAUNCH[2:])
    tuning.forget_tuned()
    assert tuning.chosen_config(*LAUNCH) == SHIPPED


def test_a_file_takes_further_entries(tmp_path):
    file = written(tmp_path)
    tuning.write(file, "sm90", torch.float32, 768, "tf32", {"weigh": SHIPPED})
    tuning.use_tuned(file)
    assert tuning.chosen_config(*LAUNCH) == OTHER
    assert tuning.chosen_config("sm90", "weigh", torch.float32, 768, "tf32") == SHIPPED
    assert list(tmp_path.iterdir()) == [file], "nothing partial is left"


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tuned configurations at .*run `python -m pairtile\.kernels"):
        tuning.use_tuned(tmp_path / "none.json")


def test_the_fastest_that_launches_wins():
    first, second, third = tuning.candidates(*LAUNCH)[:3]
    assert first == SHIPPED
    seconds = {first: 3.0, second: 1.0, third: 2.0}
    assert tuning.fastest(seconds, seconds.__getitem__) == second

    def out_of_memory(config):
        if config == second:
            raise RuntimeError("out of resource: shared memory")
        return seconds[config]

    assert tuning.fastest(seconds, out_of_memory) == third


def test_what_ships_must_launch():
    def broken(config):
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        tuning.fastest([SHIPPED, OTHER], broken)


RANK = """
import sys, os, torch, torch.distributed as dist
from pairtile.kernels.contrastive.triton_kernels import tuning
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
tuning.use_tuned(f"{folder}/rank{rank}/tuned.json")
print(tuning.chosen_config("sm90", "reduce", torch.bfloat16, 512, "ieee"), flush=True)
try:
    tuning.use_tuned(folder + "/none.json")
except FileNotFoundError as error:
    print("refused", flush=True)
dist.barrier()
os._exit(0)
"""


def test_every_rank_uses_the_file_of_the_first(tmp_path):
    for rank, config in ((0, OTHER), (1, SHIPPED)):
        (tmp_path / f"rank{rank}").mkdir()
        written(tmp_path / f"rank{rank}", config)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=60)[0].splitlines() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert said == [[str(OTHER), "refused"]] * 2
