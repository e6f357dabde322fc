"""Zero-shot evaluation: retrieval, classification, diagnostics, tables and contact sheets."""

from .classification import ClassificationConfig, ClassificationResult, classify, zero_shot_weights
from .contact_sheet import ContactRow, draw_contact_sheet
from .diagnostics import Diagnostics, diagnose
from .embed import SplitEmbeddings, embed_split, make_encoder
from .equivalence import IdCeiling, id_ceiling, match_keys
from .packed import PackedTokens
from .retrieval import (
    Keys,
    RetrievalMetrics,
    RetrievalResult,
    rank_metrics,
    ranks_by,
    retrieval_metrics,
    retrieval_ranks,
)
from .run import SplitResult, SubsetResult, evaluate_split, score_split
from .scorers import PooledScorer, RerankScorer, Scores, Scoring, Side, TokenScorer
from .sheet_rows import draw_retrieval_sheet
from .table import print_results, read_json, to_markdown, write_json
from .topk import topk_scores

__all__ = [
    "ClassificationConfig",
    "ClassificationResult",
    "ContactRow",
    "Diagnostics",
    "IdCeiling",
    "Keys",
    "PackedTokens",
    "PooledScorer",
    "RerankScorer",
    "RetrievalMetrics",
    "RetrievalResult",
    "Scores",
    "Scoring",
    "Side",
    "SplitEmbeddings",
    "SplitResult",
    "SubsetResult",
    "TokenScorer",
    "classify",
    "diagnose",
    "draw_contact_sheet",
    "draw_retrieval_sheet",
    "embed_split",
    "evaluate_split",
    "id_ceiling",
    "make_encoder",
    "match_keys",
    "print_results",
    "rank_metrics",
    "ranks_by",
    "read_json",
    "retrieval_metrics",
    "retrieval_ranks",
    "score_split",
    "to_markdown",
    "topk_scores",
    "write_json",
    "zero_shot_weights",
]
