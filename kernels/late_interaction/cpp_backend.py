"""The C++ kernels of csrc/cpu for late interaction."""

from __future__ import annotations

from .backends import Kernels

#: None where the torch backend serves.
KERNELS: Kernels | None = None
