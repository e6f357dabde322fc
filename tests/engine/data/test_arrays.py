"""Array members: numbers come through, everything else is refused without being run."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch

from pairtile.engine.data import BadSample, Reason
from pairtile.engine.data.arrays import parse_array


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    return data.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "<i8", ">i2", "|u1", "|b1"])
def test_numbers(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    for order in (array, np.asfortranarray(array)):
        assert torch.from_numpy(parse_array(npy(order))).tolist() == array.tolist()


def test_everything_else_is_refused() -> None:
    archive = io.BytesIO()
    np.savez(archive, a=np.arange(3))
    texts = [npy(np.array(["a"])), npy(np.array([{}], dtype=object)), npy(np.zeros(2, dtype="c8"))]
    cut = npy(np.arange(99))[:-8]
    header = npy(np.arange(2)).replace(b"}", b"(", 1)
    for data in (*texts, archive.getvalue(), pickle.dumps([1]), cut, header, b"", b"\x93NUMPY"):
        with pytest.raises(BadSample) as raised:
            parse_array(data)
        assert raised.value.reason == Reason.BAD_ARRAY
