"""Late interaction: similarities between sets of tokens whose products are never stored."""

from .conditioned import Context, conditioned_similarity
from .lexical import finite_tokens, flops_regulariser, lexical_vector, sparsemax
from .matching import bipartite_similarity
from .maxsim import filip_similarity, maxsim, maxsim_pairs, maxsim_varlen
from .mug import mug_similarity
from .pooling import AttentionPooling, LogSumExpPooling, MaxPooling, Pooling, SoftmaxPooling, TopMeanPooling
from .project_max import project_max
from .regions import region_max, span_means
from .scores import token_scores
from .selection import most_similar_tokens, take_tokens, top_tokens
from .soft_dtw import soft_dtw
from .token_reduction import TokenReduction
from .topk import TopDocuments, maxsim_topk
from .transport import ipot_distance, sinkhorn_similarity

__all__ = [
    "AttentionPooling",
    "Context",
    "LogSumExpPooling",
    "MaxPooling",
    "Pooling",
    "SoftmaxPooling",
    "TokenReduction",
    "TopDocuments",
    "TopMeanPooling",
    "bipartite_similarity",
    "conditioned_similarity",
    "filip_similarity",
    "finite_tokens",
    "flops_regulariser",
    "ipot_distance",
    "lexical_vector",
    "maxsim",
    "maxsim_pairs",
    "maxsim_topk",
    "maxsim_varlen",
    "most_similar_tokens",
    "mug_similarity",
    "project_max",
    "region_max",
    "sinkhorn_similarity",
    "soft_dtw",
    "span_means",
    "sparsemax",
    "take_tokens",
    "token_scores",
    "top_tokens",
]
