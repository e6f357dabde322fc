"""From fonts, folders, tables and foreign shards to shards in pairtile's sample schema."""

from .folder import prepare_folder
from .glyph_clips import prepare_glyph_clips
from .glyphs import prepare_glyphs
from .options import WriteOptions
from .report import PrepareReport
from .table import prepare_csv, prepare_jsonl
from .tokenizer import prepare_tokenizer
from .webdataset import prepare_webdataset

__all__ = [
    "PrepareReport",
    "WriteOptions",
    "prepare_csv",
    "prepare_folder",
    "prepare_glyph_clips",
    "prepare_glyphs",
    "prepare_jsonl",
    "prepare_tokenizer",
    "prepare_webdataset",
]
