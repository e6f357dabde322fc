"""`project_max` on the `triton` backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backends import Projection

#: None where the torch backend's serves.
PROJECTION: Projection | None = None
