"""What a run was made of: the resolved recipe, the versions of what it ran on, the git revision."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from .recipe import Recipe

PACKAGES = (
    "pairtile",
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "timm",
    "transformers",
    "webdataset",
    "tokenizers",
)


def write_config(recipe: Recipe, path: Path, world_size: int) -> None:
    """Write ``config.yaml``: a recipe that can be trained again, with what it ran on as comments above it."""
    found = {"python": platform.python_version(), **versions(), "git": git_revision(), "world_size": world_size}
    head = "".join(f"# {name}: {value}\n" for name, value in found.items())
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(head + dump_recipe(recipe), encoding="utf-8")
    os.replace(partial, path)


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def versions() -> dict[str, Any]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str:
    """Revision of the source tree this package runs from, with ``+changes`` when it is dirty; else ``none``."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "none"
