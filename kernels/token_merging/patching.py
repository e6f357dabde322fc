"""Token merging inside models of timm and transformers: `patch` and `unpatch`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

from torch import Tensor, nn

from .attention import size_bias
from .clips import ClipMerging
from .cross_token import CrossTokens
from .layers import Importance, LayerMerging, Merging, Method, Site
from .schedules import Schedule, schedule_of

Model = TypeVar("Model", bound=nn.Module)

_METHODS = ("tome", "pitome", "crossget")


def patch(
    model: Model,
    r: int | tuple[int, float] | Sequence[int] | Schedule,
    *,
    method: str | Method = "tome",
    proportional: bool = True,
    protected: int | None = None,
    importance: Importance | None = None,
    cross_tokens: CrossTokens | None = None,
    clips: ClipMerging | None = None,
    trace_source: bool = False,
    restore: bool = False,
) -> Model:
    """Make every layer of a transformer merge r of its tokens, between its attention and its MLP; undone by `unpatch`.

    As in ToMe (arXiv:2210.09461) tokens are matched by the mean over heads of their keys, merged into the mean over the
    tokens that they stand for, and attention counts these: see `proportional_attention`. Means and attention that pool
    the last tokens count them too. Weights, `state_dict`, options and hooks of the model stay as they are; its layers
    become subclasses of what they were, which hand one another a tuple, and only the last one a tensor. Works in
    training, under activation checkpointing (not its reentrant form), autocast, torch.compile and torch.export; can be
    copied and pickled; not under `nn.DataParallel`, whose threads share a layer.

    Models: timm's `VisionTransformer` (ViT, CLIP, SigLIP, DINOv2), its distilled DeiT and `Eva` (EVA, DINOv3); of
    transformers `CLIPVisionModel`, `SiglipVisionModel`, `ViTModel`, `Dinov2Model`, with registers too, `BertModel` and
    `RobertaModel`, with the attention implementations "sdpa" and "eager". Rotary embeddings follow the token that a
    merged one took its place from. Padding of a text is never counted, and merged before its words: all of it by
    "crossget", as many in one layer as they pair up themselves by the others.

    Args:
        model: the tower itself, not a model that holds it.
        r: as in ToMe a number, (r, inflection) or one for each layer; or a schedule: `KeepRatio`, `TargetTokens`,
            `FlopsBudget`, or a function (layers, tokens, protected) -> r for each layer. 0 leaves outputs bit by bit.
        method: "tome", "pitome" (arXiv:2405.16148, its margin falling by layer) or "crossget" (arXiv:2305.17455), or a
            function (keys [B, N, C], r, protected, layer from 0) -> Matching.
        proportional: attention counts sizes; False: each token counts once.
        protected: so many first tokens are never merged; None: the model's class and distillation tokens and registers.
        importance: for "crossget", (tokens [B, N, C], layer from 0) -> [B, N], what must not be lost: in the paper the
            cosine of each token with a cross token.
        cross_tokens: for "crossget", what learns that importance; a module of the caller's, whose weights are trained beside
            the model's. Not with rotary embeddings, with `clips`, or without a class token.
        clips: for a batch of videos, frame after frame: layers that join neighbouring frames and merge across them
            (TempMe, arXiv:2409.01156). The model then returns a row for each clip that is left.
        trace_source: keep `merged_sources`.
        restore: the last layer gives every first token what became of it, so that what follows finds as many tokens as
            came in, a text's pooling by its mask, say.

    Returns:
        The model.

    Raises:
        TypeError: a model, or an r, that is none of these.
        ValueError: a patched model, or options that do not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: expected a model of timm or transformers")
    if is_patched(model):
        raise ValueError(f"this {type(model).__name__} merges tokens already: unpatch it first")
    if not callable(method) and method not in _METHODS:
        raise ValueError(f"method={method!r}: expected {', '.join(map(repr, _METHODS))} or a function")
    if importance is not None and method != "crossget":
        raise ValueError(f'importance goes with method="crossget", not {method!r}')
    schedule, site = schedule_of(r), _site_of(model)
    if cross_tokens is not None:
        _check_cross_tokens(cross_tokens, site, method=method, others=(importance, clips))
    if protected is not None and (not isinstance(protected, int) or protected < site.protected):
        raise ValueError(f"protected={protected!r}: expected a number of at least {site.protected}, the model's own")
    merging = Merging(
        schedule=schedule,
        layers=len(site.layers),
        protected=site.protected if protected is None else protected,
        method=method,
        importance=importance,
        proportional=proportional,
        follow=trace_source or restore,
        rotary=site.rotary,
        restore=restore,
        clips=clips,
        cross=cross_tokens,
    )
    _install(model, site, merging)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`; a model that is not patched stays as it is.

    Returns:
        The model.
    """
    if not is_patched(model):
        return model
    for handle in model.__dict__.pop("_merging_hooks"):
        handle.remove()
    for module in model.modules():
        if isinstance(module.__dict__.get("merging"), (Merging, LayerMerging)):
            del module.merging
            module.__class__ = getattr(type(module), "unpatched", type(module))
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` has been at it."""
    return isinstance(model.__dict__.get("merging"), Merging)


def merged_sources(model: nn.Module) -> Tensor:
    """Of the last forward pass, the place of every first token among those that left the last layer: int64 [B, N].

    Class tokens and registers are counted, first tokens and last. Of frames that were joined into clips: [clips, frames of
    a clip x N], one frame after another.

    Raises:
        ValueError: the model is not patched with `trace_source` or `restore`, or has not run.
    """
    merging = _merging_of(model)
    if merging.place is None:
        raise ValueError("no sources were followed: patch the model with trace_source=True, and run it")
    return merging.place


def merged_sizes(model: nn.Module) -> Tensor | None:
    """Of the last forward pass, how many first tokens each that left the last layer stands for, without padding.

    Returns:
        float32 [B, S, 1], 0 for padding alone; None where nothing was merged, and each stands for itself.
    """
    size = _merging_of(model).size
    return None if size is None else size.where(size >= 0.5, 0.0)


def _merging_of(model: nn.Module) -> Merging:
    if not is_patched(model):
        raise ValueError(f"this {type(model).__name__} does not merge tokens: patch it first")
    merging: Merging = model.__dict__["merging"]
    return merging


def _site_of(model: nn.Module) -> Site:
    """By the library that the model's class, or one that it derives from, comes from; neither is imported otherwise."""
    libraries = {each.__module__.partition(".")[0] for each in type(model).__mro__}
    for library in ("timm", "transformers"):
        if library in libraries:
            site: Site = import_module(f".patch_{library}", __package__).site_of(model)
            return site
    raise TypeError(f"a {type(model).__name__}: expected a model of timm or transformers, the tower itself")


def _check_cross_tokens(cross: CrossTokens, site: Site, *, method: str | Method, others: tuple[object, ...]) -> None:
    if method != "crossget" or any(each is not None for each in others):
        raise ValueError(f'cross_tokens go with method="crossget", not {method!r}, and not with importance or clips')
    if site.rotary or not site.protected:
        what = "rotary embeddings, and a cross token has no place" if site.rotary else "no class token to start from"
        raise ValueError(f"cross_tokens: the model has {what}")
    if cross.layers != len(site.layers):
        raise ValueError(f"cross_tokens of {cross.layers} layers: the model has {len(site.layers)}")


def _install(model: Any, site: Site, merging: Merging) -> None:
    handles = []
    for index, ((layer, merging_class), keys, heads) in enumerate(zip(site.layers, site.keys, site.heads, strict=True)):
        part = LayerMerging(merging, index, heads)
        layer.__class__ = merging_class
        layer.__dict__["merging"] = part
        handles.append(keys.register_forward_hook(part.record_keys))
    if site.pooling is not None and merging.proportional:
        hook = partial(_count_sizes, merging)
        handles.append(site.pooling.register_forward_pre_hook(hook, with_kwargs=True))
    if site.model_class is not None:
        model.__class__ = site.model_class
    model.__dict__["merging"] = merging
    model.__dict__["_merging_hooks"] = handles


def _count_sizes(
    merging: Merging, module: nn.MultiheadAttention, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Any]] | None:
    """A forward pre-hook of an attention [B, L, C] to [B, S, C] that pools merged tokens."""
    query, key = args[:2]
    if merging.size is None or merging.size.shape[:2] != key.shape[:2]:
        return None
    bias = size_bias(merging.size, query.dtype).to(query.dtype)
    mask = bias.repeat_interleave(module.num_heads, 0).unsqueeze(1).expand(-1, query.shape[1], -1)
    return args, {**kwargs, "attn_mask": mask}
