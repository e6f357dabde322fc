"""The process: its rank, device, threads and process group, however it was started."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ..kernels.build import cache_directory
from .errors import PairtileError


@dataclass(frozen=True)
class Runtime:
    """Where this process stands. ``group`` is None for a single process, so that losses skip their collectives."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather_flags(self, *flags: bool) -> list[list[bool]]:
        """Each rank's flags, by rank. One small collective; every rank must call it."""
        mine = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        if self.world_size == 1:
            return [list(flags)]
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone).bool().tolist()


def environment_rank() -> tuple[int, int, int]:
    """(rank, local rank, world size) as the deepspeed launcher, torchrun or nobody set them."""
    values = []
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(name, str(default))
        if not text.isdigit():
            raise PairtileError(
                f"environment variable {name} is {text!r}, expected a number; start through a launcher or unset it"
            )
        values.append(int(text))
    return values[0], values[1], values[2]


def start(threads: int | None = None, timeout_minutes: float = 30.0) -> Runtime:
    """Join (or make) the process group and choose the device and the threads."""
    rank, local_rank, world_size = environment_rank()
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_world))
    elif threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    _join(rank, local_rank, world_size, "nccl" if cuda else "gloo", timeout_minutes)
    return Runtime(rank, local_rank, world_size, device, dist.group.WORLD if world_size > 1 else None)


def _join(rank: int, local_rank: int, world_size: int, backend: str, timeout_minutes: float) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    clear_stale_build_locks(fix_build_folders())
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if backend == "gloo":
        # DeepSpeed would compile its shared-memory operator now; only its inference engine uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt != "0":
            store = store_of_attempt(attempt, rank, world_size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def store_of_attempt(attempt: str, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The launcher's store, with keys of this attempt's own.

    torchrun's store outlives the ranks that it starts again. Under the same keys they would find the addresses of those that
    died, and connect to them in vain.
    """
    store, *_ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return PrefixStore(f"attempt {attempt}", store)


def fix_build_folders() -> Path:
    """Where this process and what it starts keep their builds; returns the folder of DeepSpeed's operators.

    cache_directory() looks below TORCH_EXTENSIONS_DIR where that is set. Ours is therefore fixed before it is: what
    `make build` has compiled is found, and not compiled once more in the first step.
    """
    cache = cache_directory()
    os.environ["PAIRTILE_CACHE"] = str(cache)
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "extensions")))


_in_use: list[int] = []  # file descriptors whose shared lock says "a pairtile process is alive here"


def clear_stale_build_locks(extensions: Path) -> None:
    """Remove the lock files that a killed compilation left behind, on which every later start would wait for ever.

    torch.utils.cpp_extension (and so DeepSpeed) locks a build by creating an empty file ``lock``, which outlives
    its process. Every trainer therefore holds a shared flock on the folder, which the kernel drops when the
    process dies however it dies: whoever gets it exclusively knows that no trainer is alive and that the locks
    are stale.
    """
    extensions.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(extensions / ".in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    else:
        for stale in extensions.glob("**/lock"):
            stale.unlink(missing_ok=True)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _in_use.append(descriptor)


def seed_step(seed: int, rank: int, batch_index: int) -> None:
    """Seed dropout and the like from (seed, rank, batch): a resumed run draws what an uninterrupted one draws."""
    state = random.Random(f"{seed}/{rank}/{batch_index}").getrandbits(63)
    torch.manual_seed(state)


def free_port() -> int:
    """A TCP port that nobody listens on, below the range from which systems hand out ports of their own accord.

    Seconds pass until it is listened on, and in that range gloo's connections alone would take it now and then.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise PairtileError("no free TCP port between 20000 and 32767; set MASTER_PORT to one that is free")
