"""What has to be settled before any test imports triton."""

from __future__ import annotations

from triton_interpreter import interpret_without_gpu

interpret_without_gpu()
