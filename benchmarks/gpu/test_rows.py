"""The losses beside their peers on a GPU: `make bench-gpu`, or

    pytest benchmarks/gpu -k siglip

README.md beside this file says what is run.
"""

from __future__ import annotations

import pytest

from .rows import ROWS


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
def test_row(measure_row, row):
    measure_row(ROWS[row]())
