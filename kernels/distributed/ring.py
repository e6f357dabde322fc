"""Shards that visit every rank of a group, one hop at a time, and what they bring home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from .exchange import Exchange
from .traffic import record


class Field(NamedTuple):
    """What belongs to a shard: what it is counted as (`Traffic.sent`), a tensor [rows, ...], and every rank's rows."""

    purpose: str
    tensor: Tensor
    sizes: Sequence[int]


#: What a rank makes of a visiting shard: (its owner, its fields) -> tensors [rows, ...] for the way home.
Visit = Callable[[int, list[Tensor]], list[Tensor]]
#: Joins what a shard brought along and what this rank has made of it; may write to either.
Join = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def owner(rank: int, step: int, world_size: int, node_size: int | None = None) -> int:
    """Whose shard a rank holds at a step of a ring that goes round inside each node before shards hop to the next."""
    size = node_size or world_size
    node, place = divmod(rank, size)
    between, inside = divmod(step, size)
    return (node - between) % (world_size // size) * size + (place - between * (size - 1) - inside) % size


class Ring:
    """The order in which shards visit the ranks of a group.

    At step t this rank works on the shard of rank `owner(t)`; `owner(0)` is this rank. With `node_size` the ring goes round
    inside each node before shards hop to the next node. Every rank sends one shard and receives one at each step.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.group = exchange.group
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)
        self._node = exchange.node_size or self.world_size

    def owner(self, step: int) -> int:
        """Whose shard this rank holds at a step."""
        return owner(self.rank, step, self.world_size, self._node)

    def circulate(
        self, fields: Sequence[Field], visit: Visit, join: Join, home: Sequence[tuple[str, Sequence[int]]]
    ) -> list[Tensor]:
        """Send this rank's shard round the group.

        While a rank works on one shard the next is on its way to it, and so is what the ranks before have made of the
        one at hand. Memory: two shards, and three times what they bring home.

        Args:
            fields: of this rank's shard; the other ranks' have the same dtypes and trailing dimensions.
            visit: called once for each shard, in this rank's order.
            join: called where the shard has been elsewhere before.
            home: purpose and every rank's rows of each result of `visit`; empty where it gives none.

        Returns:
            What all ranks have made of this rank's shard, joined.
        """
        here = [field.tensor.detach().contiguous() for field in fields]
        luggage: Transfer | None = None
        made: list[Tensor] = []
        for step in range(self.world_size):
            owner, last = self.owner(step), step == self.world_size - 1
            packet = None
            if not last:
                packet = self._send([f._replace(tensor=t) for f, t in zip(fields, here, strict=True)], step)
            made = visit(owner, here)
            if luggage is not None:
                made = join(luggage.received(), made)
            if home:
                carried = [Field(of[0], each.contiguous(), of[1]) for of, each in zip(home, made, strict=True)]
                luggage = self._send(carried, step)
            if packet is not None:
                here = packet.received()
        return luggage.received() if luggage is not None else made

    def _send(self, fields: Sequence[Field], step: int) -> Transfer:
        """Start the hop after a step: to the rank that works on this shard next, or home after the last step."""
        following = step + 1 if step < self.world_size - 1 else 0
        target = self._holder(self.owner(step), following)
        coming = self.owner(following)
        source = self._holder(coming, step)
        return Transfer(fields, coming, target, source, self.group)

    def _holder(self, owner: int, step: int) -> int:
        """Which rank holds the shard of `owner` at a step."""
        node, place = divmod(owner, self._node)
        between, inside = divmod(step, self._node)
        nodes = self.world_size // self._node
        return (node + between) % nodes * self._node + (place + between * (self._node - 1) + inside) % self._node


class Transfer:
    """Tensors on their way to one rank, and others, of the same kinds, on theirs from another."""

    def __init__(
        self, fields: Sequence[Field], coming: int, target: int, source: int, group: dist.ProcessGroup
    ) -> None:
        self._sent = [field.tensor for field in fields]  # kept until they are gone
        self._received = [each.new_empty(sizes[coming], *each.shape[1:]) for _, each, sizes in fields]
        to, origin = dist.get_global_rank(group, target), dist.get_global_rank(group, source)
        operations = []
        for field, incoming in zip(fields, self._received, strict=True):
            if field.tensor.numel():
                operations.append(dist.P2POp(dist.isend, field.tensor, to, group))
                record(field.purpose, field.tensor.nbytes)
            if incoming.numel():
                operations.append(dist.P2POp(dist.irecv, incoming, origin, group))
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def received(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        self._works = []
        self._sent = []
        return self._received
