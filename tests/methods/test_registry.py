"""The methods that there are."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedra_engine.methods.registry import METHODS, make_method
from fedra_engine.runtime.errors import InputError
from tests.methods.rounds import DEPTH, federation, method


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"method\.name: found 'fedfoo', expected one of alllarge, allsmall, depthfl"):
        method("fedfoo")


def test_a_model_without_adapters_is_refused() -> None:
    """Such as one of the first blocks, of which none has adapters."""
    known = replace(federation(name="allsmall"), adapted=np.arange(DEPTH) > 3)
    message = (
        r"^lora\.layers_to_transform: found 4, 5 with method\.name allsmall, whose model has the blocks 0 to 1 alone"
    )
    with pytest.raises(InputError, match=message):
        make_method(known)


def documented_sources() -> dict[str, str]:
    """The last column of the tables of methods in the documentation."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = (line.strip("| ").split("|") for line in page.splitlines() if line.startswith("| `"))
    return {row[0].strip(" `"): row[-1].strip() for row in rows}


def test_every_method_is_documented_with_the_source_its_file_names() -> None:
    sources = documented_sources()
    assert sources.keys() == METHODS.keys()
    for name, source in sources.items():
        # Baselines are no paper of their own.
        expected = "FedRA, §4" if source in ("upper bound", "lower bound") else source
        assert expected in str(sys.modules[METHODS[name].__module__].__doc__), name


@pytest.mark.parametrize("name", METHODS)
def test_rounds_without_participants_are_assigned(name: str) -> None:
    nobody = np.array([], dtype=np.int64)
    assert method(name).assign(nobody, 0).held.shape == (0, DEPTH)
