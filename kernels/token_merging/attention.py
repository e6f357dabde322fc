"""Attention among tokens that stand for several: log(size) on the key axis (ToMe, arXiv:2210.09461, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..contrastive.arguments import described

#: A key of no size gets this score, whose exponential is 0 in every dtype; float16 holds it over a scale of 1/64.
_NOTHING = -1000.0
_FORMS = ("mask", "fold")
#: Fused kernels read rows of 16 bytes.
_HEAD_MULTIPLE = 8


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    form: str | None = None,
) -> Tensor:
    """softmax_j(scale <q_i, k_j> + log size_j) v_j: a key that stands for size_j tokens counts as often.

    It equals attention over the tokens before they were merged, where merged tokens had equal keys and equal values.

    Args:
        q: [B, H, Nq, D], differentiable.
        k: [B, H, N, D], differentiable.
        v: [B, H, N, Dv], differentiable.
        size: [B, N] or [B, N, 1], how many tokens each key stands for; 0: none, the key is masked. No gradient.
        dropout_p: of the attention weights.
        scale: None: D ** -0.5.
        form: "mask" adds a float mask [B, 1, 1, N], exact in every dtype where no autocast rounds it; "fold" writes the
            bias into extra columns of the head (see `fold_size`), so that kernels without a mask serve it. None: "fold"
            on CUDA in float16 and bfloat16, where flash kernels take no mask and the others round it to the dtype of q;
            else "mask".

    Returns:
        [B, H, Nq, Dv] in the dtype of q.

    Raises:
        ValueError: q, k, v or size of shapes that do not fit, or an unknown form.
    """
    _check(q, k, v, size)
    if form is None:
        form = "fold" if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else "mask"
    if form not in _FORMS:
        raise ValueError(f'form={form!r}: expected "mask", "fold" or None')
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Autocast would round the mask with the other arguments.
    with torch.autocast(q.device.type, enabled=False):
        if form == "mask":
            # Beside the CPU's, kernels take a mask of the dtype of q alone.
            mask = size_bias(size, q.dtype).to(_wide(q.dtype) if q.device.type == "cpu" else q.dtype)[:, None, None, :]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        wide_q, wide_k, wide_v = fold_size(q, k, v, size, scale)
        found = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, dropout_p=dropout_p, scale=scale)
        return found[..., : v.shape[-1]]


def fold_size(q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v whose attention, at this scale and without a mask, is the proportional one of q, k, v and size.

    Two columns are added to the head: ones in q, log(size) / scale in k, as a high part in k's own dtype and what that
    leaves over (a single bfloat16 column is off by 2^-9 of its value). Zeros fill all three heads up to one multiple of
    8; the first Dv columns of the output are the answer, the others 0.

    Args:
        q: [B, H, Nq, D], differentiable; so are k [B, H, N, D] and v [B, H, N, Dv].
        size: [B, N] or [B, N, 1].
        scale: what the kernel is told to multiply scores by; its default would be that of the wider head.

    Returns:
        (q [B, H, Nq, W], k [B, H, N, W], v [B, H, N, W]), W a multiple of 8, for any fused kernel that takes
        [B, H, N, W]; flash-attn's takes their `transpose(1, 2)`.
    """
    width = -(-max(q.shape[-1] + 2, v.shape[-1]) // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
    # A small scale would take the score of nothing out of the range of float16, and leave infinities of both signs.
    bias = (size_bias(size, k.dtype).clamp(min=_NOTHING) / scale).clamp(min=torch.finfo(k.dtype).min)
    high = bias.to(k.dtype)
    columns = torch.stack([high, (bias - high).to(k.dtype)], -1).unsqueeze(1).expand(*k.shape[:3], 2)
    wide_q = torch.cat([q, q.new_ones(*q.shape[:3], 2)], -1)
    wide_k = torch.cat([k, columns], -1)
    return tuple(F.pad(each, (0, width - each.shape[-1])) for each in (wide_q, wide_k, v))  # type: ignore[return-value]


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """log(size) [B, N], in `dtype` and float32 at least; -inf where a token stands for nothing."""
    return size.detach().flatten(1).to(_wide(dtype)).log()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class AttentionTo(TorchFunctionMode):
    """Within this context torch's scaled_dot_product_attention is proportional, if its keys are as many as the sizes.

    A model's own attention runs as it is written; only its call of the fused kernel is answered here. torch.compile
    traces it, and checkpointing enters it again where a layer that entered it is computed once more.

    Args:
        size: [B, N] or [B, N, 1].
    """

    def __init__(self, size: Tensor) -> None:
        super().__init__()
        self.size = size

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _answered(self.size, *args, **kwargs)
        return func(*args, **kwargs)


def _answered(
    size: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or is_causal or enable_gqa:
        raise ValueError(
            "attention among merged tokens with a mask, a causal order or grouped heads: these belong to the tokens "
            "before they were merged; unpatch the model, or patch it with proportional=False"
        )
    if torch.is_autocast_enabled(query.device.type):
        to = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(to), key.to(to), value.to(to)
    return proportional_attention(query, key, value, size, dropout_p=dropout_p, scale=scale)


def _check(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> None:
    for name, each in (("q", q), ("k", k), ("v", v)):
        if each.dim() != 4:
            raise ValueError(f"{name} is {described(each)}: expected [batch, heads, tokens, head width]")
    if q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
        shapes = ", ".join(str(list(each.shape)) for each in (q, k, v))
        raise ValueError(
            f"q, k and v have shapes {shapes}: expected one batch, as many heads, q as wide as k, v as long as k"
        )
    batch, _, tokens, _ = k.shape
    if size.shape not in ((batch, tokens), (batch, tokens, 1)):
        raise ValueError(
            f"size is {described(size)}: expected {[batch, tokens]} or {[batch, tokens, 1]}, one for each key"
        )
