"""Ranks that watch each other: who died, hangs or stopped is named by all others, which end as well.

Without it a rank that is gone shows as "connection closed by peer" on its neighbours, and one that hangs not at all.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from .errors import PairtileError, RankFailure

#: Exit code of a rank that ends because of another one: the same command, started again, goes on.
EXIT_OTHER_RANK = 3
INTERVAL = 1.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one, after which a rank counts as dead: far more than a busy machine delays a thread
LONGEST_TURN = 2.0  # seconds between two looks of a rank that count; what is beyond them, it was paused itself
SHORT_SILENCE = 5.0  # the same once an exchange has failed, so that somebody is known to be gone
_PATIENCE = 60.0  # seconds that an error waits for the reason


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself: how many it has given, turns of the loop's phases, where it is, whether it has left."""

    count: int
    turns: int
    step: int
    phase: str
    place: str
    left: bool = False

    def where(self) -> str:
        return f"in step {self.step} ({self.phase}, {self.place})"


class Clock:
    """Seconds in which this process ran. A job that was suspended and goes on has been silent, and nobody is to blame."""

    def __init__(self) -> None:
        self._now, self._looked = 0.0, time.monotonic()

    def __call__(self) -> float:
        looked = time.monotonic()
        self._now += min(looked - self._looked, LONGEST_TURN)
        self._looked = looked
        return self._now


class Watch:
    """``with Watch() as watch:`` around a run; :meth:`begin` once the process group is there, :meth:`at` as it goes on.

    Every rank has a thread that writes a sign of life into a store on rank 0, once a second, reads that of the next
    rank, and looks whether a verdict is there. The first to see one of these writes it, and then all end with it:

    - a rank gives no sign: it was killed or crashed, or its machine is gone;
    - the main thread stood at one place for ``timeout`` seconds. Ranks that took fewer turns than the others are named:
      those wait for them;
    - a rank leaves the block with an exception of its own.

    An exchange that fails (gloo says so at once, NCCL not) is not the failing rank's own error: it waits for the verdict and
    raises :class:`RankFailure`. A main thread that cannot be told, since it waits in an exchange, is ended by the thread with
    the message on stderr and exit code 3. One process needs no watch and has none.
    """

    def __init__(self) -> None:
        self._store: Store | None = None
        self._count, self._turns, self._step, self._phase = 0, 0, 0, "start"
        self._error: BaseException | None = None
        self._verdict: str | None = None
        self._leaving, self._told = threading.Event(), threading.Event()

    def begin(self, rank: int, world_size: int, *, timeout: float, device: torch.device | str = "cpu") -> None:
        """Start watching. Collective over the default process group; `timeout` in seconds.

        Raises:
            PairtileError: rank 0 cannot be reached at MASTER_ADDR.
        """
        if world_size == 1:
            return
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        patience = timedelta(seconds=_PATIENCE)
        port = torch.zeros(1, dtype=torch.int64, device=device)
        if rank == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            port += self._store.port
        dist.broadcast(port, 0)
        try:
            self._store = self._store or TCPStore(host, int(port), is_master=False, timeout=patience)
        except RuntimeError as error:
            raise PairtileError(
                f"rank {rank} cannot reach rank 0 at {host}, port {int(port)}: {_first_line(error)}; open the ports between the "
                "machines, or set MASTER_ADDR to an address of rank 0 that all of them know"
            ) from None
        self._main = threading.get_ident()
        self._seen: dict[int, tuple[int, float]] = {}
        self._clock = Clock()
        self._stack, self._since = 0, self._clock()
        self._give_sign(self._store)
        threading.Thread(target=self._run, name="pairtile watch", daemon=True).start()

    def at(self, step: int, phase: str) -> None:
        """Say what this rank does next. Every rank takes the same turns, so that one with fewer is behind."""
        self._step, self._phase = step, phase
        self._turns += 1

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        self._error = error
        self._leaving.set()
        self._told.wait(_PATIENCE)
        if error is not None and _is_of_an_exchange(error):
            message = self._verdict or f"{_first_line(error)}; the watch, which rank 0 keeps, does not answer"
            raise RankFailure(message) from error

    def _run(self) -> None:
        store = self._store
        assert store is not None
        try:
            while not self._leaving.wait(INTERVAL):
                self._give_sign(store)
                self._verdict = self._read_verdict(store) or self._judge(store)
                if self._verdict is not None and not self._leaving.is_set():
                    self._part(store)
                    print(f"error (rank {self.rank}): {self._verdict}", file=sys.stderr, flush=True)
                    os._exit(EXIT_OTHER_RANK)
            if self._error is not None:
                self._verdict = self._reason(store)
            self._part(store)
        except RuntimeError:  # the store is gone
            self._verdict = self._verdict or _ended("rank 0 died: nobody answers there")
            if not self._leaving.is_set():
                print(f"error (rank {self.rank}): {self._verdict}", file=sys.stderr, flush=True)
                os._exit(EXIT_OTHER_RANK)
        self._told.set()

    def _reason(self, store: Store) -> str | None:
        """Why this rank has an error: itself, or, if an exchange failed, somebody else."""
        error = self._error
        assert error is not None
        if not _is_of_an_exchange(error):
            said = f"{type(error).__name__}: {_first_line(error)}"
            return self._publish(store, f"rank {self.rank} stopped {self._sign().where()}: {said}")
        deadline = time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            found = self._read_verdict(store) or self._judge_silence(store, range(self.world_size), SHORT_SILENCE)
            if found is not None:
                return found
            time.sleep(INTERVAL)
            self._give_sign(store)
        said = (
            f"an exchange failed on rank {self.rank} {self._sign().where()}, and all ranks live: {_first_line(error)}"
        )
        return self._publish(store, said)

    def _judge(self, store: Store) -> str | None:
        silent = self._judge_silence(store, [(self.rank + 1) % self.world_size], SILENCE)
        return silent or (self._judge_standstill(store) if self._stands_still() else None)

    def _judge_silence(self, store: Store, ranks: range | list[int], limit: float) -> str | None:
        now, silent = self._clock(), []
        for rank, sign in self._signs(store, ranks):
            count, since = self._seen.get(rank, (-1, now))
            if sign.count != count or sign.left:
                self._seen[rank] = (sign.count, now)
            elif now - since > limit and rank != self.rank:
                silent.append(f"rank {rank} died: no sign of life for {now - since:.0f} s, the last one {sign.where()}")
        return self._publish(store, "; ".join(silent)) if silent else None

    def _stands_still(self) -> bool:
        """Whether the main thread has not moved for `timeout` seconds: the same turn, and the same line of every frame."""
        frame, lines = sys._current_frames().get(self._main), [self._turns]
        while frame is not None:
            lines += id(frame.f_code), frame.f_lasti
            frame = frame.f_back
        if (stack := hash(tuple(lines))) != self._stack:
            self._stack, self._since = stack, self._clock()
        return self._clock() - self._since > self.timeout

    def _judge_standstill(self, store: Store) -> str | None:
        signs = dict(self._signs(store, range(self.world_size)))
        behind = min(sign.turns for sign in signs.values())
        ranks = [rank for rank, sign in signs.items() if sign.turns == behind]
        places = "; ".join(f"rank {rank} hangs {signs[rank].where()}" for rank in ranks[:8])
        waiting = "the other ranks wait for it" if len(ranks) < self.world_size else "all ranks are in the same phase"
        return self._publish(store, f"{places}: nothing moved for {self.timeout:.0f} s, {waiting}")

    def _sign(self) -> Sign:
        frame = sys._current_frames().get(self._main)
        if self._error is not None:  # the main thread waits for the verdict; where the error rose is of interest
            frame = list(traceback.walk_tb(self._error.__traceback__))[-1][0]
        return Sign(self._count, self._turns, self._step, self._phase, _place(frame))

    def _give_sign(self, store: Store) -> None:
        self._count += 1
        store.set(f"sign/{self.rank}", json.dumps(vars(self._sign())))

    def _signs(self, store: Store, ranks: range | list[int]) -> Iterator[tuple[int, Sign]]:
        """Of the ranks that have given one: a rank begins a moment later than others."""
        for rank in ranks:
            if store.check([f"sign/{rank}"]):
                yield rank, Sign(**json.loads(store.get(f"sign/{rank}")))

    def _read_verdict(self, store: Store) -> str | None:
        return store.get("verdict").decode() if store.check(["verdict"]) else None

    def _publish(self, store: Store, said: str) -> str:
        """Make it the verdict, unless there is one; returns that."""
        return store.compare_set("verdict", "", _ended(said)).decode()

    def _part(self, store: Store) -> None:
        """Leave; rank 0 last, since the store ends with it."""
        store.set(f"sign/{self.rank}", json.dumps(vars(self._sign()) | {"left": True}))
        left = store.add("left", 1)
        if self.rank == 0:
            # the dead never leave: with a verdict this is how long the others have to read it
            deadline = time.monotonic() + (SHORT_SILENCE if store.check(["verdict"]) else _PATIENCE)
            while left < self.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                left = store.add("left", 0)


def _ended(said: str) -> str:
    return f"{said}. The run ends; resume: auto goes on from its newest checkpoint"


def _is_of_an_exchange(error: BaseException) -> bool:
    """Whether a collective failed. gloo raises plain RuntimeErrors, which name its source files."""
    marks = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in marks)
    )


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "nowhere"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
