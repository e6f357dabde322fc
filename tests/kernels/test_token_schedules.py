"""Schedules: r for each layer, token counts, FLOPs."""

from __future__ import annotations

import pytest

from pairtile.kernels.token_merging import (
    ConstantR,
    FlopsBudget,
    KeepRatio,
    LinearR,
    TargetTokens,
    schedule_of,
    tokens_per_layer,
    transformer_flops,
)


def test_constant_r_stops_at_half_of_what_may_be_merged():
    assert ConstantR(16)(12, 197, 1) == [16] * 11 + [10]
    assert tokens_per_layer([16] * 12, 197, 1)[-2:] == [21, 11]
    assert ConstantR(3)(3, 6, 5) == [0, 0, 0]


def test_linear_r_falls_as_in_tome():
    assert LinearR(8, -1.0)(5, 1000) == [16, 12, 8, 4, 0]
    assert LinearR(8, 1.0)(5, 1000) == [0, 4, 8, 12, 16]
    assert LinearR(8, 0.0)(3, 1000) == [8, 8, 8]
    assert LinearR(4, -1.0)(1, 1000) == [8]


def test_keep_ratio_counts_what_may_be_merged():
    assert KeepRatio(0.75)(2, 101, 1) == [25, 19]  # of 100 and of 75
    assert KeepRatio([1.0, 0.5])(2, 12, 1) == [0, 5]


@pytest.mark.parametrize(("layers", "tokens", "protected", "target"), [(12, 197, 1, 50), (4, 65, 1, 5), (3, 10, 0, 10)])
def test_target_tokens_is_met_exactly_and_evenly(layers, tokens, protected, target):
    r = TargetTokens(target)(layers, tokens, protected)
    assert tokens_per_layer(r, tokens, protected)[-1] == target
    if tokens == 197:
        assert r == [13] * 3 + [12] * 9


def test_target_share_is_of_the_tokens_that_enter():
    assert sum(TargetTokens(0.25)(12, 197, 1)) == 197 - 49


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5])
def test_flops_budget_takes_the_fewest_merges_that_fit(share):
    r = FlopsBudget(share, 768)(12, 197, 1)
    whole = transformer_flops([197] * 13, 768)
    assert transformer_flops(tokens_per_layer(r, 197, 1), 768) <= share * whole
    if sum(r):
        last = max(layer for layer in range(12) if r[layer] == max(r))
        r[last] -= 1
        assert transformer_flops(tokens_per_layer(r, 197, 1), 768) > share * whole


def test_flops_of_vit_b16():
    # 17.5 G multiply-adds are what papers give for all of ViT-B/16 at 224; 0.12 G are the patch embedding and the head.
    assert transformer_flops([197] * 13, 768) / 2 == pytest.approx(17.45e9, rel=2e-3)


def test_ways_to_say_r():
    assert schedule_of(8) == ConstantR(8)
    assert schedule_of((8, -1)) == LinearR(8, -1)
    assert schedule_of([3, 0, 2])(4, 100, 0) == [3, 0, 2, 0]
    assert schedule_of(KeepRatio(0.9)) == KeepRatio(0.9)


def test_bad_input_is_told():
    for wrong, message in (
        (lambda: ConstantR(-1), "r=-1"),
        (lambda: LinearR(8, 2.0), "inflection=2.0"),
        (lambda: KeepRatio(0.3), "at most half"),
        (lambda: KeepRatio((0.9, 0.9))(3, 50, 1), "2 ratios for 3 layers"),
        (lambda: TargetTokens(2)(2, 197, 1), "2 layers cannot get from 197 tokens to 2 tokens.* leaves 50"),
        (lambda: FlopsBudget(0.1, 768)(2, 197, 1), "10.0% of the FLOPs"),
        (lambda: schedule_of([1, 1])(1, 50, 0), "at most one for each"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(TypeError, match="expected a whole number, "):
        schedule_of("8")
