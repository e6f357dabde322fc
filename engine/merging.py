"""The ``token_merging`` block of a tower: its layers merge tokens, by the operators of ``pairtile.kernels.token_merging``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from ..kernels.token_merging import (
    ClipMerging,
    ConstantR,
    CrossTokens,
    FlopsBudget,
    KeepRatio,
    LinearR,
    Schedule,
    TargetTokens,
    patch,
    schedule_of,
    unpatch,
)
from .errors import PairtileError
from .strict import StrictModel

_AMOUNTS = ("r", "keep_ratio", "target_tokens", "flops")


class ClipMergingConfig(StrictModel):
    """TempMe's second scope (arXiv:2409.01156): layers that join neighbouring frames of a clip and merge across them."""

    join: dict[int, int] = Field(
        description="{layer from 0: how many neighbours become one}; the product divides data.frames"
    )
    keep_across: float = Field(0.7, ge=0.5, le=1, description="share of a joined clip's tokens that is kept")
    keep_within: float = Field(0.9, ge=0.5, le=1, description="share that it and each later layer keeps afterwards")


class TokenMergingConfig(StrictModel):
    """Every layer of a tower merges tokens between its attention and its MLP, in training and afterwards.

    One of ``r``, ``keep_ratio``, ``target_tokens`` and ``flops`` says how many. Towers are timm's vision transformers and
    of transformers those that :func:`pairtile.kernels.token_merging.patch` names (text: BERT, RoBERTa).
    """

    method: Literal["tome", "pitome", "crossget", "tempme"] = Field(
        "tome",
        description="tome (arXiv:2210.09461); pitome (arXiv:2405.16148); crossget (arXiv:2305.17455); tempme "
        "(arXiv:2409.01156): tome's pairs, within frames and by clips across them",
    )
    r: int | list[int] | None = Field(None, description="tokens that each layer merges; a list: layer by layer")
    inflection: float | None = Field(
        None, ge=-1, le=1, description="with a single r, its mean: -1 falls from 2 r to 0 over the layers, 1 rises"
    )
    keep_ratio: float | list[float] | None = Field(
        None, description="share of its tokens that each layer keeps, 0.5 to 1; a list: layer by layer"
    )
    target_tokens: int | float | None = Field(None, description="tokens that leave the last layer; below 1: a share")
    flops: float | None = Field(None, gt=0, le=1, description="share of the tower's FLOPs without merging")
    clips: ClipMergingConfig | None = Field(None, description="for tempme")
    cross_tokens: bool = Field(
        False, description="for crossget: learn what matters to the other modality; add the objective crossget"
    )
    proportional: bool = Field(True, description="attention counts how many tokens a token stands for")

    @model_validator(mode="after")
    def _one_amount(self) -> TokenMergingConfig:
        given = [name for name in _AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(_AMOUNTS)}, not {' and '.join(given) or 'none'}")
        if self.inflection is not None and not isinstance(self.r, int):
            raise ValueError("inflection goes with a single r")
        if (self.method == "tempme") != (self.clips is not None):
            raise ValueError("method: tempme and clips go together, for example clips: {join: {3: 2, 4: 2}}")
        if self.cross_tokens and self.method != "crossget":
            raise ValueError("cross_tokens go with method: crossget")
        return self


def merge_tokens_in(
    tower: nn.Module,
    config: TokenMergingConfig | None,
    key: str,
    *,
    cross_tokens: CrossTokens | None = None,
    frames: int | None = None,
    restore: bool = False,
    trace_source: bool = False,
) -> None:
    """Let a tower merge its tokens as the recipe says; None: let it merge none.

    Args:
        tower: of timm or transformers.
        config: the block ``token_merging``.
        key: the tower's in the recipe, for errors.
        cross_tokens: of `cross_tokens_of`, where the recipe asked for them.
        frames: of a clip, where the tower takes the frames of clips.
        restore: the tower returns as many tokens as it takes, each as what it was merged into.
        trace_source: keep what ``merged_sources`` asks for.

    Raises:
        PairtileError: a tower whose tokens cannot be merged, or amounts that do not fit it.
    """
    unpatch(tower)
    if config is None:
        return
    if config.clips is not None and frames is None:
        raise PairtileError(f"{key}.token_merging.clips joins frames of clips: set data.frames")
    if config.cross_tokens and cross_tokens is None:
        raise PairtileError(f"{key}.token_merging.cross_tokens are trained with a model: this one has none")
    try:
        clips = None if config.clips is None or frames is None else ClipMerging(frames, **config.clips.model_dump())
        patch(
            tower,
            _schedule(tower, config),
            method="tome" if config.method == "tempme" else config.method,
            proportional=config.proportional,
            cross_tokens=cross_tokens if config.cross_tokens else None,
            clips=clips,
            restore=restore,
            trace_source=trace_source,
        )
    except (TypeError, ValueError) as error:
        raise PairtileError(f"{key}.token_merging: {error}") from None


def cross_tokens_of(tower: Any, config: TokenMergingConfig | None, key: str) -> CrossTokens | None:
    """Fresh cross tokens for a tower, where its recipe asks for them. Raises :class:`PairtileError` as above."""
    if config is None or not config.cross_tokens:
        return None
    try:
        width, _ = _widths(tower)
    except TypeError as error:
        raise PairtileError(f"{key}.token_merging.cross_tokens: {error}") from None
    return CrossTokens(len(tower.blocks) if hasattr(tower, "blocks") else tower.config.num_hidden_layers, width)


def _schedule(tower: nn.Module, config: TokenMergingConfig) -> Schedule:
    if config.keep_ratio is not None:
        return KeepRatio(config.keep_ratio)
    if config.target_tokens is not None:
        return TargetTokens(config.target_tokens)
    if config.flops is not None:
        return FlopsBudget(config.flops, *_widths(tower))
    if isinstance(config.r, int):
        return ConstantR(config.r) if config.inflection is None else LinearR(config.r, config.inflection)
    return schedule_of(config.r or [])


def _widths(tower: Any) -> tuple[int, float]:
    """Channels of a token, and those of the MLP's two products over them, 1.5 times as much where it is gated."""
    if hasattr(tower, "blocks") and hasattr(tower, "embed_dim"):
        products = [each for each in tower.blocks[0].mlp.modules() if isinstance(each, nn.Linear)]
        return tower.embed_dim, sum(each.weight.numel() for each in products) / (2 * tower.embed_dim**2)
    try:
        return tower.config.hidden_size, tower.config.intermediate_size / tower.config.hidden_size
    except AttributeError:
        raise TypeError(
            f"a {type(tower).__name__} does not say how wide its layers are: expected a vision transformer of timm or a "
            "model of transformers"
        ) from None
