"""Token merging: fewer tokens, nearly the same answer."""

# They register their kernels.
from . import cpp_backend as cpp_backend
from . import cuda_backend as cuda_backend
from . import triton_backend as triton_backend
from .attention import AttentionTo, fold_size, proportional_attention
from .clips import ClipMerging
from .cross_token import CrossTokens, cross_token_divergence
from .crossget import complete_graph_matching, complete_graph_soft_matching
from .drawing import draw_merged_regions
from .frames import join_frames, merge_frames, pool_windows
from .matching import Matching
from .merging import Merge, Unmerge, merge_source, merge_tokens, merge_wavg
from .patching import is_patched, merged_sizes, merged_sources, patch, unpatch
from .pitome import pitome_margin, pitome_matching, pitome_soft_matching
from .ranking import Ranking, bounding_boxes, rank_tokens
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
    "ClipMerging",
    "ConstantR",
    "CrossTokens",
    "FlopsBudget",
    "KeepRatio",
    "LinearR",
    "Matching",
    "Merge",
    "Ranking",
    "Schedule",
    "TargetTokens",
    "Unmerge",
    "bipartite_matching",
    "bipartite_soft_matching",
    "bounding_boxes",
    "complete_graph_matching",
    "complete_graph_soft_matching",
    "cross_token_divergence",
    "draw_merged_regions",
    "fold_size",
    "is_patched",
    "join_frames",
    "kth_bipartite_soft_matching",
    "merge_frames",
    "merge_source",
    "merge_tokens",
    "merge_wavg",
    "merged_sizes",
    "merged_sources",
    "patch",
    "pitome_margin",
    "pitome_matching",
    "pitome_soft_matching",
    "pool_windows",
    "proportional_attention",
    "random_bipartite_soft_matching",
    "rank_tokens",
    "schedule_of",
    "tokens_per_layer",
    "transformer_flops",
    "unpatch",
]
