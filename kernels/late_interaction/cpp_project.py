"""`project_max` on the `cpp` backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .project_max import Projection

#: None where the torch backend's serves.
PROJECTION: Projection | None = None
