"""How the ranks of a group share what they embed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

STRATEGIES = ("gather", "ring")
_WIRE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Exchange:
    """The ranks that a loss runs over, and how their features meet.

    Attributes:
        group: the process group, of at least two ranks.
        strategy: "gather": every rank holds all ranks' features while the loss runs. "ring": each rank keeps its rows and
            lends its columns, which travel from rank to rank while the tiles of the shard at hand are computed; memory
            does not grow with the number of ranks, and for a loss of both directions each pair is multiplied once, by gather
            twice.
        wire_dtype: features travel in this dtype; None: in their own. Their gradients travel in float32 always.
        node_size: ranks of one node, consecutive in the group, whose number it divides. A ring then goes round inside
            every node before shards move on to the next one: one step in node_size waits for the network between nodes,
            over which all ranks of a node send at once, instead of every step, in which one of them does.
    """

    group: dist.ProcessGroup
    strategy: str = "gather"
    wire_dtype: torch.dtype | None = None
    node_size: int | None = None

    def __post_init__(self) -> None:
        check_exchange(self.strategy, self.wire_dtype, self.node_size)
        world = dist.get_world_size(self.group)
        if self.node_size is not None and world % self.node_size:
            raise ValueError(
                f"node_size={self.node_size}, but the group has {world} ranks: expected a number that divides them"
            )


def check_exchange(strategy: str, wire_dtype: torch.dtype | None, node_size: int | None) -> None:
    """Raise unless they are what `Exchange` takes."""
    if strategy not in STRATEGIES:
        listed = " or ".join(f'"{each}"' for each in STRATEGIES)
        raise ValueError(f"strategy={strategy!r}: expected {listed}")
    if wire_dtype is not None and wire_dtype not in _WIRE_DTYPES:
        listed = ", ".join(str(each) for each in _WIRE_DTYPES)
        raise ValueError(f"wire_dtype={wire_dtype!r}: expected None or one of {listed}")
    if node_size is not None and (not isinstance(node_size, int) or node_size < 1):
        raise ValueError(f"node_size={node_size!r}: expected None or a positive number of ranks")


# By the default group too, which may be destroyed and made anew.
_nodes: dict[tuple[object, int], dist.ProcessGroup] = {}


def node_group(node_size: int | None = None) -> dist.ProcessGroup:
    """The ranks of this process' node, for a loss whose negatives stay inside a node. A collective of all ranks.

    Args:
        node_size: ranks of a node, consecutive; None: LOCAL_WORLD_SIZE, which torchrun and deepspeed set.

    Raises:
        ValueError: neither is given, or the number does not divide the ranks.
    """
    if node_size is None:
        given = os.environ.get("LOCAL_WORLD_SIZE", "")
        if not given.isdigit() or int(given) < 1:
            raise ValueError(
                'scope="node": LOCAL_WORLD_SIZE is not set; start with torchrun or deepspeed, or give node_size='
            )
        node_size = int(given)
    world = dist.get_world_size()
    if world % node_size:
        raise ValueError(f"nodes of {node_size} ranks do not divide {world} ranks: give node_size=, or a group")
    key = (dist.group.WORLD, node_size)
    if key not in _nodes:
        mine, _ = dist.new_subgroups(group_size=node_size)
        assert mine is not None
        _nodes[key] = mine
    return _nodes[key]
