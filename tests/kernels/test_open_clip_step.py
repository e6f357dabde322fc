"""open_clip's models trained with our losses in the place of its own: gradients of all parameters against float64."""

from __future__ import annotations

import copy

import open_clip.loss
import open_clip.model
import pytest
import torch
from open_clip.coca_model import CoCa

from pairtile.kernels import ClipLoss, CoCaLoss, SigLipLoss

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
BATCH = 24


def dual_encoder(kind, **changes):
    return lambda: kind(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, output_dict=True, **changes)


def coca():
    vision = VISION | {
        "attentional_pool": True,
        "attn_pooler_queries": 4,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    }
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 8, "width": 32, "heads": 2, "layers": 1}
    model = CoCa(embed_dim=32, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision)
    torch.nn.init.normal_(model.text_decoder.text_projection, std=32**-0.5)  # open_clip leaves it to the checkpoint
    return model


STEPS = {
    "ClipLoss, CLIP": (dual_encoder(open_clip.model.CLIP), ClipLoss, open_clip.loss.ClipLoss, ()),
    "ClipLoss, CustomTextCLIP": (dual_encoder(open_clip.model.CustomTextCLIP), ClipLoss, open_clip.loss.ClipLoss, ()),
    "SigLipLoss": (
        dual_encoder(open_clip.model.CustomTextCLIP, init_logit_scale=2.3, init_logit_bias=-10.0),
        SigLipLoss,
        open_clip.loss.SigLipLoss,
        (),
    ),
    "CoCaLoss": (coca, CoCaLoss, open_clip.loss.CoCaLoss, (2.0, 1.0)),
}


def gradients(model, loss, images, texts):
    """As open_clip's train_one_epoch: the loss gets all outputs of the model by name."""
    model.zero_grad(set_to_none=True)
    outputs = model(images, texts)
    terms = loss(**outputs, output_dict=True)
    sum(terms.values()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def without_logits(model, loss):
    """The same step with hidden states: the decoder's head is left to the loss."""

    def call(image_features, text_features, logits, labels, logit_scale, output_dict):
        head = model.text_decoder.text_projection
        return loss(
            image_features,
            text_features,
            None,
            labels,
            logit_scale,
            output_dict,
            hidden_states=hidden[-1],
            vocab_weight=head.T,
        )

    hidden = []
    model.text_decoder.ln_final.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    return call


@pytest.mark.parametrize("step", [*STEPS, "CoCaLoss without logits"])
def test_gradients_of_all_parameters(backend, relative_error, step):
    make, ours, theirs, arguments = STEPS[step.removesuffix(" without logits")]
    torch.manual_seed(7)
    model = make()
    images, texts = torch.randn(BATCH, 3, 16, 16), torch.randint(1, 64, (BATCH, 8))
    texts[::3, 5:] = 0
    exact = gradients(copy.deepcopy(model).double(), theirs(*arguments), images.double(), texts)
    eager = gradients(model, theirs(*arguments), images, texts)
    loss = ours(*arguments)
    given = gradients(model, without_logits(model, loss) if "without" in step else loss, images, texts)
    # A gradient that is zero in truth (that of the keys' bias in attention) has no relative error: the size of a
    # typical one counts instead.
    typical = torch.stack([each.norm() for each in exact.values()]).median().item()
    for name, truth in exact.items():
        bound = max(2e-6, 2 * relative_error(eager[name], truth, typical))
        assert relative_error(given[name], truth, typical) <= bound, name
