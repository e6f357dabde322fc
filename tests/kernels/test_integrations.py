"""What all integrations share: their switch, and what they say of a library that is not there."""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from pairtile.kernels.integrations.switch import Replacement, Switch


@pytest.mark.parametrize(("name", "distribution"), [("pylate", "pylate"), ("colpali_engine", "colpali-engine")])
def test_a_library_that_is_not_installed(monkeypatch, name, distribution):
    integration = import_module(f"pairtile.kernels.integrations.{name.removesuffix('_engine')}")
    integration._replacements.cache_clear()
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    integration.disable()
    with pytest.raises(ImportError, match=f"pip install {distribution}"):
        integration.enable()
    with pytest.raises(ImportError, match=f"pip install {distribution}"), integration.enabled():
        pass
    assert not integration._switch.on


def test_blocks_nest_and_the_process_outlives_them():
    library = SimpleNamespace(score="theirs")
    switch = Switch(lambda: [Replacement(library, "score", "theirs", "ours")])
    with switch.block():
        with switch.block():
            switch.always(False)
            assert library.score == "ours"
        assert library.score == "ours"
    assert library.score == "theirs"
    switch.always(True)
    with pytest.raises(KeyError), switch.block():
        raise KeyError
    assert library.score == "ours"
    switch.always(False)
    assert library.score == "theirs"
