"""A recipe whose model trains on 16 x 16 pixels in seconds; the output and data folders are left to the test."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"image_mode": "L", "context_length": 16, "val": {"unseen": "unseen-*.tar"}},
    "model": {
        "vision": {
            "model": "nf_resnet26",
            # output_stride keeps the last stage above 1 x 1 pixels, where oneDNN's bf16 gradient is not reliable
            "args": {
                "depths": [1, 1, 1, 1],
                "channels": [32, 32, 64, 64],
                "stem_type": "3x3",
                "stem_chs": 16,
                "output_stride": 8,
            },
            "image_size": 16,
            "channels": 1,
            "mean": [0.9],
            "std": [0.25],
        },
        "text": {
            "model": "clip_text_model",
            "args": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
        "embed_dim": 32,
    },
    "train": {"batch_size": 32, "steps": 4, "lr": 3e-3, "log_every": 1, "threads": 1},
    "eval": {"match_ids": ["drawing"], "contact_sheet": False},
}
