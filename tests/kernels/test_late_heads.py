"""What is made of tokens before or instead of late interaction: sparse vectors, codes, fewer tokens. Against the papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import late_relatives as reference
from late_sets import differentiated, sets
from pairtile.kernels import (
    TokenReduction,
    finite_tokens,
    flops_regulariser,
    lexical_vector,
    most_similar_tokens,
    sparsemax,
    take_tokens,
    top_tokens,
)


def test_lexical_vectors_and_their_regulariser():
    (hidden, mask), generator = sets(0, 4, 5), torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 6), (9,)))

    def ours(hidden, weight, bias):
        vectors = lexical_vector(hidden, weight, bias, mask)
        return torch.cat([vectors.flatten(), flops_regulariser(vectors)[None]])

    def paper(hidden, weight, bias):
        rows = [
            torch.log(1 + F.relu(each[of] @ weight.T + bias)).max(0).values if of.any() else bias.new_zeros(9)
            for each, of in zip(hidden, mask)
        ]
        vectors = torch.stack(rows)
        return torch.cat([vectors.flatten(), vectors.abs().mean(0).square().sum()[None]])

    inputs = hidden, weight, bias
    torch.testing.assert_close(differentiated(ours, *inputs), differentiated(paper, *inputs), rtol=1e-10, atol=1e-12)


def test_sparsemax():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    scores[3, 2:5] = scores[3].max()  # equals at the edge of the support
    scores[4] = 0
    given = differentiated(sparsemax, scores)
    expected = differentiated(lambda s: torch.stack([reference.sparsemax(row) for row in s]), scores)
    torch.testing.assert_close(given[0], expected[0], rtol=1e-12, atol=1e-13)
    smooth = [i for i in range(20) if i not in (3, 4)]
    torch.testing.assert_close(given[1][smooth], expected[1][smooth], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(sparsemax(scores.T, 0), given[0].T)
    assert torch.autograd.gradcheck(sparsemax, scores[:3].clone().requires_grad_())


@pytest.mark.parametrize("zero", [False, True])
def test_finite_tokens(zero):
    (tokens, mask), generator = sets(0, 4, 5), torch.Generator().manual_seed(1)
    tokens = tokens.nan_to_num()
    codebook = torch.randn(8, 6, generator=generator, dtype=torch.float64)

    def ours(tokens, codebook):
        return finite_tokens(tokens, codebook, mask, temperature=0.5, padding_scores_zero=zero)[0]

    def paper(tokens, codebook):
        rows = []
        for each, of in zip(tokens, mask):
            scores = each @ codebook.T / (6**0.5 * 0.5)
            scores = scores * of[:, None] if zero else scores[of]
            rows.append(reference.sparsemax(scores.max(0).values) @ codebook if len(scores) else tokens.new_zeros(6))
        return torch.stack(rows)

    inputs = tokens, codebook
    torch.testing.assert_close(differentiated(ours, *inputs), differentiated(paper, *inputs), rtol=1e-10, atol=1e-12)


def test_reduced_tokens_are_attended_by_softmax():
    layer = TokenReduction(6, 2, groups=3).double()
    (tokens, mask) = sets(0, 4, 5)

    def paper(tokens: Tensor) -> Tensor:
        def grouped(conv: torch.nn.Conv1d, given: Tensor) -> Tensor:
            blocks = torch.block_diag(*conv.weight.squeeze(2).split(6 // conv.groups))
            return given @ blocks.T + conv.bias

        rows = []
        for each, of in zip(tokens, mask):
            kept = each[of]
            maps = grouped(layer.grouped, F.layer_norm(kept, (6,), layer.norm.weight, layer.norm.bias))
            maps = maps @ layer.attention.weight.squeeze(2).T + layer.attention.bias
            rows.append(maps.softmax(0).T @ grouped(layer.values, kept) if of.any() else tokens.new_zeros(2, 6))
        return torch.stack(rows)

    given = differentiated(lambda tokens: layer(tokens, mask), tokens)
    torch.testing.assert_close(given, differentiated(paper, tokens), rtol=1e-10, atol=1e-12)
    whole = tokens[2:3, 1:2].nan_to_num()
    torch.testing.assert_close(layer(whole), paper(tokens)[2:3], rtol=1e-12, atol=1e-13)


def test_chosen_tokens():
    tokens = torch.tensor([[[1.0, 0], [3, 0], [3, 0], [0, 9]], [[5.0, 0], [4, 0], [9, 0], [0, 0]]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, True]])
    query = torch.tensor([[1.0, 0], [1, 0]])
    indices, counted = top_tokens(tokens, query, 2, mask)
    assert indices.tolist() == [[1, 2], [0, 1]]
    assert counted.all()
    indices, counted = top_tokens(tokens, query, 4, mask, largest=False)
    assert indices.tolist() == [[0, 1, 2, 3]] * 2
    assert counted.tolist() == mask.tolist()
    assert take_tokens(tokens, indices[:, :1]).equal(tokens[:, :1])
    # 0.5 of three tokens that count is two; the first of equals.
    kept, kept_mask = most_similar_tokens(tokens, query[:1, None], 0.5, mask)
    assert kept[0].tolist() == [[3, 0], [3, 0]]
    assert kept[1].tolist() == [[5, 0], [4, 0]]
    assert kept_mask.all()
