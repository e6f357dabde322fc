"""The contenders of the late-interaction suite: inputs, ours, the libraries' CPU paths, and the dense formulas.

All of it at module level, because the memory runs take it to another process by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pairtile import kernels
from pairtile.kernels import use_backend

from .contrastive import compiled, eager
from .harness import Call, Contender, Prepare, forward_alone, forward_and_backward, in_float32
from .peers import missing_backend, missing_compiler, missing_kernel, missing_peer

Function = Callable[..., Tensor]
#: How a function is called: `forward_alone` or `forward_and_backward`.
Step = Callable[[Callable[[], Function], list[Tensor]], Call]

#: Documents that `maxsim_topk` is asked for.
BEST = 100
#: Of FILIP and ColBERT: what their similarities are multiplied by.
_FILIP_SCALE, _COLBERT_SCALE = 14.3, 1.0


def _unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def scoring_inputs(
    queries: int,
    query_tokens: int,
    documents: int,
    document_tokens: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Queries [queries, query_tokens, width] and documents, unit vectors without gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, query_tokens, width), (documents, document_tokens, width)
    return [_unit(generator, *shape).to(dtype) for shape in shapes]


def ragged_lengths(documents: int, shortest: int, longest: int) -> Tensor:
    """int64 [documents], uniform."""
    return torch.randint(shortest, longest + 1, (documents,), generator=torch.Generator().manual_seed(1))


def ragged_inputs(query_tokens: int, documents: int, shortest: int, longest: int, width: int) -> list[Tensor]:
    """A query [query_tokens, width], all tokens of the documents one behind the other, and their lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = ragged_lengths(documents, shortest, longest)
    return [_unit(generator, query_tokens, width), _unit(generator, int(lengths.sum()), width), lengths]


def filip_inputs(batch: int, image_tokens: int, text_tokens: int, width: int) -> list[Tensor]:
    """Patches, tokens and the scale. A quarter of a pair's tokens have a cosine of 0.7."""
    generator = torch.Generator().manual_seed(0)
    images, texts = _unit(generator, batch, image_tokens, width), _unit(generator, batch, text_tokens, width)
    _align(texts, images, max(1, text_tokens // 4))
    return [images.requires_grad_(), texts.requires_grad_(), torch.tensor(_FILIP_SCALE).requires_grad_()]


def colbert_inputs(batch: int, query_tokens: int, document_tokens: int, width: int) -> list[Tensor]:
    """Queries, documents, and the documents' mask, which is all ones: PyLate multiplies by it in any case."""
    generator = torch.Generator().manual_seed(0)
    queries, documents = _unit(generator, batch, query_tokens, width), _unit(generator, batch, document_tokens, width)
    _align(queries, documents, max(1, query_tokens // 8))
    mask = torch.ones(batch, document_tokens, dtype=torch.bool)
    return [queries.requires_grad_(), documents.requires_grad_(), mask]


def _align(x: Tensor, y: Tensor, tokens: int) -> None:
    x[:, :tokens] = F.normalize(x[:, :tokens] + y[:, :tokens], dim=-1)


def projection_inputs(batch: int, tokens: int, width: int, columns: int) -> list[Tensor]:
    """Hidden states of unit variance and a projection whose logits have unit variance."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, tokens, width, generator=generator)
    weight = torch.randn(columns, width, generator=generator) / width**0.5
    return [hidden.requires_grad_(), weight.requires_grad_()]


def pair_inputs(batch: int, x_tokens: int, y_tokens: int, width: int) -> list[Tensor]:
    """Two batches of token sets, of which all pairs are compared."""
    generator = torch.Generator().manual_seed(0)
    return [_unit(generator, batch, tokens, width).requires_grad_() for tokens in (x_tokens, y_tokens)]


def dense_maxsim(q: Tensor, d: Tensor) -> Tensor:
    return torch.einsum("nld,mkd->nmlk", q, d).amax(-1).sum(-1)


def dense_topk(q: Tensor, d: Tensor) -> Tensor:
    return dense_maxsim(q, d).topk(min(BEST, len(d))).values


def dense_ragged(q: Tensor, d: Tensor, mask: Tensor) -> Tensor:
    """Of padded documents."""
    products = torch.einsum("ld,mkd->mlk", q, d)
    return products.masked_fill(~mask[:, None], -torch.inf).amax(-1).sum(-1)


def dense_filip(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """arXiv:2111.07783, with the gradient of a maximum to one token."""
    products = torch.einsum("npd,mrd->nmpr", images, texts)
    of_images, of_texts = products.max(-1).values.mean(-1), products.max(-2).values.mean(-1)
    labels = torch.arange(len(images))
    return (F.cross_entropy(scale * of_images, labels) + F.cross_entropy(scale * of_texts.T, labels)) / 2


def dense_colbert(queries: Tensor, documents: Tensor, mask: Tensor) -> Tensor:
    """What PyLate's `Contrastive` computes of embeddings, in the operations of its `colbert_scores`."""
    products = torch.einsum("ash,bth->abst", queries, documents) * mask[None, :, None]
    return _own_document(products.max(-1).values.sum(-1))


def dense_lexical(hidden: Tensor, weight: Tensor) -> Tensor:
    return _saturated((hidden @ weight.T).max(1).values)


def _own_document(scores: Tensor) -> Tensor:
    return F.cross_entropy(_COLBERT_SCALE * scores, torch.arange(len(scores)))


def _saturated(largest: Tensor) -> Tensor:
    return largest.relu().log1p().sum() / len(largest)


def our_topk(q: Tensor, d: Tensor) -> Tensor:
    return kernels.maxsim_topk(q, d, min(BEST, len(d))).scores


def our_ragged(q: Tensor, d: Tensor, lengths: Tensor) -> Tensor:
    ends = F.pad(lengths.cumsum(0), (1, 0))
    return kernels.maxsim_varlen(q, torch.tensor([0, len(q)]), d, ends)[0]


def our_colbert(queries: Tensor, documents: Tensor, mask: Tensor) -> Tensor:
    return _own_document(kernels.maxsim(queries, documents, None, mask))


def our_lexical(hidden: Tensor, weight: Tensor) -> Tensor:
    return _saturated(kernels.project_max(hidden, weight))


def _served(function: Function | str, backend: str) -> Function:
    """A function of this module, or one of ours by name, by one backend."""
    found = getattr(kernels, function) if isinstance(function, str) else function
    made = found() if isinstance(found, type) else found

    def served(*leaves: Tensor) -> Tensor:
        with use_backend(backend):
            return made(*leaves)

    return served


def _summed(name: str, backend: str) -> Function:
    """A similarity's sum over all pairs, whose backward is that of any loss over them."""
    similarity = _served(name, backend)
    return lambda *leaves: similarity(*leaves).sum()


def ours(function: Function | str, step: Step = forward_alone, *, needs: str = "maxsim") -> list[Contender]:
    """By each backend of the CPU; the first that can run is the one that bars speak of."""
    return [
        Contender(
            f"pairtile {backend}",
            partial(step, partial(_served, function, backend)),
            missing=missing_kernel(needs) or missing_backend(backend),
            ours=True,
        )
        for backend in ("cpp", "torch")
    ]


def our_similarity(name: str) -> list[Contender]:
    """A similarity of all pairs, forward and backward, by the backend that serves it."""
    prepare = partial(forward_and_backward, partial(_summed, name, "torch"))
    return [Contender("pairtile torch", prepare, missing=missing_kernel(name), ours=True)]


def plain(name: str, function: Function, step: Step, adapt: Callable[..., Call] | None = None) -> list[Contender]:
    """A formula in PyTorch, eager and compiled; `adapt(prepare, leaves)` gives it other leaves before the clock runs."""
    made = [partial(step, partial(way, function)) for way in (eager, compiled)]
    if adapt is not None:
        made = [partial(adapt, each) for each in made]
    return [
        Contender(name, made[0]),
        Contender(f"{name} (compiled)", made[1], missing=missing_compiler(), compiled=True),
    ]


def on_padded(prepare: Prepare, leaves: list[Tensor]) -> Call:
    """Of ragged documents, padded to the longest with zeros, and their mask."""
    q, d, lengths = leaves
    padded = torch.nn.utils.rnn.pad_sequence(d.split(lengths.tolist()), batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return prepare([q, padded, mask])


def scoring_peers(dtype: torch.dtype) -> list[Contender]:
    """Those of one query and documents of one length. The first two know float32 alone."""
    rust = [(name, partial(_numpy_scores, name)) for name in ("maxsim-cpu", "fast-maxsim")]
    if dtype != torch.float32:
        rust = [(name, partial(in_float32, prepare)) for name, prepare in rust]
    return [*_peers(rust), *_peers([("late-interaction-kernels", _lik_scores), ("flash-maxsim", _flash_scores)])]


def ragged_peers() -> list[Contender]:
    """Those of one query and documents of any length; without a packed path on the CPU they get them padded."""
    rust = [(name, partial(_numpy_ragged, name)) for name in ("maxsim-cpu", "fast-maxsim")]
    padded = [("late-interaction-kernels", _lik_ragged), ("flash-maxsim", _flash_ragged)]
    return [*_peers(rust), *_peers([(name, partial(on_padded, prepare)) for name, prepare in padded])]


def topk_peers() -> list[Contender]:
    return _peers([("late-interaction-kernels", _lik_topk)])


def pylate() -> list[Contender]:
    """PyLate itself, in an environment that has it, and the same with ours in it."""
    absent = missing_peer("pylate")
    return [
        Contender("PyLate", partial(_pylate_step, None), missing=absent),
        Contender("PyLate with pairtile", partial(_pylate_step, "cpp"), missing=absent or missing_backend("cpp")),
    ]


def _peers(found: Sequence[tuple[str, Prepare]]) -> list[Contender]:
    return [Contender(name, prepare, missing=missing_peer(name)) for name, prepare in found]


def _rust(name: str) -> Any:
    # Read when the module makes its threads: as many as PyTorch has.
    os.environ.setdefault("RAYON_NUM_THREADS", str(torch.get_num_threads()))
    return import_module(name.replace("-", "_"))


def _numpy_scores(name: str, leaves: list[Tensor]) -> Call:
    score, (query, documents) = _rust(name).maxsim_scores, (each.numpy() for each in leaves)
    return lambda: [torch.from_numpy(score(query[0], documents))[None]]


def _numpy_ragged(name: str, leaves: list[Tensor]) -> Call:
    score, (query, tokens, lengths) = _rust(name).maxsim_scores_variable, leaves
    documents = [each.numpy() for each in tokens.split(lengths.tolist())]
    return lambda: [torch.from_numpy(score(query.numpy(), documents))]


def _lik() -> Function:
    score: Function = import_module("late_interaction_kernels").MaxSimScorer(normalize=False).score
    return score


def _lik_scores(leaves: list[Tensor]) -> Call:
    """Its scorer, which on the CPU is its reference."""
    score = _lik()
    return lambda: [score(*leaves)]


def _lik_ragged(leaves: list[Tensor]) -> Call:
    score, (query, documents, mask) = _lik(), leaves
    return lambda: [score(query[None], documents, d_mask=mask)[0]]


def _lik_topk(leaves: list[Tensor]) -> Call:
    retrieve, (queries, corpus) = import_module("late_interaction_kernels").retrieve, leaves
    k = min(BEST, len(corpus))
    return lambda: [retrieve(queries, corpus, top_k=k, chunk=4096, normalize=False)[0]]


def _flash_scores(leaves: list[Tensor]) -> Call:
    """What it has without a GPU: the faster one of its formulas in PyTorch."""
    score, (queries, documents) = import_module("flash_maxsim").maxsim_at_operator, leaves
    return lambda: [score(queries[0], documents)[None]]


def _flash_ragged(leaves: list[Tensor]) -> Call:
    score, (query, documents, mask) = import_module("flash_maxsim").maxsim_naive, leaves
    lengths = mask.sum(1)
    return lambda: [score(query, documents, lengths)]


def _pylate_step(backend: str | None, leaves: list[Tensor]) -> Call:
    """Scores and loss of its `Contrastive`, of given embeddings."""
    scores = import_module("pylate.scores").ColBERTScores()

    def loss(queries: Tensor, documents: Tensor, mask: Tensor) -> Tensor:
        return _own_document(scores(queries, documents[:, None], documents_mask=mask[:, None]))

    call = forward_and_backward(lambda: loss, leaves)
    if backend is None:
        return call
    integration = import_module("pairtile.kernels.integrations.pylate")

    def served() -> list[Tensor]:
        with use_backend(backend), integration.enabled():
            return call()

    return served
