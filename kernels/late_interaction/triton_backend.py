"""Triton kernels of late interaction: the host side."""

from __future__ import annotations

from .backends import Kernels

#: None where the torch backend serves.
KERNELS: Kernels | None = None
