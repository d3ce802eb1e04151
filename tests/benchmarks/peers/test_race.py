"""A small race, with the contestants that need no environment of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.peers.command import chosen, run_peers
from benchmarks.peers.entries import FEDRA_LOOP, FLOWER, PFL, Entry, entries
from benchmarks.peers.environments import version_of
from benchmarks.peers.processes import Contestant, ContestantError
from benchmarks.peers.race import Race
from benchmarks.peers.scenes import OVERHEAD, SCENES, TRAINING, Scene
from fedra_engine.runtime.errors import InputError
from tests.documented import ROOT

pytestmark = pytest.mark.slow


def test_a_quick_race_writes_its_page(tmp_path: Path) -> None:
    """All contestants do the same work, or the command would fail."""
    run_peers(quick=True, only=[], repeats=5, out=tmp_path / "page.md")
    found = json.loads((tmp_path / "page.json").read_text())
    assert found["repeats"] == 1
    raced = {scene: {standing["entry"]["label"] for standing in found["scenes"][scene]} for scene in found["scenes"]}
    assert raced == {name: {entry.label for entry in entries(SCENES[name])} for name in ("quick", "overhead-8")}
    text = (tmp_path / "page.md").read_text()
    assert all(f"\n| {label} | fp32 |" in text for label in raced["quick"])


def test_a_contestant_whose_process_ends_is_named_with_its_last_line(tmp_path: Path) -> None:
    contestant = Contestant("peers nobody", "no_such_contestant", "", tmp_path)
    with pytest.raises(ContestantError, match=r"^peers nobody: found its process ended, .*no_such_contestant"):
        contestant.wait_until_started()
    contestant.close()


def test_contestants_that_would_take_minutes_without_work_are_left_out(tmp_path: Path) -> None:
    race = Race(tmp_path, repeats=1)
    race._seconds_per_client = {FLOWER: 0.03, PFL: 0.001}
    few, many = SCENES["overhead-256"], SCENES["overhead-10000"]

    def reason(label: str, scene: Scene) -> str:
        return race._reason(scene, Entry(label, ""))

    assert reason(FLOWER, many) == "left out: about 300 s a round"
    assert "memory" in reason(FEDRA_LOOP, many)
    assert {reason(FLOWER, few), reason(FEDRA_LOOP, few), reason(PFL, many)} == {""}


def test_scenes_without_work_need_those_with_fewer_clients() -> None:
    def names(*only: str) -> list[str]:
        return [scene.name for scene in chosen([*TRAINING, *OVERHEAD], only)]

    assert names("overhead-1000", "vit192") == ["vit192", "overhead-32", "overhead-256", "overhead-1000"]
    assert names("vit192") == ["vit192"]
    assert names() == [scene.name for scene in [*TRAINING, *OVERHEAD]]


def test_an_unknown_setting_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^only: found 'vit', expected some of vit192, "):
        run_peers(quick=False, only=["vit"], repeats=1, out=None)


@pytest.mark.parametrize("environment", ["pfl", "flower"])
def test_environments_share_the_arrays_of_torch(environment: str) -> None:
    """Torch comes from the project's environment, and NumPy beside it must be the one it was made for."""
    assert f"numpy=={version_of(environment, 'numpy')}\n" in (ROOT / "constraints.txt").read_text()
