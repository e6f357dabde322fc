"""The contenders of the sentence-transformers suite: a step of its losses on a small encoder, with and without ours.

All of it at module level, because the memory runs take it to another process by name.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairtile.kernels import use_backend
from pairtile.kernels.integrations import sentence_transformers as integration

from .harness import Call, Contender
from .peers import missing_backend, missing_peer

#: As in sentence-transformers.
SCALE = 20.0

_TOKENS = 16
_VOCABULARY = 1024


def text_inputs(batch: int, width: int, negatives: int = 0) -> list[Tensor]:
    """An embedding table [1024, width], and tokens [batch, 16] of queries, positives, and each hard negative.

    A quarter of a positive's tokens are its query's.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(_VOCABULARY, width, generator=generator)
    columns = [torch.randint(_VOCABULARY, (batch, _TOKENS), generator=generator) for _ in range(2 + negatives)]
    columns[1][:, : _TOKENS // 4] = columns[0][:, : _TOKENS // 4]
    return [table.requires_grad_(), *columns]


class BagOfTokens(nn.Module):
    """The mean of a text's token embeddings: an encoder so small that the loss is most of a step."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": F.embedding_bag(features["input_ids"], self.table)}


def exact_ranking(table: Tensor, *columns: Tensor) -> Tensor:
    """softplus(LSE over the others - own), which float64 needs too: the usual form cancels on aligned pairs."""
    queries, *documents = (F.normalize(F.embedding_bag(column, table), dim=-1) for column in columns)
    logits = SCALE * queries @ torch.cat(documents).T
    own = logits.diagonal()
    others = logits.masked_fill(torch.eye(*logits.shape, dtype=torch.bool), float("-inf")).logsumexp(1)
    return -F.logsigmoid(own - others).mean()


def training_step(kind: str, mini_batch_size: int | None, backend: str | None, leaves: list[Tensor]) -> Call:
    """A step of their loss of that name, served by one of our backends, or as it is.

    The encoder is run inside: the cached losses run it twice, and put its gradient into `.grad` themselves.
    """
    table, *columns = leaves
    settings = {} if mini_batch_size is None else {"mini_batch_size": mini_batch_size}
    losses = import_module("sentence_transformers.sentence_transformer.losses")
    loss = getattr(losses, kind)(nn.Sequential(BagOfTokens(table)), scale=SCALE, **settings)

    def step() -> list[Tensor]:
        table.grad = None
        value = loss([{"input_ids": column} for column in columns], None)
        value.backward()
        assert table.grad is not None
        return [value.detach(), table.grad]

    if backend is None:
        return step
    integration.accelerate(loss)

    def served() -> list[Tensor]:
        with use_backend(backend):
            return step()

    return served


def contenders(kind: str, mini_batch_size: int | None = None) -> list[Contender]:
    """Ours first."""
    absent = missing_peer("sentence-transformers")
    return [
        *(
            Contender(
                name=f"pairtile {backend}",
                prepare=partial(training_step, kind, mini_batch_size, backend),
                missing=absent or missing_backend(backend),
                ours=True,
            )
            for backend in ("cpp", "torch")
        ),
        Contender("sentence-transformers", partial(training_step, kind, mini_batch_size, None), missing=absent),
    ]
