"""Late interaction beside the libraries' CPU paths and the dense formulas, on the CPU.

    pytest benchmarks -k late
    .venv-peers/bin/python -m pytest benchmarks -k "late and colbert"    # beside PyLate itself, after `make peers`

README.md beside this file explains the columns and lists the environment variables.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from . import late_interaction as make
from .bars import faster_than, leaner_beyond_gradients, leaner_than, peak_below, share_of_floor
from .contrastive import eager
from .harness import Case, forward_alone, forward_and_backward
from .peers import missing_kernel
from .test_contrastive import FLOAT32_AGREEMENT, ROUNDS, VOCABULARY, _size
from .work import Work

DOCUMENTS = _size("DOCUMENTS", 1000)
CORPUS = _size("CORPUS", 20_000)
FILIP_BATCH, LARGE_FILIP_BATCH = _size("FILIP_BATCH", 64), _size("LARGE_FILIP_BATCH", 256)
COLBERT_BATCH = _size("COLBERT_BATCH", 128)
TEXTS = _size("TEXTS", 256)
#: Calls of several seconds.
FEW_ROUNDS = min(ROUNDS, 3)

#: Products, and in PyTorch their sum too, are rounded to 8 bits.
BFLOAT16_AGREEMENT = 2e-2
#: Of 100,000 maxima one or two have a runner-up within float32's rounding, which another order of summation prefers; its
#: gradient then goes to another token.
CHOICE_AGREEMENT = 1e-2
#: Where float64's products of all tokens take 2 GB.
ERROR_BATCH = 32


def scoring_case(documents: int, document_tokens: int, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    """One query of 32 tokens."""
    sizes = {"queries": 1, "query_tokens": 32, "documents": documents, "document_tokens": document_tokens, "width": 128}
    wide = dtype == torch.float32
    settings: dict[str, Any] = {
        "name": f"maxsim {str(dtype).removeprefix('torch.')}",
        "inputs": partial(make.scoring_inputs, dtype=dtype),
        "sizes": sizes,
        "small_sizes": sizes | {"documents": 8},
        "work": scoring_work(32, documents * document_tokens, 128, dtype),
        "contenders": (
            *make.ours("maxsim"),
            *make.scoring_peers(dtype),
            *make.plain("torch", make.dense_maxsim, forward_alone),
        ),
        "agreement": FLOAT32_AGREEMENT if wide else BFLOAT16_AGREEMENT,
        "exact": partial(forward_alone, partial(eager, make.dense_maxsim)),
        "error_sizes": sizes | {"documents": min(documents, 100)},
        "results": ("scores",),
        "matrix_gradients": (),
        "rounds": ROUNDS,
        "bars": (
            (faster_than("maxsim-cpu", 3.0), faster_than("torch", 2.0), share_of_floor(0.6))
            if wide
            else (faster_than("maxsim-cpu", 6.0),)
        ),
    }
    return Case(**settings | changes)


def scoring_work(query_tokens: int, document_tokens: int, width: int, dtype: torch.dtype) -> Work:
    """All tokens of all queries with all tokens of all documents, each read once."""
    return Work(
        2 * query_tokens * document_tokens * width,
        (query_tokens + document_tokens) * width * dtype.itemsize,
        dtype,
        "2 N M Li Lj D",
        read_only=True,
    )


def ragged_case(documents: int, shortest: int, longest: int) -> Case:
    sizes = {"query_tokens": 32, "documents": documents, "shortest": shortest, "longest": longest, "width": 128}
    tokens = int(make.ragged_lengths(documents, shortest, longest).sum())
    return Case(
        name="maxsim float32, ragged",
        inputs=make.ragged_inputs,
        sizes=sizes,
        work=scoring_work(32, tokens, 128, torch.float32),
        contenders=(
            *make.ours(make.our_ragged),
            *make.ragged_peers(),
            *make.plain("torch, padded", make.dense_ragged, forward_alone, make.on_padded),
        ),
        agreement=FLOAT32_AGREEMENT,
        exact=partial(make.on_padded, partial(forward_alone, partial(eager, make.dense_ragged))),
        error_sizes=sizes | {"documents": min(documents, 100)},
        results=("scores",),
        matrix_gradients=(),
        rounds=ROUNDS,
        bars=(faster_than("maxsim-cpu", 2.5),),
    )


def topk_case(queries: int, corpus: int, document_tokens: int) -> Case:
    """The peak must not grow with the corpus, whose scores alone would be less."""
    sizes = {
        "queries": queries,
        "documents": corpus,
        "document_tokens": document_tokens,
        "query_tokens": 32,
        "width": 128,
    }
    return scoring_case(
        corpus,
        document_tokens,
        name=f"maxsim_topk float32, best {make.BEST}",
        sizes=sizes,
        small_sizes=sizes | {"documents": 2 * make.BEST},
        error_sizes=sizes | {"documents": min(corpus, 2000)},
        work=scoring_work(32 * queries, corpus * document_tokens, 128, torch.float32),
        contenders=(
            *make.ours(make.our_topk, needs="maxsim_topk"),
            *make.topk_peers(),
            make.plain("torch", make.dense_topk, forward_alone)[0],
        ),
        exact=partial(forward_alone, partial(eager, make.dense_topk)),
        bars=(faster_than("torch", 1.5), peak_below(80 * 2**20)),
        rounds=FEW_ROUNDS,
    )


def filip_case(batch: int, **changes: Any) -> Case:
    sizes = {"batch": batch, "image_tokens": 196, "text_tokens": 32, "width": 256}
    settings: dict[str, Any] = {
        "name": "FilipLoss float32",
        "inputs": make.filip_inputs,
        "sizes": sizes,
        "small_sizes": sizes | {"batch": 4},
        "error_sizes": sizes | {"batch": min(batch, ERROR_BATCH)},
        "work": step_work(batch, 196, 32, 256, chosen=196 + 32),
        "contenders": (
            *make.ours("FilipLoss", forward_and_backward, needs="FilipLoss"),
            *make.plain("einsum", make.dense_filip, forward_and_backward),
        ),
        "agreement": CHOICE_AGREEMENT,
        "exact": partial(forward_and_backward, partial(eager, make.dense_filip)),
        "results": ("value", "dx", "dy", "dscale"),
        "matrix_gradients": ("dx", "dy"),
        "rounds": ROUNDS,
        "bars": (faster_than("einsum", 4.0), leaner_beyond_gradients("einsum", 1 / 20)),
    }
    return Case(**settings | changes)


def step_work(batch: int, x_tokens: int, y_tokens: int, width: int, *, chosen: int) -> Work:
    """All products forward; backward those of the chosen tokens, `chosen` for each pair, once for each gradient."""
    pairs = batch * batch * width
    inputs = batch * (x_tokens + y_tokens) * width * 4
    return Work(
        2 * pairs * (x_tokens * y_tokens + 2 * chosen),
        2 * inputs,
        torch.float32,
        f"2 N M D (Li Lj + 2 x {chosen})",
    )


def colbert_case(batch: int) -> Case:
    sizes = {"batch": batch, "query_tokens": 32, "document_tokens": 300, "width": 128}
    return filip_case(
        batch,
        name="ColBERT step float32",
        inputs=make.colbert_inputs,
        sizes=sizes,
        small_sizes=sizes | {"batch": 4},
        error_sizes=sizes | {"batch": min(batch, ERROR_BATCH)},
        work=step_work(batch, 32, 300, 128, chosen=32),
        contenders=(
            *make.ours(make.our_colbert, forward_and_backward),
            *make.pylate(),
            *make.plain("PyLate's formula", make.dense_colbert, forward_and_backward),
        ),
        exact=partial(forward_and_backward, partial(eager, make.dense_colbert)),
        results=("value", "dx", "dy"),
        rounds=FEW_ROUNDS,
        bars=(faster_than("PyLate's formula", 3.0), faster_than("PyLate", 3.0)),
    )


def projection_case(batch: int, columns: int) -> Case:
    sizes = {"batch": batch, "tokens": 64, "width": 512, "columns": columns}
    return Case(
        name="project_max float32",
        inputs=make.projection_inputs,
        sizes=sizes,
        small_sizes=sizes | {"batch": 2, "columns": 500},
        error_sizes=sizes | {"batch": min(batch, ERROR_BATCH), "columns": min(columns, 5000)},
        work=Work(
            2 * batch * columns * 512 * (64 + 2), 8 * 512 * (batch * 64 + columns), torch.float32, "2 B V D (L + 2)"
        ),
        contenders=(
            *make.ours(make.our_lexical, forward_and_backward, needs="project_max"),
            make.plain("einsum", make.dense_lexical, forward_and_backward)[0],
        ),
        agreement=CHOICE_AGREEMENT,
        exact=partial(forward_and_backward, partial(eager, make.dense_lexical)),
        results=("value", "dx", "dweight"),
        matrix_gradients=("dx", "dweight"),
        rounds=min(ROUNDS, 2),
        bars=(faster_than("einsum", 1.5), leaner_than("einsum", 1 / 20)),
    )


def alignment_case(name: str, batch: int) -> Case:
    """All pairs of sets of 32 and 49 tokens; the floor is that of their products, whatever is made of them."""
    sizes = {"batch": batch, "x_tokens": 32, "y_tokens": 49, "width": 256}
    return Case(
        name=f"{name} float32",
        inputs=make.pair_inputs,
        sizes=sizes,
        small_sizes=sizes | {"batch": 2},
        work=step_work(batch, 32, 49, 256, chosen=32 * 49),
        contenders=make.our_similarity(name),
        agreement=FLOAT32_AGREEMENT,
        results=("value", "dx", "dy"),
        matrix_gradients=("dx", "dy"),
        rounds=min(ROUNDS, 2),
        bars=(peak_below(2**30),),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_maxsim(measure_row, dtype):
    changes = {} if dtype == torch.float32 else {"small_sizes": None}
    measure_row(scoring_case(DOCUMENTS, 1024, dtype=dtype, **changes))


def test_maxsim_ragged(measure_row):
    measure_row(ragged_case(DOCUMENTS, 20, 1024))


def test_maxsim_topk(measure_row):
    measure_row(topk_case(4, CORPUS, 100))


def test_filip(measure_row):
    measure_row(filip_case(FILIP_BATCH))


def test_filip_alone(measure_row):
    alone = make.ours("FilipLoss", forward_and_backward, needs="FilipLoss")
    alone = [next((each for each in alone if each.missing is None), alone[0])]
    bars = (peak_below(2**30),)
    measure_row(
        filip_case(LARGE_FILIP_BATCH, name="FilipLoss float32, large batch", contenders=alone, bars=bars, rounds=2)
    )


def test_colbert(measure_row):
    measure_row(colbert_case(COLBERT_BATCH))


def test_project_max(measure_row):
    measure_row(projection_case(TEXTS, VOCABULARY))


@pytest.mark.parametrize("name", ["sinkhorn_similarity", "soft_dtw"])
def test_alignment(measure_row, name):
    if (absent := missing_kernel(name)) is not None:
        pytest.skip(absent)
    measure_row(alignment_case(name, FILIP_BATCH))
