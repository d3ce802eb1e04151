"""Methods and allocators from outside the package run under the names that they register."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from pathlib import Path

import numpy as np
import pytest

from fedra_engine.config import MethodConfig
from fedra_engine.config.fields import field_types
from fedra_engine.config.options import option, whole
from fedra_engine.federation.allocation import prefix_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.allocators import ALLOCATORS, register_allocator
from fedra_engine.methods.base import METHODS, Method, register_method
from fedra_engine.runtime.errors import InputError
from tests.methods.rounds import CAPACITIES, DEPTH, EVERYBODY, method
from tests.running import run_experiment


@dataclass
class ShallowConfig:
    """Options of `shallow`."""

    depth: int = option(2, whole(1, 12))


@pytest.mark.usefixtures("own_names")
def test_a_method_of_ones_own_runs_with_its_options(tmp_path: Path) -> None:
    seen = []

    @register_method("shallow", ShallowConfig)
    class Shallow(Method):
        def assign(self, participants: np.ndarray, round: int) -> Assignment:
            seen.append(self.options)
            depths = np.full(len(participants), self.options.depth)
            return Assignment(prefix_allocation(depths, self.federation.depth))

    run = run_experiment(tmp_path, method={"name": "shallow", "shallow": ShallowConfig(depth=3)})
    assert (run / "summary.json").is_file()
    assert set(map(repr, seen)) == {"ShallowConfig(depth=3)"}


@pytest.mark.usefixtures("own_names")
def test_an_allocator_of_ones_own_decides_who_holds_what(tmp_path: Path) -> None:
    @register_allocator("last_blocks")
    def last_blocks(round, capacities, participants, depth, rng, federation) -> np.ndarray:
        return prefix_allocation(capacities[participants], depth)[:, ::-1]

    expected = np.arange(DEPTH)[::-1] < CAPACITIES[:, None]
    np.testing.assert_array_equal(method("fedra", allocation="last_blocks").assign(EVERYBODY, 0).held, expected)
    run = run_experiment(tmp_path, method={"name": "fedit", "allocation": "last_blocks"})
    assert (run / "summary.json").is_file()


def test_an_allocator_gets_all_capacities_and_draws_the_same_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(round, capacities, participants, depth, rng, federation) -> np.ndarray:
        np.testing.assert_array_equal(capacities, CAPACITIES)
        assert federation.depth == depth == DEPTH
        return rng.random((len(participants), depth)) < 0.5

    monkeypatch.setitem(ALLOCATORS, "drawn", drawn)
    fedra, participants = method("fedra", allocation="drawn"), np.array([1, 4])
    first, again, later = (fedra.assign(participants, round).held for round in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != later).any()


@pytest.mark.parametrize("found", [np.ones((6, DEPTH)), np.ones((5, DEPTH), dtype=bool)])
def test_an_allocation_of_another_shape_is_refused(found: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOCATORS, "wrong", lambda *_: found)
    with pytest.raises(InputError, match=r"^method\.allocation: found .* from wrong, expected bool \[6, 6\]"):
        method("fedra", allocation="wrong").assign(EVERYBODY, 0)


def test_names_of_methods_that_are_taken_are_refused() -> None:
    with pytest.raises(InputError, match=r"^method\.name: found a second fedra to register"):
        register_method("fedra")(METHODS["fedit"])


@pytest.mark.usefixtures("own_names")
def test_names_of_allocators_that_are_taken_are_refused() -> None:
    with pytest.raises(InputError, match=r"^method\.allocation: found a second uniform to register"):
        register_allocator("uniform")(ALLOCATORS["full"])


def test_an_unknown_allocator_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"^method\.allocation: found 'best', expected one of uniform, reference, "):
        method("fedra", allocation="best")


def test_what_tests_register_is_gone_after_them() -> None:
    assert "shallow" not in METHODS
    assert "shallow" not in field_types(MethodConfig)
    assert repr(MethodConfig()).count("Config(") == 1 + sum(map(is_dataclass, vars(MethodConfig()).values()))


def test_an_allocator_cannot_use_what_there_is_not() -> None:
    with pytest.raises(InputError, match=r"uses: found 'movment', expected some of movement, rounds"):
        register_allocator("mistaken", uses=["movment"])  # type: ignore[list-item]
