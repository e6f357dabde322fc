"""What a patched layer does between its attention and its MLP, whatever library wrote it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .attention import AttentionTo
from .clips import ClipMerging, LayerPlan
from .cross_token import CrossTokens, cross_guide
from .crossget import complete_graph_matching
from .matching import Matching
from .merging import merge_tokens
from .pitome import pitome_margin, pitome_matching
from .schedules import Schedule
from .tokens import PADDING, Tokens
from .tome import bipartite_matching

#: (keys [B, N, C], tokens to take away, protected first tokens, layer) -> which tokens go where.
Method: TypeAlias = Callable[[Tensor, int, int, int], Matching]
#: (tokens [B, N, C] after attention, layer) -> [B, N], what must not be lost.
Importance: TypeAlias = Callable[[Tensor, int], Tensor]


@dataclass
class Merging:
    """How the layers of one model merge, and what came of it in its last forward pass.

    Attributes:
        schedule: (layers, tokens, protected) -> r for each layer.
        layers: how many the model has.
        protected: so many first tokens are never merged.
        method: which tokens go where.
        importance: for "crossget".
        proportional: attention counts sizes.
        follow: the place of every first token is kept up.
        rotary: so is the first position of every token.
        restore: the last layer gives every first token what its place holds.
        clips: which layers join frames; None: none does.
        cross: for "crossget", what gives importance in place of a function.
        size: float32 [B, S, 1] of the last forward pass; None where nothing was merged.
        place: int64 [B, N] of the last forward pass, where it is followed.
    """

    schedule: Schedule
    layers: int
    protected: int
    method: str | Method
    importance: Importance | None
    proportional: bool
    follow: bool
    rotary: bool
    restore: bool
    clips: ClipMerging | None = None
    cross: CrossTokens | None = None
    size: Tensor | None = None
    place: Tensor | None = None
    _plans: dict[int, list[LayerPlan]] = field(default_factory=dict)

    def plan(self, tokens: int, layer: int) -> LayerPlan:
        """What a layer does to a sample, or a frame, of so many tokens at first."""
        if tokens not in self._plans:
            if self.clips is None:
                self._plans[tokens] = [LayerPlan(r) for r in self._counts(self.layers, tokens, self.protected)]
            else:
                self._plans[tokens] = self.clips.plan(self._counts, self.layers, tokens, self.protected)
        return self._plans[tokens][layer]

    def _counts(self, layers: int, tokens: int, protected: int) -> list[int]:
        counts = list(self.schedule(layers, tokens, protected))
        if len(counts) != layers or any(r < 0 for r in counts):
            raise ValueError(f"the schedule gave {counts}: expected {layers} numbers of at least 0, one a layer")
        return counts

    def matching(self, keys: Tensor, x: Tensor, r: int, layer: int) -> Matching:
        if callable(self.method):
            return self.method(keys, r, self.protected, layer)
        if self.method == "pitome":
            return pitome_matching(keys, r, pitome_margin(layer, self.layers), protected=self.protected)
        if self.cross is not None:
            guide, barred = cross_guide(keys, self.protected)
            count = self.protected + 1
            return complete_graph_matching(keys, r, guide, protected=barred, protected_count=count)
        if self.method == "crossget":
            importance = None if self.importance is None else self.importance(x.detach(), layer)
            return complete_graph_matching(keys, r, importance, protected=self.protected)
        return bipartite_matching(keys, r, protected=self.protected)


@dataclass
class LayerMerging:
    """One layer's part.

    Attributes:
        model: what all layers share.
        layer: from 0.
        heads: of the attention.
    """

    model: Merging
    layer: int
    heads: int
    _wanted: bool = False
    _keys: Tensor | None = None

    def record_keys(self, module: object, args: object, output: Tensor) -> None:
        """A forward hook of what gives the keys, [B, H, N, D] or [B, N, H D]: their mean over heads is matched."""
        if not self._wanted:
            return
        keys = output.detach()
        keys = keys.transpose(1, 2) if keys.dim() == 4 else keys.view(*keys.shape[:2], self.heads, -1)
        self._keys = keys.mean(2, dtype=torch.promote_types(keys.dtype, torch.float32))

    def enter(self, x: Tensor | Tokens, keep: Tensor | None = None) -> Tokens:
        """The tokens of a layer; keep bool [B or 1, N] says which of the first layer's are not padding.

        Raises:
            RuntimeError: under reentrant checkpointing, which would lose the gradient without a word.
        """
        if isinstance(x, tuple):
            # Its function hands on plain tuples, and runs without gradient what came with one.
            if not isinstance(x, Tokens) or (x.x.requires_grad and not torch.is_grad_enabled()):
                raise RuntimeError(
                    "a model with merged tokens runs under reentrant activation checkpointing, which does not see "
                    "tensors in tuples: use use_reentrant=False, the default of timm and transformers"
                )
            return self._crossed(self._joined(x))
        batch, count, _ = x.shape
        clips = self.model.clips
        if clips is not None and batch % clips.frames:
            raise ValueError(f"{batch} frames: expected a multiple of {clips.frames}, the frames of one video")
        size = None if keep is None else torch.where(keep.expand(batch, count), 1.0, PADDING).unsqueeze(-1)
        every = torch.arange(count, device=x.device).expand(batch, -1)
        tokens = Tokens(
            x,
            size,
            every if self.model.rotary else None,
            every if self.model.follow else None,
            count,
            padded=keep is not None,
        )
        return self._crossed(self._joined(tokens))

    def _crossed(self, tokens: Tokens) -> Tokens:
        """With this layer's cross token at the end, in place of the layer's before."""
        cross = self.model.cross
        if cross is None:
            return tokens
        if self.layer > 0:
            return tokens._replace(x=cross(tokens.x[:, :-1], self.layer))
        size = None if tokens.size is None else torch.cat([tokens.size, torch.ones_like(tokens.size[:, :1])], 1)
        # a mask of the library's would lack the cross token: sizes say what is padding
        return tokens._replace(x=cross(tokens.x, 0), size=size, merged=size is not None)

    def _joined(self, tokens: Tokens) -> Tokens:
        """Before attention, across frames: by what enters the layer, as its keys do not exist yet."""
        plan = self.model.plan(tokens.first, self.layer)
        if plan.join == 1:
            return tokens
        tokens = tokens.joined(plan.join, self.model.protected)
        return self._merged(tokens, tokens.x.detach(), plan.across)

    def attention(self, tokens: Tokens) -> AbstractContextManager[Any]:
        """Within it torch's fused attention counts the sizes of these tokens, and keys are recorded if any merge."""
        self._wanted = self.model.plan(tokens.first, self.layer).r > 0
        size = tokens.attention_size(self.model.proportional)
        return nullcontext() if size is None else AttentionTo(size)

    def merge(self, tokens: Tokens, x: Tensor) -> Tokens:
        """After attention, which made x of these tokens: those that this layer leaves."""
        keys, self._keys = self._keys, None
        if not self._wanted:
            return tokens._replace(x=x)
        if keys is None:
            raise RuntimeError(f"layer {self.layer} showed no keys: its attention does not run as when it was patched")
        return self._merged(tokens._replace(x=x), keys, self.model.plan(tokens.first, self.layer).r)

    def _merged(self, tokens: Tokens, metric: Tensor, r: int) -> Tokens:
        if tokens.padded:
            # Padding is alike to itself and, by an axis of its own, to no other token: it goes before real tokens do.
            real = tokens.real()
            metric = torch.cat([metric * real, (~real).to(metric.dtype)], -1)
        matching = self.model.matching(metric, tokens.x, r, self.layer)
        x, size = merge_tokens(tokens.x, matching, tokens.size)
        origin, place = tokens.origin, tokens.place
        return tokens._replace(
            x=x,
            size=size,
            origin=None if origin is None else origin.gather(1, matching.kept),
            place=None if place is None else matching.place_of().gather(1, place),
            merged=tokens.merged or matching.sources.shape[1] > 0,
        )

    def leave(self, tokens: Tokens, x: Tensor) -> Tensor | Tokens:
        """What the layer returns: the last one a tensor, with sizes and places left in `model`."""
        if self.layer < self.model.layers - 1:
            return tokens._replace(x=x)
        size = tokens.size
        if self.model.cross is not None:
            x, size = x[:, :-1], None if size is None else size[:, :-1]
        self.model.size = size if tokens.merged else None
        self.model.place = tokens.place
        if self.model.restore and tokens.merged and tokens.place is not None:
            return x.gather(1, tokens.place.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return x


class Site(NamedTuple):
    """Where a model is patched: what an adapter says of it.

    Attributes:
        model_class: what the model becomes; None: it stays.
        layers: each layer and what it becomes.
        keys: of each layer, the module whose output are its keys, see `LayerMerging.record_keys`.
        heads: of each layer.
        protected: first tokens that are never merged: class and distillation tokens, registers.
        rotary: positions are turned into each layer's attention.
        pooling: an attention that pools the tokens, called with keyword arguments `attn_mask`; None: the model has no
            such.
    """

    model_class: type | None
    layers: list[tuple[nn.Module, type]]
    keys: list[nn.Module]
    heads: list[int]
    protected: int
    rotary: bool = False
    pooling: nn.MultiheadAttention | None = None


class MergingLayer:
    """The forward of a patched layer, mixed into a subclass of the library's own, which says what its halves are."""

    merging: LayerMerging

    def attention_half(self, tokens: Tokens, *args: Any, **kwargs: Any) -> Any:
        """tokens.x plus what attention makes of it, with the arguments that the library's layer takes beside x."""
        raise NotImplementedError

    def mlp_half(self, x: Tensor) -> Any:
        """x plus what the MLP makes of it."""
        raise NotImplementedError

    def padding(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """bool [B, N] of the first layer's tokens, False for padding, by the arguments beside x; None: all are real."""
        return None

    def forward(self, x: Tensor | Tokens, *args: Any, **kwargs: Any) -> Tensor | Tokens:
        merging = self.merging
        tokens = merging.enter(x, None if isinstance(x, Tokens) else self.padding(*args, **kwargs))
        with merging.attention(tokens):
            attended = self.attention_half(tokens, *args, **kwargs)
        tokens = merging.merge(tokens, attended)
        return merging.leave(tokens, self.mlp_half(tokens.x))
