"""The rows, in the order in which they run: the peers' own headline shapes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .. import contrastive as make
from ..harness import Prepare, forward_alone
from ..work import Work
from . import contenders as who
from . import late_interaction as late
from . import token_merging as merging
from .measure import GpuCase

#: Features and logits of 8 bits: a dense form rounds each logit, by 0.02 where they are around 4.
BFLOAT16_AGREEMENT = 5e-2
#: As in the CPU suite: logits up to 30 carry a rounding error of 2e-6, gradients through exp ten times as much.
FLOAT32_AGREEMENT = 1e-4
#: Factors of 11 bits, cut off by some and rounded by others: 14.3 * 2^-11 = 0.7% of a weight at most.
TF32_AGREEMENT = 1e-2

#: Where products are rounded to 8 bits one maximum in a hundred goes to a runner-up, and with it a tenth of the gradient's norm.
CHOICE_AGREEMENT = 0.2

#: Where two of 10,000 similarities are equal but for rounding, a token goes elsewhere: 1% of the norm for each.
MATCHING_AGREEMENT = 0.05

#: Float64 holds half a dozen batch x batch matrices: 3 GB here, 200 GB at 65,536. Larger rows have no error columns.
LARGEST_EXACT_BATCH = 8192
#: Logits of a language model in float64, a few of them: 7 GB.
LARGEST_EXACT_LOGITS = 4096 * 50_000

CLIP: dict[str, Any] = {"results": ("value", "dx", "dy", "dscale"), "matrix_gradients": ("dx", "dy")}
SIGLIP: dict[str, Any] = {"results": ("value", "dx", "dy", "dscale", "dbias"), "matrix_gradients": ("dx", "dy")}
LANGUAGE: dict[str, Any] = {
    "results": ("value", "dhidden", "dvocabulary"),
    "matrix_gradients": ("dhidden", "dvocabulary"),
}


def work(
    products: int, n: int, m: int, d: int, dtype: torch.dtype = torch.bfloat16, *, forward: bool = False, parts: int = 1
) -> Work:
    """Of an algorithm that takes so many products of N x M x D multiplications, each in so many parts.

    Bytes: the inputs read once, and their gradients written once unless the forward is alone.
    """
    formula = f"{2 * products * parts} N M D" + (f", {parts} for each product" if parts > 1 else "")
    least_bytes = (1 if forward else 2) * (n + m) * d * dtype.itemsize
    return Work(2 * products * parts * n * m * d, least_bytes, dtype, formula)


def exact(formula: Callable[..., torch.Tensor]) -> Prepare:
    return partial(who.on_device_of, partial(who.returned, formula))


def clip(batch: int, width: int, **changes: Any) -> GpuCase:
    """The forward and the backward multiply S: 2 + 6 N M D."""
    settings: dict[str, Any] = {
        "name": "ClipLoss bfloat16",
        "inputs": who.clip_inputs,
        "sizes": {"batch": batch, "width": width},
        "work": work(4, batch, batch, width),
        "contenders": (
            *who.ours("ClipLoss"),
            who.memeff(),
            *who.plain(who.mixed_clip),
            who.open_clip("ClipLoss"),
            who.inf_cl(),
        ),
        "agreement": BFLOAT16_AGREEMENT,
        "exact": exact(make.exact_clip) if batch <= LARGEST_EXACT_BATCH else None,
        **CLIP,
    }
    return GpuCase(**settings | changes)


def clip_forward(batch: int, width: int) -> GpuCase:
    step = forward_alone
    return clip(
        batch,
        width,
        name="ClipLoss bfloat16, forward alone",
        work=work(1, batch, batch, width, forward=True),
        contenders=(
            *who.ours("ClipLoss", step),
            who.memeff(step),
            *who.plain(who.mixed_clip, step),
            who.open_clip("ClipLoss", step),
            who.inf_cl(step),
        ),
        exact=None,
        results=("value",),
        matrix_gradients=(),
    )


def clip_float32(batch: int, width: int, precision: str) -> GpuCase:
    """Products in float32, in TF32 (everybody's), or ours in three of TF32 beside float32."""
    tf32 = precision == "tf32"
    peers = (who.memeff(), who.inf_cl()) if tf32 else ()  # theirs are of TF32
    compiled = 1 if precision == "tf32x3" else 2  # what is compiled for float32 stands in the row before
    return clip(
        batch,
        width,
        name=f"ClipLoss float32, {precision}",
        inputs=partial(who.clip_inputs, dtype=torch.float32),
        work=work(4, batch, batch, width, torch.float32, parts=3 if precision == "tf32x3" else 1),
        contenders=(
            who.ours_at(precision),
            *who.ours("ClipLoss")[1:],
            *peers,
            *who.plain(who.mixed_clip)[:compiled],
            who.open_clip("ClipLoss"),
        ),
        agreement=TF32_AGREEMENT if tf32 else FLOAT32_AGREEMENT,
        matmul="high" if tf32 else "highest",
        rate="highest" if precision == "ieee" else "high",
        source="torch.mm" if precision == "ieee" else "torch.mm in TF32",
    )


def siglip(batch: int, width: int) -> GpuCase:
    """S, dx and dy once each: 6 N M D."""
    return clip(
        batch,
        width,
        name="SigLipLoss bfloat16",
        inputs=who.siglip_inputs,
        work=work(3, batch, batch, width),
        contenders=(
            *who.ours("SigLipLoss"),
            who.siglip_kernel(),
            *who.plain(who.mixed_siglip),
            who.open_clip("SigLipLoss"),
        ),
        exact=exact(make.exact_siglip) if batch <= LARGEST_EXACT_BATCH else None,
        **SIGLIP,
    )


def linear_cross_entropy(tokens: int, vocabulary: int, width: int) -> GpuCase:
    """One direction, its sums needed before its gradient: 8 N M D."""
    return GpuCase(
        name="linear_cross_entropy bfloat16",
        inputs=who.language_model_inputs,
        sizes={"tokens": tokens, "vocabulary": vocabulary, "width": width},
        work=work(4, tokens, vocabulary, width),
        contenders=(
            *who.ours("linear_cross_entropy"),
            *who.cut_cross_entropy(),
            who.liger_kernel(),
            *who.plain(who.linear_then_cross_entropy),
        ),
        agreement=BFLOAT16_AGREEMENT,
        exact=exact(make.linear_then_cross_entropy) if tokens * vocabulary <= LARGEST_EXACT_LOGITS else None,
        **LANGUAGE,
    )


def maxsim(queries: int, query_tokens: int, documents: int, document_tokens: int, width: int = 128) -> GpuCase:
    """The forward alone: 2 Nq Nd Lq Ld D."""
    sizes = {
        "queries": queries,
        "query_tokens": query_tokens,
        "documents": documents,
        "document_tokens": document_tokens,
    }
    return GpuCase(
        name="maxsim bfloat16, forward alone",
        inputs=late.maxsim_inputs,
        sizes=sizes | {"width": width},
        work=token_work(queries * query_tokens, documents * document_tokens, width, chosen=0, forward=True),
        contenders=late.scoring(),
        agreement=BFLOAT16_AGREEMENT,
        results=("scores",),
        matrix_gradients=(),
    )


def colbert(batch: int, query_tokens: int, document_tokens: int, width: int = 128) -> GpuCase:
    """A step in the batch."""
    sizes = {"queries": batch, "query_tokens": query_tokens, "documents": batch, "document_tokens": document_tokens}
    return GpuCase(
        name="ColBERT step bfloat16",
        inputs=partial(late.maxsim_inputs, gradients=True),
        sizes=sizes | {"width": width},
        work=token_work(batch * query_tokens, batch * document_tokens, width, chosen=batch * batch * query_tokens),
        contenders=late.colbert(),
        agreement=CHOICE_AGREEMENT,
        results=("value", "dx", "dy"),
        matrix_gradients=("dx", "dy"),
    )


def filip(batch: int, image_tokens: int, text_tokens: int, width: int = 256) -> GpuCase:
    """The libraries multiply twice, once for each direction; the floor is that of one product."""
    chosen = batch * batch * (image_tokens + text_tokens)
    return replace(
        colbert(batch, image_tokens, text_tokens, width),
        name="FilipLoss bfloat16",
        work=token_work(batch * image_tokens, batch * text_tokens, width, chosen=chosen),
        contenders=late.filip_loss(),
    )


def token_work(x_tokens: int, y_tokens: int, d: int, *, chosen: int, forward: bool = False) -> Work:
    """All products of tokens, and, for each of the two gradients, those of the chosen pairs of tokens."""
    least_bytes = (1 if forward else 2) * (x_tokens + y_tokens) * d * 2
    formula = "2 N M Li Lj D" + (f" + 4 x {chosen:.3g} D" if chosen else "")
    return Work(2 * d * (x_tokens * y_tokens + 2 * chosen), least_bytes, torch.bfloat16, formula)


def tome(batch: int, tokens: int, r: int, width: int = 768, metric_width: int = 64) -> GpuCase:
    """Matching by keys and size-weighted merge, forward and backward: B N^2 C / 2 for the similarities, tokens moved twice."""
    moved = 2 * 2 * batch * (2 * tokens - r) * width
    return GpuCase(
        name="ToMe bfloat16",
        inputs=merging.inputs,
        sizes={"batch": batch, "tokens": tokens, "width": width, "metric_width": metric_width, "r": r},
        work=Work(
            2 * batch * (tokens * tokens // 4) * metric_width,
            moved + 4 * batch * tokens * metric_width,
            torch.float32,
            "B N^2 C / 2",
        ),
        contenders=merging.contenders(r),
        agreement=MATCHING_AGREEMENT,
        results=("merged", "sizes", "dx"),
        matrix_gradients=("dx",),
    )


#: siglip-kernel's headline is D = 768, memeff's D = 512, cut-cross-entropy's the head of Gemma 2 (2B); flash-maxsim's are
#: one query of 32 tokens before 300 each, and ColPali's 1024 before 1024.
ROWS: dict[str, Callable[[], GpuCase]] = {
    "siglip-65536": partial(siglip, 65536, 768),
    "clip-65536": partial(clip, 65536, 512),
    "lce-gemma2": partial(linear_cross_entropy, 8192, 256_000, 2304),
    "clip-forward-65536": partial(clip_forward, 65536, 512),
    "siglip-8192": partial(siglip, 8192, 768),
    "clip-8192": partial(clip, 8192, 512),
    "lce-50000": partial(linear_cross_entropy, 4096, 50_000, 512),
    "clip-float32-ieee": partial(clip_float32, 8192, 512, "ieee"),
    "clip-float32-tf32": partial(clip_float32, 8192, 512, "tf32"),
    "clip-float32-tf32x3": partial(clip_float32, 8192, 512, "tf32x3"),
    "maxsim-rerank": partial(maxsim, 1, 32, 20_000, 300),
    "maxsim-queries": partial(maxsim, 128, 32, 1024, 1024),
    "maxsim-pages": partial(maxsim, 16, 1024, 512, 1024),
    "colbert-128": partial(colbert, 128, 32, 300),
    "filip-512": partial(filip, 512, 196, 32),
    "tome-197": partial(tome, 256, 197, 16),
    "tome-1025": partial(tome, 64, 1025, 64),
    "siglip-32768": partial(siglip, 32768, 768),
    "clip-32768": partial(clip, 32768, 512),
}
