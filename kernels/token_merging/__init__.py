"""Token merging: fewer tokens, nearly the same answer."""

from . import cpp_backend as cpp_backend  # registers its kernels
from .crossget import complete_graph_matching, complete_graph_soft_matching
from .matching import Matching
from .merging import Merge, Unmerge, merge_source, merge_tokens, merge_wavg
from .pitome import pitome_margin, pitome_matching, pitome_soft_matching
from .tome import (
    bipartite_matching,
    bipartite_soft_matching,
    kth_bipartite_soft_matching,
    random_bipartite_soft_matching,
)

__all__ = [
    "Matching",
    "Merge",
    "Unmerge",
    "bipartite_matching",
    "bipartite_soft_matching",
    "complete_graph_matching",
    "complete_graph_soft_matching",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_tokens",
    "merge_wavg",
    "pitome_margin",
    "pitome_matching",
    "pitome_soft_matching",
    "random_bipartite_soft_matching",
]
