"""Pair rules in one panel of scores, for the torch backend: which entries a rule names, to overwrite or to negate.

A rule that names at most one pair of each row, or whole columns, is a view or a gather; the others make a boolean
mask of the panel's own size, which stays in cache like the panel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .reductions import Above, ColumnRange, Diagonal, DifferentId, PairRule, SameId, Target, Teacher


@dataclass
class Panel:
    """Scores of rows `rows` against columns `cols`, and where they lie in S; of the same pairs, the teachers' scores.

    Where nothing looks at S itself its scores are not made, and may be anything.
    """

    scores: Tensor
    rows: slice
    cols: slice
    taught: dict[Teacher, Tensor] = field(default_factory=dict)

    def of(self, teacher: Teacher | None) -> Tensor:
        """The scores of a teacher, or, for None, those of S."""
        return self.scores if teacher is None else self.taught[teacher]

    def part(self, rows: slice, cols: slice) -> Panel:
        """Rows and columns counted from the panel's first."""
        first, left = self.rows.start, self.cols.start
        scores = self.scores[rows, cols]
        return Panel(
            scores,
            slice(first + rows.start, first + rows.start + scores.shape[0]),
            slice(left + cols.start, left + cols.start + scores.shape[1]),
            {teacher: each[rows, cols] for teacher, each in self.taught.items()},
        )

    def diagonal(self, pair: Diagonal, scores: Tensor | None = None) -> Tensor:
        """View of the entries, of the panel's scores or of others of its shape, at the pairs of `pair`."""
        return torch.diagonal(
            self.scores if scores is None else scores, pair.offset + self.rows.start - self.cols.start
        )

    def owners(self, dim: int) -> slice:
        """Whom a reduction over `dim` gives results for, of this panel: its rows (1) or its columns (0)."""
        return self.rows if dim == 1 else self.cols

    def along(self, weights: Tensor, dim: int) -> Tensor:
        """The entries, of a vector along the reduced axis, that belong to this panel."""
        return weights[self.owners(1 - dim)]

    def targets(self, pair: Target) -> tuple[Tensor, Tensor]:
        """For each row the panel's column that it names, [rows, 1], and whether that lies in this panel."""
        columns = pair.columns[self.rows].unsqueeze(1) - self.cols.start
        inside = (columns >= 0) & (columns < self.cols.stop - self.cols.start)
        return columns.clamp_(0, self.cols.stop - self.cols.start - 1), inside


class Selection:
    """The pairs of a panel that at least one of several rules names. Made before the scores are changed."""

    def __init__(self, rules: tuple[PairRule, ...], panel: Panel, dim: int, zeros: Tensor | None = None) -> None:
        """`zeros`, bool along the reduced axis, names the pairs whose weight is 0 as well."""
        self._panel = panel
        self._sparse = [rule for rule in rules if isinstance(rule, (Diagonal, Target, ColumnRange))]
        self._mask: Tensor | None = None
        for rule in rules:
            if not isinstance(rule, (Diagonal, Target, ColumnRange)):
                mask = _mask(rule, panel, dim)
                self._mask = mask if self._mask is None else self._mask.logical_or_(mask)
        if zeros is not None:
            named = panel.along(zeros, dim).unsqueeze(1 - dim)
            self._mask = named if self._mask is None else self._mask.logical_or_(named)

    def fill_(self, scores: Tensor, value: float) -> None:
        """Overwrite the named entries of a tensor of the panel's shape."""
        for rule in self._sparse:
            if isinstance(rule, Target):
                columns, inside = self._panel.targets(rule)
                scores.scatter_(1, columns, scores.gather(1, columns).masked_fill_(inside, value))
            else:
                self._view(scores, rule).fill_(value)
        if self._mask is not None:
            scores.masked_fill_(self._mask, value)

    def negate_(self, scores: Tensor) -> None:
        """Negate the named entries, each once, however many rules name it."""
        if self._mask is None and len(self._sparse) == 1:
            (rule,) = self._sparse
            if isinstance(rule, Target):
                columns, inside = self._panel.targets(rule)
                kept = scores.gather(1, columns)
                scores.scatter_(1, columns, torch.where(inside, -kept, kept))
            else:
                self._view(scores, rule).neg_()
            return
        named = torch.zeros_like(scores, dtype=torch.bool)
        self.fill_(named, True)
        torch.where(named, -scores, scores, out=scores)

    def _view(self, scores: Tensor, rule: Diagonal | ColumnRange) -> Tensor:
        if isinstance(rule, Diagonal):
            return self._panel.diagonal(rule, scores)
        width = scores.shape[1]
        start = min(max(rule.start - self._panel.cols.start, 0), width)
        return scores[:, start : max(start, min(rule.stop - self._panel.cols.start, width))]


def _mask(rule: PairRule, panel: Panel, dim: int) -> Tensor:
    """bool, of the panel's shape."""
    match rule:
        case SameId():
            return rule.rows[panel.rows].unsqueeze(1) == rule.cols[panel.cols]
        case DifferentId():
            return rule.rows[panel.rows].unsqueeze(1) != rule.cols[panel.cols]
        case Above():
            mask = panel.scores > rule.thresholds[panel.owners(dim)].unsqueeze(dim)
            Selection((rule.pair,), panel, dim).fill_(mask, False)
            return mask
    raise TypeError(f"{rule!r}: the operator resolves it before a backend sees it")
