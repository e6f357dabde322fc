"""Every loss over embeddings on top of a small two-tower model, whose gradients DDP averages over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contenders import relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from objectives import OBJECTIVES, Beside, beside
from pairtile.kernels import (
    CircleLoss,
    ClipLoss,
    CoCaLoss,
    DebiasedContrastiveLoss,
    DecoupledContrastiveLoss,
    HardNegativeLoss,
    MultiPositiveLoss,
    SigLipLoss,
    SigLipPlusLoss,
    TripletLoss,
    use_backend,
)
from pairtile.kernels.distributed import STRATEGIES

WIDTH, LENGTH, VOCABULARY = 5, 3, 11


@dataclass
class Batch:
    """Inputs of the towers, and what a loss takes beside their features.

    Attributes:
        images, texts: [n, 6] and [n, 4], aligned.
        negative_images, negative_texts: [k, 6] and [k', 4].
        captions: int64 [n, LENGTH], 0 where a caption has ended.
        many_texts: [m, 4], not aligned: ids say which belong to an image.
        image_ids, text_ids: int64 [n] and [m].
        peers: of another model, [n, 3] each.
        private: [n, 2, WIDTH], negatives of each image's own.
        beside: teachers and so on.
    """

    images: Tensor
    texts: Tensor
    negative_images: Tensor
    negative_texts: Tensor
    captions: Tensor
    many_texts: Tensor
    image_ids: Tensor
    text_ids: Tensor
    peers: tuple[Tensor, Tensor]
    private: Tensor
    beside: Beside

    def to(self, dtype: torch.dtype) -> Batch:
        def converted(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(converted(each) for each in value)
            return value.to(dtype) if isinstance(value, Beside) or value.is_floating_point() else value

        return Batch(**{name: converted(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Shares:
    """How many images (and texts) of a batch each rank has, how many of the many texts, and of the negatives."""

    pairs: list[int]
    many_texts: list[int]
    negative_images: list[int]
    negative_texts: list[int]

    def part(self, batch: Batch, rank: int) -> Batch:
        def of(tensor: Tensor, sizes: list[int]) -> Tensor:
            return tensor.split(sizes)[rank]

        start = sum(self.pairs[:rank])
        return Batch(
            negative_images=of(batch.negative_images, self.negative_images),
            negative_texts=of(batch.negative_texts, self.negative_texts),
            many_texts=of(batch.many_texts, self.many_texts),
            text_ids=of(batch.text_ids, self.many_texts),
            peers=tuple(of(each, self.pairs) for each in batch.peers),
            beside=batch.beside.rows(start, start + self.pairs[rank]),
            **{
                name: of(getattr(batch, name), self.pairs)
                for name in ("images", "texts", "captions", "image_ids", "private")
            },
        )

    def of_groups(self, groups: list[list[int]]) -> Shares:
        """The same batch over groups of consecutive ranks."""
        return Shares(*([sum(sizes[rank] for rank in ranks) for ranks in groups] for sizes in vars(self).values()))


def shares_of(world: int) -> list[Shares]:
    """Equal shards; and unequal ones, of which some are empty."""
    uneven = [5, 0, 3, 1, 0, 2, 4, 1][:world] if world > 1 else [7]
    return [
        Shares([2] * world, [3] * world, [1] * world, [2] * world),
        Shares(uneven, [(3 * k) % 5 for k in range(1, world + 1)], [(k * 2) % 3 for k in range(world)], uneven[::-1]),
    ]


def whole_batch(shares: Shares) -> Batch:
    """In float64, of float32 numbers, so that rounding the inputs is nobody's error."""
    generator = torch.Generator().manual_seed(sum(shares.pairs))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    n, m = sum(shares.pairs), sum(shares.many_texts)
    captions = 1 + torch.arange(LENGTH * n).view(n, LENGTH) % (VOCABULARY - 1)
    captions[torch.arange(n) % 3 == 0, 1:] = 0
    return Batch(
        drawn(n, 6),
        drawn(n, 4),
        drawn(sum(shares.negative_images), 6),
        drawn(sum(shares.negative_texts), 4),
        captions,
        drawn(m, 4),
        torch.arange(n) % 4,
        torch.arange(m) % 6 - 1,
        (drawn(n, 3), drawn(n, 3)),
        drawn(n, 2, WIDTH),
        beside(shares.pairs, WIDTH),
    )


class Features(NamedTuple):
    """What the towers make of a batch."""

    x: Tensor
    y: Tensor
    many: Tensor
    negative_x: Tensor
    negative_y: Tensor
    scale: Tensor
    bias: Tensor
    hidden: Tensor
    vocabulary: Tensor


class Towers(nn.Module):
    """Linear towers, a captioner's decoder and vocabulary, a scale and a bias; the same on every rank."""

    def __init__(self, without: str = "") -> None:
        """`without`: parameters that a loss does not use, which DDP would wait for."""
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = nn.Linear(6, WIDTH), nn.Linear(4, WIDTH)
        self.decoder, self.vocabulary = nn.Linear(6, LENGTH * WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.log_scale, self.bias = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([-1.5]))
        for name in without.split():
            getattr(self, name).requires_grad_(False)

    def forward(self, batch: Batch) -> Features:
        def embedded(tower: nn.Module, inputs: Tensor) -> Tensor:
            return F.normalize(tower(inputs), dim=-1)

        return Features(
            embedded(self.image, batch.images),
            embedded(self.text, batch.texts),
            embedded(self.text, batch.many_texts),
            embedded(self.image, batch.negative_images),
            embedded(self.text, batch.negative_texts),
            self.log_scale.exp(),
            self.bias * 1,
            self.decoder(batch.images).view(-1, LENGTH, WIDTH),
            self.vocabulary.weight,
        )


class RankLoss(NamedTuple):
    """`make(**options)` is a loss, `call(loss, features, batch)` its value; `without` as in `Towers`."""

    make: Callable[..., nn.Module]
    call: Callable[[nn.Module, Features, Batch], Tensor]
    without: str = "bias decoder vocabulary"


def _by_id(make: Callable[..., nn.Module], numbers: int = 1, **own: Any) -> RankLoss:
    def call(loss: nn.Module, f: Features, b: Batch) -> Tensor:
        given = (f.scale, f.bias)[:numbers]
        return loss(f.x, f.many, *given, image_ids=b.image_ids, text_ids=b.text_ids)

    unused = ["log_scale bias ", "bias ", ""][numbers]
    return RankLoss(lambda **options: make(**own, **options), call, unused + "decoder vocabulary")


def _plain(make: Callable[..., nn.Module], **own: Any) -> RankLoss:
    return RankLoss(lambda **options: make(**own, **options), lambda loss, f, b: loss(f.x, f.y, f.scale))


_CLIP_OPTIONS = {"label_smoothing": 0.2, "direction_weights": (0.3, 1.1)}
_UNUSED = "decoder vocabulary"

LOSSES: dict[str, RankLoss] = {
    "clip": RankLoss(ClipLoss, lambda loss, f, b: loss(f.x, f.y, f.scale, f.bias), _UNUSED),
    "clip_negatives": RankLoss(
        lambda **options: ClipLoss(**_CLIP_OPTIONS, **options),
        lambda loss, f, b: loss(
            f.x, f.y, f.scale, negative_text_features=f.negative_y, negative_image_features=f.negative_x
        ),
    ),
    "siglip": RankLoss(SigLipLoss, lambda loss, f, b: loss(f.x, f.y, f.scale, f.bias), _UNUSED),
    "siglip_plus": _by_id(SigLipPlusLoss, numbers=2),
    "coca": RankLoss(
        lambda **options: CoCaLoss(2.0, 1.0, **options),
        lambda loss, f, b: sum(
            loss(f.x, f.y, None, b.captions, f.scale, hidden_states=f.hidden, vocab_weight=f.vocabulary)
        ),
        "bias",
    ),
    "decoupled": _plain(DecoupledContrastiveLoss, weighted=True, intra=True),
    "debiased": _plain(DebiasedContrastiveLoss, beta=0.5),
    "hard_negative": RankLoss(
        lambda **options: HardNegativeLoss(k=2, **options),
        lambda loss, f, b: loss(f.x, f.y, f.scale, negative_features=b.private),
    ),
    "hard_negative_one_way": _plain(HardNegativeLoss, k=None, direction_weights=(0.0, 1.0)),
    "triplet": _plain(TripletLoss),
    "triplet_hardest": RankLoss(
        lambda **options: TripletLoss(mining="hardest", peer_form="absolute", **options),
        lambda loss, f, b: loss(f.x, f.y, f.scale, peer_image_features=b.peers[0], peer_text_features=b.peers[1]),
    ),
    "circle": _by_id(CircleLoss, numbers=0, gamma=4.0),
    "multi_positive": _by_id(MultiPositiveLoss, direction_weights=(0.3, 1.1)),
    "multi_positive_mil_nce": _by_id(MultiPositiveLoss, positives="inside", denominator="mil_nce"),
    "multi_positive_others": _by_id(MultiPositiveLoss, denominator="others_excluded"),
}


def _objective(name: str) -> RankLoss:
    objective = OBJECTIVES[name]
    unused = "log_scale bias " if name.startswith("cacr") else "bias "
    return RankLoss(
        objective.make, lambda loss, f, b: objective.call(loss, f.x, f.y, f.scale, b.beside), unused + _UNUSED
    )


LOSSES |= {name: _objective(name) for name in OBJECTIVES}


def gradients(loss: RankLoss, batch: Batch, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    """The value, and the gradient of each parameter: after DDP's mean where there are several ranks."""
    towers = Towers(loss.without).to(dtype)
    model = DistributedDataParallel(towers) if "world_size" in options else towers
    value = loss.call(loss.make(**options), model(batch.to(dtype)), batch.to(dtype))
    value.backward()
    return {"value": value.detach()} | {n: p.grad for n, p in towers.named_parameters() if p.requires_grad}


def on_one_process(loss: RankLoss, shares: Shares, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of the whole batch by the dense formula."""
    batch = whole_batch(shares)
    starts = torch.tensor([sum(shares.pairs[:rank]) for rank in range(len(shares.pairs))])
    perm = batch.beside.perm + starts.repeat_interleave(torch.tensor(shares.pairs))
    batch = replace(batch, beside=replace(batch.beside, perm=perm))
    with use_backend("reference"):
        return gradients(loss, batch, dtype, {})


def errors_of(
    given: dict[str, Tensor], truth: dict[str, Tensor], dense: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """Of the value and each parameter (error, allowed): in float64 1e-10, in float32 as much as issue 8 allows."""
    # The gradient of a scale or a bias may pass through zero: what is small beside all others counts as they do.
    size = 1e-2 * float(torch.stack([each.norm() for key, each in truth.items() if key != "value"]).norm())
    found = {}
    for key, whole in truth.items():
        own = relative_error(dense[key], whole, size)
        allowed = 1e-10 if dtype == torch.float64 else max(1e-5, 2 * own)
        found[key] = relative_error(given[key], whole, size), allowed
    return found


def assert_losses_equal_one_process(
    names: list[str], rank: int, world: int, served: Sequence[tuple[str, torch.dtype]]
) -> float:
    """By every strategy, on equal and unequal shards; the largest error, on rank 0.

    Args:
        served: backends, and the dtype that each is tested in.
    """
    worst = 0.0
    for name in names:
        for shares in shares_of(world):
            truth, dense = (on_one_process(LOSSES[name], shares, each) for each in (torch.float64, torch.float32))
            part = shares.part(whole_batch(shares), rank)
            for backend, dtype in served:
                for strategy in STRATEGIES:
                    place = {"rank": rank, "world_size": world, "strategy": strategy}
                    with use_backend(backend):
                        given = gradients(LOSSES[name], part, dtype, place)
                    for key, (error, allowed) in errors_of(given, truth, dense, dtype).items():
                        label = f"{name}, {world} ranks, {shares.pairs}, {backend}, {strategy}: {key}"
                        assert error <= allowed, f"{label} {error:.2g} > {allowed:.2g}"
                        worst = max(worst, error)
    return worst
