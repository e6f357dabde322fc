"""Which kernels, configurations and requests are audited."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pairtile.kernels.contrastive.triton_kernels.configurations import PRECISIONS, offered

from .late_interaction import late_headline, late_shipped, late_spanning
from .launches import AnyRequest
from .requests import BATCH, REQUESTS, request
from .targets import Target
from .token_merging import token_headline, token_shipped, token_spanning

# Primes: kernels are compiled apart for sizes that 16 divides. The first batch takes several panels, the second one.
_ODD_BATCH, _ODD_PANEL, _ODD_WIDTH = 65_521, 8_191, 509
#: What float32 is multiplied as, and the 16-bit types.
KINDS = tuple((dtype, "ieee") for dtype in (torch.bfloat16, torch.float16)) + tuple(
    (torch.float32, precision) for precision in PRECISIONS
)


def headline() -> Iterator[AnyRequest]:
    """The table: the sizes that peers advertise, bfloat16 first."""
    yield request("CLIP", torch.bfloat16, 512)
    yield request("SigLIP", torch.bfloat16, 768)
    yield request("cross-entropy", torch.bfloat16, 512)
    yield request("rich", torch.bfloat16, 512)
    yield request("CLIP", torch.bfloat16, 512, aligned=False)
    for dtype, precision in KINDS[1:]:
        yield request("CLIP", dtype, 512, precision)
    yield from late_headline()
    yield from token_headline()


def shipped(target: Target) -> Iterator[AnyRequest]:
    """Every configuration that ships for the target: with descriptors and with pointers, for sizes that a tile divides
    and for sizes that nothing divides, at widths that take narrower blocks of the products.

    The requests ask different things of the same products, so all of them are asked in bfloat16 alone.
    """
    for dtype, precision in KINDS:
        if precision not in offered(target.arch):
            continue
        names = tuple(REQUESTS) if dtype == torch.bfloat16 else ("CLIP", "rich", "distillation")
        for name in names:
            yield request(name, dtype, 512, precision)
            yield request(name, dtype, _ODD_WIDTH, precision, aligned=False, batch=_ODD_PANEL)
        for width in (64, 128, 768):
            yield request("CLIP", dtype, width, precision)
        if target.tma:
            yield request("CLIP", dtype, 512, precision, aligned=False)
            yield request("CLIP", dtype, 512, precision, batch=_ODD_PANEL)
    for aligned, width in ((True, 512), (False, _ODD_WIDTH)):
        yield request("CLIP", torch.bfloat16, width, aligned=aligned, batch=_ODD_BATCH)
    yield from late_shipped(target)
    yield from token_shipped(target)


def spanning(target: Target) -> Iterator[AnyRequest]:
    """A few of them that touch every kernel and every line of the check, within seconds: a batch of one panel."""
    batch = BATCH // 8
    asked = {
        "sm90": [("CLIP", torch.bfloat16, "ieee"), ("distillation", torch.bfloat16, "ieee")],
        "sm100": [("SigLIP", torch.float16, "ieee")],
        "sm80": [("cross-entropy", torch.float32, "tf32"), ("hinge", torch.float16, "ieee")],
        "gfx942": [("cross-entropy", torch.bfloat16, "ieee"), ("retrieval", torch.bfloat16, "ieee")],
    }
    for name, dtype, precision in asked[target.arch]:
        yield request(name, dtype, 512, precision, batch=batch)
    yield from late_spanning(target)
    yield from token_spanning(target)
