"""Which rows `pytest benchmarks` runs: in 25 minutes on two cores those that the README shows, with BENCH_FULL=1 all.

Rows that are asked for by `-k`, by file or by name run whether they are listed here or not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase

import pytest

FULL = os.environ.get("BENCH_FULL") == "1"

#: By file, names as pytest prints them, with wildcards; of a file that is not here all rows run.
SHORT: Mapping[str, tuple[str, ...]] = {
    "test_contrastive.py": (
        "test_clip",
        "test_clip_bf16",
        "test_siglip",
        "test_linear_cross_entropy",
        "test_clip_large_batch",
        "test_clip_batches*",
        "test_clip_sizes*-768]",
        "test_siglip_sizes*-768]",
    ),
    "test_late_interaction.py": (
        "test_maxsim*",
        "test_filip",
        "test_colbert",
    ),
    "test_objectives.py": (
        "test_objective[[]MultiPositiveLoss mean, all]",
        "test_objective[[]DistillClipLoss 2 teachers]",
        "test_objective[[]MatryoshkaLoss]",
    ),
    "test_over_ranks.py": ("test_over_ranks*",),
    "test_sentence_transformers.py": ("test_sentence_transformers",),
    "test_token_merging.py": ("test_token_merging*forward + backward]",),
    "test_token_merging_vit.py": ("test_vit*-16]",),
}


def is_short(item: pytest.Item) -> bool:
    """Whether a row belongs to the short run."""
    names = SHORT.get(item.path.name, ("*",))
    return any(fnmatchcase(item.name, name) for name in names)


def asked_for(config: pytest.Config) -> bool:
    """Whether the rows were chosen by whoever started pytest."""
    named = any("::" in each or each.endswith(".py") for each in config.args)
    return FULL or named or bool(config.option.keyword or config.option.markexpr)
