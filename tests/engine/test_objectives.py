"""Arguments of objectives, from a recipe to the loss. That a recipe with them trains is in test_train.py."""

import pytest
import torch

from pairtile.engine.errors import PairtileError
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
