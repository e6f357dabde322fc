"""Triton's interpreter in the tests: when it serves, and what it need not do."""

from __future__ import annotations

import os
from typing import Any

import torch


def interpret_without_gpu() -> None:
    """Has kernels run in the interpreter where there is no GPU. To be called before anything imports triton."""
    if not torch.cuda.is_available():
        # Processes that tests start inherit it, and so test the same.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def spare_repeated_work() -> None:
    """Each call of a device function searches triton.language for what the launch around it has replaced already.

    That search is a third of the time of a small kernel; here it is made once per launch and module.
    """
    from triton.runtime import interpreter

    search = interpreter._patch_lang
    launch: Any = None
    searched: set[int] = set()

    def search_once(function: Any) -> Any:
        nonlocal launch
        module = id(function.__globals__)
        if launch is None:
            launch = search(function)
            restore = launch.restore

            def end() -> None:
                nonlocal launch
                launch = None
                searched.clear()
                restore()

            launch.restore = end
        elif module not in searched:
            search(function)
        searched.add(module)
        return launch

    interpreter._patch_lang = search_once
