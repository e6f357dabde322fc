"""Which pair of sets a program works on beside candidates, PAIRS 1 where these are streamed, 2 where they are held."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pair_of(program, candidates, PAIRS: tl.constexpr):
    """The held and the streamed set of a program, one of which is candidate `program` of the other."""
    if PAIRS == 1:
        return program // candidates, program
    else:
        return program, program // candidates


@triton.jit
def partners_of(program, candidates, PAIRS: tl.constexpr):
    """Where a pair's statistics lie among those of its held rows, and among those of its streamed rows."""
    if PAIRS == 1:
        return program % candidates, program * 0
    else:
        return program * 0, program % candidates
