"""A small model of two towers with dropout, tokens and a vocabulary, in any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, WIDTH, TOKENS = 10, 12, 5


class TwoTowers(nn.Module):
    """images [n, TOKENS, WIDTH], texts [n, TOKENS, WIDTH], text_mask bool [n, TOKENS] -> what a loss may read, by name."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8)) for _ in range(2)
        )
        self.vocabulary = nn.Parameter(torch.randn(7, 8))
        self.logit_scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, images: Tensor, texts: Tensor, text_mask: Tensor) -> dict[str, Tensor]:
        image_tokens, text_tokens = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return {
            "image_features": F.normalize(image_tokens.mean(1), dim=-1),
            "text_features": F.normalize(text_tokens.mean(1), dim=-1),
            "image_tokens": image_tokens,
            "text_tokens": text_tokens,
            "text_mask": text_mask,
            "vocab_weight": self.vocabulary * 1.0,
            "logit_scale": self.logit_scale.exp(),
        }


def pairs(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images, texts = (torch.randn(rows, TOKENS, WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    lengths = torch.randint(1, TOKENS + 1, (rows, 1), generator=generator)
    return images, texts, torch.arange(TOKENS) < lengths
