"""Exact gradients across ranks: an all-gather of unequal shards, shards that travel in a ring, and the mean of a loss.

The convention, which every loss keeps (L is the loss of the whole batch, W the number of ranks): rank r returns
the value L with the gradient of its share L_r = W / N_global * (sum of its own terms), so that L is the mean of
the L_r also on unequal shards. Gradients of rows that travel are summed over ranks. The mean over ranks that DDP
and DeepSpeed take is then the gradient that one process would compute on the whole batch.

All functions here are collectives: every rank of the group calls them, in the same order, also with an empty
shard.
"""

from .exchange import STRATEGIES, Exchange, node_group
from .gathering import gather, gather_counts, gather_ids, gather_tokens
from .means import global_mean
from .prediction import predicted_traffic
from .ring import Ring
from .shards import Shards, find_group
from .traffic import Traffic, count_traffic

__all__ = [
    "STRATEGIES",
    "Exchange",
    "Ring",
    "Shards",
    "Traffic",
    "count_traffic",
    "find_group",
    "gather",
    "gather_counts",
    "gather_ids",
    "gather_tokens",
    "global_mean",
    "node_group",
    "predicted_traffic",
]
