"""A batch of pairs over one or several ranks: what a loss asks of its rows and columns is written once for both cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import select_backend
from ..contrastive import Diagonal, DifferentId, Reduction, SameId, Teacher
from ..contrastive.arguments import factor
from ..contrastive.operator import reduced
from ..contrastive.sharded import NO_EXTRA, Extra
from ..distributed import Exchange, Shards, gather, gather_counts, gather_ids
from .positives import row_scores


@dataclass(eq=False)
class View:
    """One similarity matrix of a batch, x its rows and y its columns, as the reductions of a direction see it.

    On one rank a single view serves both directions. On several the rows of this rank meet all columns in one view, all
    rows meet the columns of this rank in another; each direction is asked for in the view where its owners are this rank's.
    In a ring one view serves both again: it holds this rank's part of everything, and rules name positions in the whole.

    Attributes:
        x, y: features [N, D] and [M, D].
        start: position of the first owner, this rank's, among the pairs of the whole batch.
        own: the pairs themselves, row i with its column.
        x_ids, y_ids: int64 [N] and [M], or None.
        teachers: similarities of the same pairs by other embeddings.
    """

    x: Tensor
    y: Tensor
    start: int
    own: Diagonal
    x_ids: Tensor | None = None
    y_ids: Tensor | None = None
    teachers: tuple[Teacher, ...] = ()

    @property
    def same(self) -> SameId:
        """The pairs whose ids are equal."""
        assert self.x_ids is not None
        assert self.y_ids is not None
        return SameId(self.x_ids, self.y_ids)

    @property
    def different(self) -> DifferentId:
        assert self.x_ids is not None
        assert self.y_ids is not None
        return DifferentId(self.x_ids, self.y_ids)


#: What a loss asks of one direction of a view.
Ask = Callable[[View], Sequence[Reduction]]
#: Row bias and column bias of a view.
Biases = Callable[[View], tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Side:
    """One modality of a batch.

    Attributes:
        features: [n, D], this rank's.
        ids: int64 [n], or None.
        taught: for each teacher its embeddings [n, D'] of this modality; no gradient goes to them.
    """

    features: Tensor
    ids: Tensor | None = None
    taught: Sequence[Tensor] = ()

    def gathered(self, exchange: Exchange) -> tuple[Shards, Side]:
        """The whole batch's, with the exact gradient of the features."""
        taught = [each.detach() for each in self.taught]
        said = "features" if self.ids is None else "features with ids"
        shards, (features, *taught) = gather(
            self.features, *taught, group=exchange.group, wire_dtype=exchange.wire_dtype, said=said
        )
        return shards, Side(features, None if self.ids is None else gather_ids(self.ids, shards), taught)

    def with_extra(self, extra: Side | None) -> Side:
        """Candidates that belong to no pair behind those that do."""
        if extra is None:
            return self
        if (self.ids is None) != (extra.ids is None) or len(self.taught) != len(extra.taught):
            raise ValueError(
                "extra candidates need what the batch has: ids where it has ids, an embedding by each of its "
                f"{len(self.taught)} teachers"
            )
        return Side(
            torch.cat([self.features, extra.features]),
            None if self.ids is None or extra.ids is None else torch.cat([self.ids, extra.ids]),
            [torch.cat(both) for both in zip(self.taught, extra.taught, strict=True)],
        )


@dataclass(eq=False)
class PairBatch:
    """Pairs (x_i, y_i), spread over the ranks of a group, and the reductions of their similarity.

    Args:
        x, y: the two modalities, aligned by position; or, for a loss that finds its pairs by id alone, of any lengths.
        exchange: as `ContrastiveLoss._exchange()` gives it; None for one rank.
        teacher_scales: of each teacher, a float or a tensor of shape [] or [1].
        x_extra, y_extra: candidates without a partner, of which each rank passes its own: more rows in the reductions
            of columns, more columns in those of rows.
    """

    x: Side
    y: Side
    exchange: Exchange | None = None
    teacher_scales: Sequence[float | Tensor] = ()
    x_extra: Side | None = None
    y_extra: Side | None = None
    shards: Shards = field(init=False)
    y_shards: Shards = field(init=False)

    def __post_init__(self) -> None:
        self._whole: tuple[Side, Side] | None = None
        self.shards = Shards((self.x.features.shape[0],))
        self.y_shards = Shards((self.y.features.shape[0],))
        if self.rings:
            device = self.x.features.device
            self.shards, self.y_shards = (
                gather_counts(len(side.features), device=device, group=self.group) for side in (self.x, self.y)
            )
        elif self.exchange is not None:
            self._gather_both(self.exchange)
            # In one order on every rank, whatever is asked for later.
            for name in ("x_extra", "y_extra"):
                extra = getattr(self, name)
                if extra is not None:
                    setattr(self, name, extra.gathered(self.exchange)[1])

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.exchange is None else self.exchange.group

    @property
    def rings(self) -> bool:
        """Whether shards travel in a ring."""
        # The reference has no ring of its own.
        return (
            self.exchange is not None
            and self.exchange.strategy == "ring"
            and select_backend(self.x.features.device)[0] != "reference"
        )

    def _gather_both(self, exchange: Exchange) -> tuple[Side, Side]:
        self.shards, x = self.x.gathered(exchange)
        self.y_shards, y = self.y.gathered(exchange)
        self._whole = x, y
        return self._whole

    @property
    def whole(self) -> tuple[Side, Side]:
        """x and y of all ranks, with the exact gradient; without the extra candidates. A ring gathers them for this alone."""
        if self._whole is None and self.exchange is not None:
            return self._gather_both(self.exchange)
        return self._whole or (self.x, self.y)

    def reduce(
        self,
        *,
        scale: float | Tensor,
        bias: float | Tensor = 0.0,
        rows: Ask | None = None,
        cols: Ask | None = None,
        memory_budget: int | None = None,
        biases_of: Biases | None = None,
        **biases: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Reductions of S = scale x y^T + bias: of this rank's rows over all columns, and of its columns over all rows.

        Args:
            scale, bias, memory_budget: as in `similarity_reduce`.
            rows, cols: what to ask; None: nothing of that direction.
            biases_of: row and column bias as a function of a view's features, on any number of ranks.
            biases: row_bias, col_bias, one for each of this rank's x or y; on several ranks row_bias with `rows` alone,
                col_bias with `cols` alone; none with extra candidates.

        Returns:
            (row results, column results) of this rank's owners alone, each as asked for.
        """
        n = self.x.features.shape[0]
        given: dict[str, object] = {"scale": scale, "bias": bias, "memory_budget": memory_budget, **biases}
        if self.rings:
            return self._reduce_in_ring(rows, cols, given, biases_of)
        if self._whole is None and (self.x_extra is None or self.y_extra is None or rows is None or cols is None):
            # In one sweep. A direction that is not asked for needs no candidates either.
            x = self.x.with_extra(self.x_extra if cols is not None else None)
            y = self.y.with_extra(self.y_extra if rows is not None else None)
            view = self._view(x, y, 0, Diagonal())
            of_rows, of_cols = _reduced(view, rows, cols, given, biases_of)
            return _first(of_rows, n), _first(of_cols, self.y.features.shape[0])
        all_x, all_y = self.whole
        start = self.shards.start
        of_rows = of_cols = ()
        if rows is not None:
            view = self._view(self.x, all_y.with_extra(self.y_extra), start, Diagonal(start))
            of_rows, _ = _reduced(view, rows, None, given, biases_of)
        if cols is not None:
            view = self._view(all_x.with_extra(self.x_extra), self.y, start, Diagonal(-start))
            _, of_cols = _reduced(view, None, cols, given, biases_of)
        return of_rows, of_cols

    def _reduce_in_ring(
        self, rows: Ask | None, cols: Ask | None, given: dict[str, object], biases_of: Biases | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        x_extra, y_extra = self.x_extra if cols is not None else None, self.y_extra if rows is not None else None
        view = self._view(self.x.with_extra(x_extra), self.y.with_extra(y_extra), self.shards.start, Diagonal())
        extra = Extra(*(0 if each is None else len(each.features) for each in (x_extra, y_extra)))
        return _reduced(view, rows, cols, given, biases_of, self.exchange, extra)

    def teacher_scores(self) -> list[Tensor]:
        """T_ii of this rank's pairs by each teacher, [n], as exact as `PairScore`; no gradient."""
        # In the dtype of the features, as the sweep multiplies them.
        narrow = torch.promote_types(self.x.features.dtype, self.y.features.dtype)
        dtype, device = torch.promote_types(narrow, torch.float32), self.x.features.device
        with torch.no_grad():
            return [
                row_scores(x.to(narrow), y.to(narrow), factor(scale, "a teacher's logit scale", dtype, device))
                for x, y, scale in zip(self.x.taught, self.y.taught, self.teacher_scales, strict=True)
            ]

    def _view(self, x: Side, y: Side, start: int, own: Diagonal) -> View:
        teachers = tuple(
            Teacher(of_x, of_y, scale)
            for of_x, of_y, scale in zip(x.taught, y.taught, self.teacher_scales, strict=True)
        )
        return View(x.features, y.features, start, own, x.ids, y.ids, teachers)


def _reduced(
    view: View,
    rows: Ask | None,
    cols: Ask | None,
    given: dict[str, object],
    biases_of: Biases | None,
    exchange: Exchange | None = None,
    extra: Extra = NO_EXTRA,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    if biases_of is not None:
        given = given | dict(zip(("row_bias", "col_bias"), biases_of(view), strict=True))
    asked = {name: ask(view) for name, ask in (("rows", rows), ("cols", cols)) if ask is not None}
    return reduced(exchange, extra, view.x, view.y, **given, **asked)  # type: ignore[arg-type]


def _first(results: tuple[Tensor, ...], owners: int) -> tuple[Tensor, ...]:
    return tuple([each if each.shape[0] == owners else each[:owners] for each in results])
