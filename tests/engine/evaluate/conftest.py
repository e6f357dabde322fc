"""Loads the fake split, which the worker processes run as a script, and puts it in the place of the data loader."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pairtile.engine.evaluate import embed, sheet_rows

SCRIPT = Path(__file__).with_name("fake_split.py")


@pytest.fixture(scope="session")
def fake_module() -> ModuleType:
    specification = importlib.util.spec_from_file_location("evaluate_fake_split", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def fake(fake_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(embed, "iterate_split", fake_module.iterate_fake)
    monkeypatch.setattr(sheet_rows, "iterate_split", fake_module.iterate_fake)
    return fake_module
