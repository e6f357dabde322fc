"""Arguments of objectives, from a recipe to the loss. That a recipe with them trains is in test_train.py."""

from types import SimpleNamespace

import pytest
import torch

from pairtile.engine.errors import PairtileError
from pairtile.engine.loss_objectives import LOSS_OBJECTIVES
from pairtile.engine.model import DualOutput
from pairtile.engine.objectives import WeightedSum, check_objectives
from pairtile.engine.recipe import ObjectiveConfig
from pairtile.kernels import ClipLoss


def test_arguments_reach_the_loss():
    config = ObjectiveConfig(name="clip", args={"label_smoothing": 0.1, "direction_weights": [1.0, 0.5]})
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(5, 4, generator=generator) for _ in range(2)]
    output = DualOutput(*features, torch.tensor([3.0]), None)
    (value,) = WeightedSum([config], None).terms(output, batch=None).values()
    assert torch.equal(value, ClipLoss(label_smoothing=0.1, direction_weights=(1.0, 0.5))(*features, 3.0))


def test_losses_get_the_features_the_scale_and_the_ids_that_they_name():
    generator = torch.Generator().manual_seed(0)
    features = [torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in range(2)]
    ids = torch.tensor([0, 1, 2, 3, 4, 4])
    scale, bias = torch.tensor([5.0]), torch.tensor([-2.0])
    args = {"matryoshka": {"widths": [4, 8]}, "triplet": {"margin": 0.1, "direction_weights": [1, 1]}}
    known = {"logit_scale": scale, "logit_bias": bias, "image_ids": ids, "text_ids": ids}
    for name, factory in LOSS_OBJECTIVES.items():
        config = ObjectiveConfig(name=name, args=args.get(name, {}))
        output = DualOutput(*features, scale, bias)
        (value,) = WeightedSum([config], None).terms(output, SimpleNamespace(ids=ids)).values()
        expected = factory.loss(**config.args)(*features, **{key: known[key] for key in factory.given})
        assert torch.equal(value, expected), name
        assert value.isfinite(), name
    # which pairs are positives comes from the ids of the batch
    apart = WeightedSum([ObjectiveConfig(name="sdm")], None).terms(output, SimpleNamespace(ids=torch.arange(6)))
    assert not torch.equal(apart["sdm"], LOSS_OBJECTIVES["sdm"].loss()(*features, scale, image_ids=ids, text_ids=ids))
    biased = WeightedSum([ObjectiveConfig(name="siglip_plus")], None)
    with pytest.raises(PairtileError, match=r"SigLipPlusLoss needs a bias: set model\.init_logit_bias"):
        biased.terms(DualOutput(*features, scale, None), SimpleNamespace(ids=ids))
    said = r"no argument 'reduction' \(its arguments: margin, mining, peer_form, positive_share, direction_weights, strategy, scope, wire_dtype, node_size\)"
    with pytest.raises(PairtileError, match=said):
        check_objectives([ObjectiveConfig(name="triplet", args={"reduction": "sum"})])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"label_smoothing": 2}, r"objective clip: label_smoothing=2: expected a number from 0 to 1"),
        ({"label_smoothing": "much"}, r"label_smoothing='much': expected a number from 0 to 1"),
        ({"direction_weights": [0, 0]}, r"direction_weights=\[0, 0\]: expected two numbers"),
        (
            {"direction_weight": [1, 1]},
            r"no argument 'direction_weight' \(its arguments: strategy, label_smoothing, dir",
        ),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_loaded(args, said):
    with pytest.raises(PairtileError, match=said):
        check_objectives([ObjectiveConfig(name="clip", args=args)])
