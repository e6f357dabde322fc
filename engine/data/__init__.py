"""Shards of image-text samples, in an order that depends on (seed, epoch) alone. README.md has the page."""

from .batch import Batch, EvalBatch
from .captions import choose_caption, filter_captions
from .config import MAX_PIXELS, MAX_SIDE, CaptionChoice, DataConfig
from .dataset import ShardDataset
from .images import build_image_transform, decode_image
from .loader import batches_per_epoch, build_loader, iterate_split
from .order import batch_indices, batch_order
from .schema import BadSample, Caption, Reason, Sample
from .shards import expand_shards
from .tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE",
    "BadSample",
    "Batch",
    "Caption",
    "CaptionChoice",
    "DataConfig",
    "EvalBatch",
    "Reason",
    "Sample",
    "ShardDataset",
    "Tokenizer",
    "batch_indices",
    "batch_order",
    "batches_per_epoch",
    "build_image_transform",
    "build_loader",
    "choose_caption",
    "decode_image",
    "expand_shards",
    "filter_captions",
    "iterate_split",
    "load_tokenizer",
    "train_tokenizer",
]
