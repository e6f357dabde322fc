"""The order of the data: a pure function of (seed, epoch), evaluated where it is needed.

A permutation of n samples is not stored. It is a keyed bijection (a Feistel network on the smallest square
power of two that holds n, walked until it lands below n), so any batch of any epoch costs O(batch) time and
memory, for ten samples as for ten billion, and does not depend on the version of a random number library.

Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (cycle walking), CT-RSA 2002.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# What a sample's seed is for: streams never share random numbers.
CAPTION_STREAM = 1
AUGMENT_STREAM = 2
_ORDER_STREAM = 3


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every output bit depends on every input bit. Wraps modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _key(*parts: int) -> int:
    """One 64-bit key from several integers."""
    state = 0
    for part in parts:
        state = int(_mix(np.array([(state * 3 + part + _GOLDEN) & _MASK64], dtype=np.uint64))[0])
    return state


def sample_seeds(seed: int, epoch: int, indices: NDArray[np.int64], stream: int) -> NDArray[np.uint64]:
    """One 64-bit seed for each sample index [n], a function of (seed, epoch, index, stream) alone."""
    key = np.uint64(_key(seed, epoch, stream))
    return _mix(_mix(indices.astype(np.uint64) * np.uint64(_GOLDEN) + key) ^ key)


def permute(positions: NDArray[np.int64], n: int, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """Where a permutation of ``range(n)`` sends each of the positions [m] (each in 0 .. n-1)."""
    if n <= 1:
        return np.zeros(len(positions), dtype=np.int64)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(_key(seed, epoch, _ORDER_STREAM, i)) for i in range(_ROUNDS)]

    def shuffle(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right * np.uint64(_GOLDEN) + key) & mask)
        joined: NDArray[np.uint64] = (left << half) | right
        return joined

    x = shuffle(positions.astype(np.uint64))
    outside = np.flatnonzero(x >= n)
    while outside.size:
        x[outside] = shuffle(x[outside])
        outside = outside[x[outside] >= n]
    return x.astype(np.int64)


def batch_order(n: int, batch_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The whole epoch: sample indices int64 [n // batch_size, batch_size], one row for each global batch."""
    rows = n // batch_size
    return permute(np.arange(rows * batch_size), n, seed, epoch).reshape(rows, batch_size)


def batch_indices(n: int, batch_size: int, seed: int, batch_index: int) -> tuple[int, NDArray[np.int64]]:
    """(epoch, sample indices int64 [batch_size]) of one global batch, counted from the start of training.

    An epoch has ``n // batch_size`` batches; the samples left over are others in every epoch.
    """
    epoch, row = divmod(batch_index, n // batch_size)
    return epoch, permute(np.arange(row * batch_size, (row + 1) * batch_size), n, seed, epoch)


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """The contiguous part of ``count`` rows that belongs to a rank; parts differ by one row at most."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)
