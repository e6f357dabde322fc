"""From fonts, folders, tables and foreign shards to shards in pairtile's sample schema."""

from .glyphs import prepare_glyphs
from .report import PrepareReport

__all__ = ["PrepareReport", "prepare_glyphs"]
