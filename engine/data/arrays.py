"""Arrays in ``.npy`` members, without pickle."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .schema import BadSample, Reason


def parse_array(data: bytes) -> NDArray[Any]:
    """The numbers or truths of an ``.npy`` file, in this machine's byte order.

    Raises:
        BadSample: damaged, or of another type; Python objects, say, which only pickle could read ("bad array").
    """
    try:
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # the header is parsed as Python source: damage raises almost anything
        raise BadSample(Reason.BAD_ARRAY, f"{type(error).__name__}: {error}") from None
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise BadSample(Reason.BAD_ARRAY, f"{array.dtype} is no type of torch")
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
