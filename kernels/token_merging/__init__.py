"""Token merging: fewer tokens, nearly the same answer."""

from .attention import AttentionTo, fold_size, proportional_attention
from .crossget import complete_graph_matching, complete_graph_soft_matching
from .matching import Matching
from .merging import Merge, Unmerge, merge_source, merge_tokens, merge_wavg
from .patching import is_patched, merged_sizes, merged_sources, patch, unpatch
from .pitome import pitome_margin, pitome_matching, pitome_soft_matching
from .schedules import (
    ConstantR,
    FlopsBudget,
    KeepRatio,
    LinearR,
    Schedule,
    TargetTokens,
    schedule_of,
    tokens_per_layer,
    transformer_flops,
)
from .tome import (
    bipartite_matching,
    bipartite_soft_matching,
    kth_bipartite_soft_matching,
    random_bipartite_soft_matching,
)

__all__ = [
    "AttentionTo",
    "ConstantR",
    "FlopsBudget",
    "KeepRatio",
    "LinearR",
    "Matching",
    "Merge",
    "Schedule",
    "TargetTokens",
    "Unmerge",
    "bipartite_matching",
    "bipartite_soft_matching",
    "complete_graph_matching",
    "complete_graph_soft_matching",
    "fold_size",
    "is_patched",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_tokens",
    "merge_wavg",
    "merged_sizes",
    "merged_sources",
    "patch",
    "pitome_margin",
    "pitome_matching",
    "pitome_soft_matching",
    "proportional_attention",
    "random_bipartite_soft_matching",
    "schedule_of",
    "tokens_per_layer",
    "transformer_flops",
    "unpatch",
]
