"""Control flow of a kernel: its loops, and which way through it one tile takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from .machine_code import Block, Instruction


class _Stretch(NamedTuple):
    """A piece of a way: FLOPs and instructions on it, and (block, times) of what it runs through."""

    flops: int
    issued: int
    blocks: tuple[tuple[int, int], ...]

    def then(self, other: _Stretch) -> _Stretch:
        return _Stretch(self.flops + other.flops, self.issued + other.issued, self.blocks + other.blocks)

    def repeated(self, times: int) -> _Stretch:
        return _Stretch(self.flops * times, self.issued * times, tuple((b, n * times) for b, n in self.blocks))


_NOTHING = _Stretch(0, 0, ())


class Flow:
    """The graph of a kernel's blocks.

    Attributes:
        order: blocks that are reached from the entry, each before those that it leads to, loops apart.
        loops: header -> blocks, of every natural loop.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self._blocks = blocks
        self.order = _reverse_postorder(0, lambda b: blocks[b].successors)
        self.loops = self._natural_loops()

    def _natural_loops(self) -> dict[int, set[int]]:
        predecessors: dict[int, list[int]] = {b: [] for b in self.order}
        for b in self.order:
            for s in self._blocks[b].successors:
                predecessors[s].append(b)
        dominators = self._dominators(predecessors)
        loops: dict[int, set[int]] = {}
        for latch in self.order:
            for header in self._blocks[latch].successors:
                if header in dominators[latch]:
                    body, todo = loops.setdefault(header, {header}), [latch]
                    while todo:
                        b = todo.pop()
                        if b not in body:
                            body.add(b)
                            todo += predecessors[b]
        return loops

    def _dominators(self, predecessors: Mapping[int, list[int]]) -> dict[int, set[int]]:
        found = {b: set(self.order) for b in self.order}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for b in self.order[1:]:
                new = set.intersection(*(found[p] for p in predecessors[b])) | {b}
                changed |= new != found[b]
                found[b] = new
        return found

    def main_loop(self, weight: Callable[[Instruction], float]) -> int | None:
        """Header of the outermost loop whose instructions weigh most; None if none weighs anything."""
        total = {h: sum(weight(i) for b in body for i in self._blocks[b].code) for h, body in self.loops.items()}
        outer = [h for h in total if total[h] and not any(self.loops[h] < body for body in self.loops.values())]
        return max(outer, key=lambda h: total[h], default=None)

    def way(self, trips: Mapping[int, int], *, through: int = 0, dearest: bool = False) -> dict[int, int]:
        """{block: times} on the way of fewest (most) instructions among those that do all the matrix work.

        A loop runs as often as `trips` says of its header, else once; of branches that exclude each other one is
        taken. The way leads through the block `through`.
        """
        times: dict[int, int] = {}
        for b, n in _Collapsed(self, self._blocks, trips, dearest).best(through).blocks:
            times[b] = times.get(b, 0) + n
        return times


class _Collapsed:
    """The graph with each loop, innermost first, drawn together into its header. What is left has no circle."""

    def __init__(self, flow: Flow, blocks: list[Block], trips: Mapping[int, int], dearest: bool) -> None:
        self._sign = -1 if dearest else 1
        self._stretch = {b: _of_block(b, blocks[b]) for b in flow.order}
        self._successors = {b: set(blocks[b].successors) for b in flow.order}
        self._home = {b: b for b in flow.order}
        for header, body in sorted(flow.loops.items(), key=lambda each: len(each[1])):
            self._collapse(header, body, trips.get(header, 1))

    def _collapse(self, header: int, body: set[int], trips: int) -> None:
        members = {self._home[b] for b in body}
        best = self._reach(header, members)
        latches = [best[b] for b in members if header in self._successors[b] and b in best]
        self._stretch[header] = min(latches, key=self._rank).repeated(trips)
        leaving = {s for b in members for s in self._successors[b]} - members
        for b in members - {header}:
            del self._successors[b]
        self._successors[header] = leaving
        for b, home in self._home.items():
            if home in members:
                self._home[b] = header

    def best(self, through: int) -> _Stretch:
        nodes = set(self._successors)
        middle = self._home[through]
        head, reached = self._reach(0, nodes)[middle], self._reach(middle, nodes)
        tail = min((reached[b] for b in reached if not self._successors[b]), key=self._rank)
        # The block in the middle ends the first half and begins the second.
        twice = self._stretch[middle]
        return _Stretch(
            head.flops + tail.flops - twice.flops,
            head.issued + tail.issued - twice.issued,
            head.blocks + tail.blocks[len(twice.blocks) :],
        )

    def _reach(self, start: int, nodes: set[int]) -> dict[int, _Stretch]:
        """The best way from `start` to every node, itself included; edges back to `start` are not taken."""
        order = _reverse_postorder(start, lambda b: [s for s in self._successors[b] if s in nodes and s != start])
        rank = {b: k for k, b in enumerate(order)}
        best = {start: self._stretch[start]}
        for b in order:
            for s in self._successors[b]:
                if s in rank and rank[s] > rank[b]:
                    found = best[b].then(self._stretch[s])
                    if s not in best or self._rank(found) < self._rank(best[s]):
                        best[s] = found
        return best

    def _rank(self, stretch: _Stretch) -> tuple[int, int]:
        return -stretch.flops, self._sign * stretch.issued


def _of_block(b: int, block: Block) -> _Stretch:
    return _Stretch(sum(each.flops for each in block.code), len(block.code), ((b, 1),))


def _reverse_postorder(start: int, successors: Callable[[int], list[int]]) -> list[int]:
    order, seen, stack = [], {start}, [(start, iter(successors(start)))]
    while stack:
        node, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors(following))))
    return order[::-1]
