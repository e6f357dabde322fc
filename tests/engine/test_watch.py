"""What a run of several ranks does when one dies, hangs or has nothing more to read: all end and name it."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from curves import environment, losses
from pairtile.engine import watch
from pairtile.engine.errors import PairtileError
from pairtile.engine.recipe import parse_recipe
from pairtile.engine.runtime import Runtime
from pairtile.engine.train import next_batch, train

WORKER = Path(__file__).parents[1] / "support" / "watch_worker.py"
KILLED = -signal.SIGKILL
# exit codes of four ranks, and what those that end for another one say
WAYS = {
    "first_killed": ([KILLED, 3, 3, 3], "rank 0 died: nobody answers there"),  # the store goes with it
    "hangs": ([3, 3, 3, 3], "rank 2 hangs in step 3 (data, watch_worker.py:"),
    "loader_ends": ([3, 3, 2, 3], "rank 2 stopped in step 3 (data, watch_worker.py:"),
    "fine": ([0, 0, 0, 0], ""),
    "recipe": ([3, 3, KILLED, 3], "rank 2 died: no sign of life for"),
}


def test_the_rank_that_fails_is_named_by_all_others_and_the_run_goes_on(tiny, tmp_path):
    raw = tiny(**{"train.save_every": 1, "eval.splits": []})
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    ways = [str(recipe) if way == "recipe" else way for way in WAYS]
    done = subprocess.run(
        [sys.executable, WORKER, tmp_path, *ways], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    for way, (expected, said) in WAYS.items():
        assert codes[way] == expected, way
        for rank in range(4):
            assert expected[rank] != 3 or said in (tmp_path / f"{way}-{rank}").read_text(), (way, rank)
    # two steps were done and saved; one rank may go on where there were four
    train(parse_recipe(raw))
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_suspended_job_that_goes_on_is_nobodys_silence(monkeypatch):
    """Scheduler, debugger or laptop stop all ranks for an hour; the neighbour's next sign comes a moment later."""
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    watching = watch.Watch()
    watching.rank, watching.world_size, watching.timeout = 0, 2, 100.0
    watching._store, watching._main, watching._seen = HashStore(), threading.get_ident(), {}
    watching._clock, watching._stack, watching._since = watch.Clock(), 0, 0.0
    watching._store.set("sign/1", json.dumps(vars(watch.Sign(1, 0, 0, "start", "here"))))

    def look(after):
        nonlocal now
        now += after
        # both, as either may be the one that is wrong
        return watching._judge_silence(watching._store, [1], watch.SILENCE), watching._stands_still()

    for after in (1.0, 3600.0, 1.0):
        assert look(after) == (None, False)
    for _ in range(int(watch.SILENCE) - 4):
        assert look(1.0)[0] is None
    said, _ = [look(1.0) for _ in range(5)][-1]
    assert said.startswith("rank 1 died: no sign of life for")
    assert any(look(1.0)[1] for _ in range(102)), "one that stands still is found as before"


def test_a_loader_that_ends_is_an_error_that_says_where():
    said = r"the loader of rank 2 ended before batch 7; every rank needs the same number"
    with pytest.raises(PairtileError, match=said):
        next_batch(iter([]), SimpleNamespace(batch_index=7), Runtime(2, 2, 4, "cpu", None))
