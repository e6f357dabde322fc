"""Late interaction: similarities between sets of tokens whose products are never stored."""

from .maxsim import filip_similarity, maxsim, maxsim_pairs, maxsim_varlen
from .pooling import AttentionPooling, LogSumExpPooling, MaxPooling, Pooling, SoftmaxPooling, TopMeanPooling
from .project_max import project_max
from .scores import token_scores
from .selection import most_similar_tokens, take_tokens, top_tokens
from .topk import TopDocuments, maxsim_topk

__all__ = [
    "AttentionPooling",
    "LogSumExpPooling",
    "MaxPooling",
    "Pooling",
    "SoftmaxPooling",
    "TopDocuments",
    "TopMeanPooling",
    "filip_similarity",
    "maxsim",
    "maxsim_pairs",
    "maxsim_topk",
    "maxsim_varlen",
    "most_similar_tokens",
    "project_max",
    "take_tokens",
    "token_scores",
    "top_tokens",
]
