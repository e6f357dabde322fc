"""The launches of the sweeps over a sample's similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contrastive.triton_kernels import launching
from ..contrastive.triton_kernels.configurations import Config
from ..contrastive.triton_kernels.launching import cdiv
from ..late_interaction.triton_sweeps import filled_width
from .similarity import Partners
from .triton_configurations import sweep_config
from .triton_kernels.similarity import energy_sweep, partner_sweep
from .triton_kernels.tokens import Tokens

# Triton knows of a stride whether it is a multiple of that, and of an address in bytes.
_VECTOR = 16


def best_partners(
    x: Tensor,
    y: Tensor,
    x_keep: Tensor | None,
    y_keep: Tensor | None,
    partners: int,
    x_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `Similarities.best_partners`.

    Args:
        x_scale, y_scale: float32 [B, Na] and [B, Nb], positive factors of the products; None: 1.
    """
    batch, count, _ = x.shape
    if not y.shape[1]:
        return x.new_full((batch, count), -torch.inf, dtype=torch.float32), x.new_zeros(batch, count, dtype=torch.int64)
    best = launching.empty(batch, count, dtype=torch.float32, device=x.device)
    index = launching.empty(batch, count, dtype=torch.int64, device=x.device)
    config, shared = _tile(x, y.shape[1])
    arguments = shared | {
        "best": best,
        "index": index,
        "x": _side(x, x_scale, x_keep),
        "y": _side(y, y_scale, y_keep),
        "PARTNERS": int(Partners(partners)),
    }
    _launch(partner_sweep, batch, config, arguments)
    return best, index


def energies(x: Tensor, margin: float, alpha: float) -> Tensor:
    """As `Similarities.energies`."""
    batch, count, _ = x.shape
    found = launching.empty(batch, count, dtype=torch.float32, device=x.device)
    config, shared = _tile(x, count)
    arguments = shared | {"energies": found, "x": _side(x, None, None), "margin": margin, "alpha": alpha}
    _launch(energy_sweep, batch, config, arguments)
    return found


def _tile(x: Tensor, others: int) -> tuple[Config, dict[str, Any]]:
    """The configuration of a sweep, and the arguments that follow from it."""
    width = filled_width(x.shape[2])
    config = sweep_config(launching.architecture(x.device), x.dtype, width, rows=x.shape[1], cols=others)
    shared = {
        "d": width,
        "blocks": cdiv(x.shape[1], config.block_m),
        "WHOLE": width <= config.block_k,
        "PRECISION": "ieee",
        "INTERPRETED": launching.interpreting(),
    }
    return config, shared


def _launch(kernel: Any, batch: int, config: Config, arguments: dict[str, Any]) -> None:
    if programs := batch * arguments["blocks"]:
        with launching.on(arguments["x"].tokens.device):
            launching.run(kernel, (programs,), config, arguments)


def _side(tokens: Tensor, scale: Tensor | None, keep: Tensor | None) -> Tokens:
    tokens = _loadable(tokens)
    marks = None if keep is None else keep.view(torch.uint8)
    scale = None if scale is None else scale.contiguous()
    return Tokens(tokens, tokens.stride(), scale, marks, (0, 0) if marks is None else marks.stride(), tokens.shape[1])


def _loadable(tokens: Tensor) -> Tensor:
    """The tokens [B, N, D] as their memory has them, if rows start where several numbers are loaded at once; else a copy that
    does, whose rows are filled up with zeros: they change no product."""
    tokens = launching.near(tokens)
    rest = filled_width(tokens.shape[2]) - tokens.shape[2]
    starts = (*tokens.stride()[:2], tokens.data_ptr())
    loadable = tokens.stride(2) == 1 and not any(start % _VECTOR for start in starts)
    if not tokens.numel() or (loadable and not rest):
        return tokens
    return torch.nn.functional.pad(tokens, (0, rest)).contiguous()
