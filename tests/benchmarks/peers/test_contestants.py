"""The contestants' own code, in this process: all do the same round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.peers.agreement import compare, unchanged
from benchmarks.peers.export import export_work
from benchmarks.peers.job import HANDWRITTEN, Job, work_file
from benchmarks.peers.scenes import SCENES, Scene, build_scene, make_model
from benchmarks.peers.work import State, Work

IMAGES = SCENES["quick"]
TEXTS = replace(IMAGES, name="quick-texts", task="text", tokens=12)


def prepared(scene: Scene, folder: Path) -> tuple[Job, Work]:
    """A job in a scene, whose work and model are in `folder`."""
    make_model(scene, folder)
    work = export_work(build_scene(scene, folder))
    work.save(work_file(folder))
    return Job(scene.name, str(folder), "float32", "sdpa", "sweep", threads=1, idle=False), work


def run_rounds(module: str, job: Job, count: int = 1) -> list[State]:
    states: list[State] = []

    def loop(run_round: Callable[[], State]) -> None:
        states.extend({name: value.clone() for name, value in run_round().items()} for _ in range(count))

    import_module(f"benchmarks.peers.contestants.{module}").serve(job, loop)
    return states


@pytest.mark.parametrize("scene", [IMAGES, TEXTS], ids=lambda scene: scene.task)
def test_all_do_the_same_round_from_the_same_state(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a second round, which starts from the initial state again, and in bfloat16."""
    monkeypatch.setitem(SCENES, scene.name, scene)
    job, work = prepared(scene, tmp_path)
    assert sorted({len(blocks) for blocks in work.held}) == [1, 2]
    (reference,) = run_rounds("peft_loop", job)
    variants = [("peft_loop", job), ("fedra_loop", job)]
    variants += [("engine", replace(job, executor=executor)) for executor in ("sweep", "sequential", HANDWRITTEN)]
    for module, variant in variants:
        found = [compare(work.state, reference, state, "float32") for state in run_rounds(module, variant, count=2)]
        assert [each.holds for each in found] == [True, True], (module, variant, found)
    for module in ("peft_loop", "engine"):
        half = replace(job, dtype="bfloat16", attention="eager")
        (state,) = run_rounds(module, half)
        found_half = compare(work.state, reference, state, "bfloat16")
        assert found_half.holds, (module, found_half)


def test_clients_without_work_change_nothing(tmp_path: Path) -> None:
    scene = SCENES["overhead-8"]
    work = export_work(build_scene(scene, tmp_path))
    work.save(work_file(tmp_path))
    job = Job(scene.name, str(tmp_path), "float32", "sdpa", "sweep", threads=1, idle=True)
    for module in ("peft_loop", "fedra_loop", "engine"):
        (state,) = run_rounds(module, job)
        assert unchanged(work.state, state).holds, module
        assert state.keys() == work.state.keys()


def test_products_run_alone(tmp_path: Path) -> None:
    assert run_rounds("products", Job("quick", str(tmp_path), "bfloat16", "sdpa", "", threads=1, idle=False)) == [{}]
