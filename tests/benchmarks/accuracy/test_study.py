"""A study keeps what it has found, whatever ends it, and goes on from there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from benchmarks.accuracy import runs, study
from benchmarks.accuracy.pack import pack
from benchmarks.accuracy.runs import StudyRun
from benchmarks.accuracy.setting import StudySetting
from benchmarks.accuracy.study import run_study
from benchmarks.kernels.measure import device_name
from fedra_engine.callbacks.checkpoint import RunWriter
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.experiment import Experiment
from fedra_engine.runtime.errors import InputError
from tests.benchmarks.accuracy.tiny_study import SETTING

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LONG = 600.0
TWO = replace(SETTING, methods=("inclusivefl", "depthfl"))
"""Methods that remember something from round to round, and that have more than one head."""


def results(output: Path) -> dict:
    return json.loads((output / "study.json").read_text())


def rounds(output: Path, seed: int = 0) -> dict[str, int]:
    methods = results(output)["seeds"][str(seed)]["methods"]
    return {name: len(run["records"]) for name, run in methods.items()}


def states(output: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoints, by method and name."""
    tensors = {}
    with tarfile.open(output / f"runs_seed{seed}.tar") as tar:
        for name in tar.getnames():
            if name.endswith(".safetensors"):
                content = safetensors.torch.load(tar.extractfile(name).read())
                tensors |= {f"{name}: {key}": tensor for key, tensor in content.items()}
    return tensors


def comparable(output: Path) -> dict:
    """What two calls must agree on: not times, nor evaluations before the last, which depend on the calls."""
    found = results(output)["seeds"]
    for seed in found.values():
        del seed["evaluation_seconds"]
    for seed in found.values():
        for run in seed["methods"].values():
            for record in run["records"]:
                del record["seconds"]
            for record in run["records"][:-1]:
                record.pop("accuracy", None)
    return found


@pytest.fixture(scope="module")
def whole(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a study of four rounds in one call."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run_study(images, model, output, seconds=LONG, setting=TWO)
    return output


def test_a_study_in_two_calls_is_the_same_to_the_last_bit(
    images: Path, model: Path, whole: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_study(images, model, first, seconds=LONG, setting=replace(TWO, rounds=2))
    assert rounds(first) == {"inclusivefl": 2, "depthfl": 2}
    run_study(images, model, second, continue_from=first, seconds=LONG, setting=TWO)
    expected, found = states(whole), states(second)
    assert found.keys() == expected.keys()
    assert any("momentum" in name for name in found)
    # Values that do not exist yet are NaN.
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert comparable(second) == comparable(whole)
    assert [call["rounds"] for call in results(second)["calls"]] == [4, 4]


def test_a_study_leaves_few_files(whole: Path) -> None:
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["runs_seed0.tar", "study.json", "study.log", "study.md"]
    assert len(StudySetting().seeds) + 3 <= 8
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    report = (whole / "study.md").read_text()
    for method in ("inclusivefl", "depthfl"):
        assert re.search(rf"^\| {method} +\| 4 ", report, re.MULTILINE)
    assert "- command: python " in report
    assert f"- device: {device_name(torch.device('cpu'))}" in report
    assert "precision float32" in report
    log = (whole / "study.log").read_text()
    assert "inclusivefl, seed 0" in log
    assert log.count("round 4/4") == 2


def test_methods_take_turns_and_every_slice_is_on_disk_before_the_next(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice that is cut short counts; single rounds before rounds can be timed do not."""
    seen = []
    advance = StudyRun.advance

    def watch(run: StudyRun, target: int, deadline: float) -> None:
        seen.append(rounds(tmp_path) if (tmp_path / "study.json").exists() else {})
        advance(run, target, deadline)

    monkeypatch.setattr(StudyRun, "advance", watch)
    run_study(images, model, tmp_path, seconds=LONG, setting=replace(TWO, rounds=3))
    progress = [(found["inclusivefl"], found["depthfl"]) for found in seen]
    assert progress == [(0, 0), (0, 0), (0, 0), (2, 0), (2, 2), (3, 2)]


def test_methods_are_evaluated_after_every_slice_and_at_the_end(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save_runs = study.save_runs

    def watch(output: Path, seed: int, work: Path, known: dict) -> None:
        saved.append(len(RunFolder(work / "fedra").read_metrics()))
        save_runs(output, seed, work, known)

    monkeypatch.setattr(study, "save_runs", watch)
    clock = [0.0]
    monkeypatch.setattr("benchmarks.accuracy.study.time.monotonic", lambda: clock[0])
    train_round = runs.train_round

    def second_long(*arguments: Any) -> object:
        clock[0] += 1.0
        return train_round(*arguments)

    monkeypatch.setattr(runs, "train_round", second_long)
    setting = replace(TWO, methods=("fedra",), rounds=20, slice=3)
    run_study(images, model, tmp_path, seconds=8.0, setting=setting)
    records = results(tmp_path)["seeds"]["0"]["methods"]["fedra"]["records"]
    assert len(records) == 8
    assert [record["round"] + 1 for record in records if "accuracy" in record] == [3, 6, 8]
    # Once with what the frozen model can, then with each evaluation.
    assert saved == [0, 3, 6, 8]


def test_a_time_too_short_for_a_round_leaves_what_rounds_are_compared_with(
    images: Path,
    model: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.accuracy.study.time.monotonic", lambda: clock[0])
    probe = study.ridge_probe

    def slow(experiment: object) -> object:
        clock[0] = 60.0
        return probe(experiment)

    monkeypatch.setattr(study, "ridge_probe", slow)
    first, second = tmp_path / "first", tmp_path / "second"
    assert not run_study(images, model, first, seconds=20.0, setting=TWO)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"reading {images} and {model}  (after 0 s)"
    assert re.search(
        r"^seed 0  average of frozen \d+\.\d %, ridge probe \d+\.\d %  \(after 60 s\)$", "\n".join(lines), re.M
    )
    assert lines[-1] == "no round fitted into 20 s"
    found, expected = (results(output)["seeds"]["0"] for output in (first, whole))
    assert [found[key] for key in ("frozen", "probe", "tests")] == [
        expected[key] for key in ("frozen", "probe", "tests")
    ]
    assert rounds(first) == {"inclusivefl": 0, "depthfl": 0}
    # Not computed again.
    monkeypatch.setattr(study, "ridge_probe", None)
    assert run_study(images, model, second, continue_from=first, seconds=LONG, setting=TWO)
    assert comparable(second) == comparable(whole)
    assert "no round" not in capsys.readouterr().out


def test_a_study_that_has_all_rounds_says_nothing_of_time(
    images: Path, model: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_study(images, model, tmp_path, continue_from=whole, seconds=0.0, setting=TWO)
    assert "no round" not in capsys.readouterr().out


def test_a_method_that_fails_leaves_the_others_and_its_own_rounds(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_round = runs.train_round

    def fail(experiment: Experiment, state: Any, round: int, *rest: Any) -> object:
        if round == 2 and experiment.config.method.name == "inclusivefl":
            raise RuntimeError("out of memory")
        return train_round(experiment, state, round, *rest)

    monkeypatch.setattr(runs, "train_round", fail)
    assert not run_study(images, model, tmp_path, seconds=LONG, setting=TWO)
    assert rounds(tmp_path) == {"inclusivefl": 2, "depthfl": 4}
    assert "inclusivefl stopped: RuntimeError: out of memory" in (tmp_path / "study.md").read_text()
    assert "Traceback" in (tmp_path / "study.log").read_text()


def test_rounds_whose_checkpoint_could_not_be_written_are_trained_again(
    images: Path, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunWriter.save

    def fail(self: RunWriter, experiment: Experiment, state: Any, rounds: Any) -> None:
        if rounds[-1].metrics.round == 3:
            raise OSError("disk full")
        save(self, experiment, state, rounds)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "save", fail)
        assert not run_study(images, model, tmp_path / "first", seconds=LONG, setting=TWO)
    assert rounds(tmp_path / "first") == {"inclusivefl": 2, "depthfl": 2}
    assert run_study(images, model, tmp_path / "second", continue_from=tmp_path / "first", seconds=LONG, setting=TWO)
    torch.testing.assert_close(states(tmp_path / "second"), states(whole), rtol=0, atol=0, equal_nan=True)
    assert rounds(tmp_path / "second") == {"inclusivefl": 4, "depthfl": 4}


def test_time_that_is_over_stops_within_a_slice(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.accuracy.study.time.monotonic", lambda: clock[0])
    train_round = runs.train_round

    def slow_from_the_third(experiment: Experiment, state: Any, round: int, *rest: Any) -> object:
        clock[0] += 1.0 if round < 2 else 100.0
        return train_round(experiment, state, round, *rest)

    monkeypatch.setattr(runs, "train_round", slow_from_the_third)
    setting = replace(TWO, rounds=20, slice=10)
    # The rounds, whose times as measured are short, seem to fit.
    assert run_study(images, model, tmp_path, seconds=50.0, setting=setting)
    assert rounds(tmp_path) == {"inclusivefl": 3, "depthfl": 2}
    assert not run_study(images, model, tmp_path / "none", seconds=0.0, setting=setting)
    assert results(tmp_path / "none")["seeds"] == {}


def test_another_seed_follows_when_all_rounds_are_done(images: Path, model: Path, tmp_path: Path) -> None:
    setting = replace(SETTING, methods=("fedra",), rounds=1, seeds=(0, 1))
    first, second = tmp_path / "first", tmp_path / "second"
    run_study(images, model, first, seconds=LONG, setting=replace(setting, seeds=(0,)))
    run_study(images, model, second, continue_from=first, seconds=LONG, setting=setting)
    assert (second / "runs_seed0.tar").is_file()
    assert (rounds(second, 0), rounds(second, 1)) == ({"fedra": 1}, {"fedra": 1})
    assert results(second)["calls"][-1]["rounds"] == 1
    assert "## All seeds" in (second / "study.md").read_text()


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"learning_rate": 0.02}, "learning_rate"), ({"image_size": 12}, "image_size"), ({"rank": 1}, "rank")],
)
def test_a_study_of_another_setting_is_not_continued(
    images: Path, model: Path, whole: Path, tmp_path: Path, changes: dict, what: str
) -> None:
    setting = replace(TWO, rounds=6, **changes)
    with pytest.raises(InputError, match=f"continue: found another {what} than in"):
        run_study(images, model, tmp_path, continue_from=whole, seconds=LONG, setting=setting)


def test_a_study_of_other_images_is_not_continued(images: Path, model: Path, whole: Path, tmp_path: Path) -> None:
    for domain in images.iterdir():
        (tmp_path / "fewer" / domain.name).mkdir(parents=True)
        for name in domain.iterdir():
            target = tmp_path / "fewer" / domain.name / name.name
            target.mkdir()
            for file in sorted(name.iterdir())[1:]:
                (target / file.name).symlink_to(file)
    setting = replace(TWO, rounds=6)
    with pytest.raises(InputError, match="continue: found another images than in"):
        run_study(tmp_path / "fewer", model, tmp_path / "out", continue_from=whole, seconds=LONG, setting=setting)


def test_damaged_or_missing_earlier_results_are_named(images: Path, model: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"continue: found no folder .*none"):
        run_study(images, model, tmp_path / "out", continue_from=tmp_path / "none", seconds=LONG, setting=TWO)
    with pytest.raises(InputError, match=r"continue: found no intact study\.json in"):
        run_study(images, model, tmp_path / "out", continue_from=images, seconds=LONG, setting=TWO)
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "study.json").write_bytes((whole / "study.json").read_bytes())
    (earlier / "runs_seed0.tar").write_bytes((whole / "runs_seed0.tar").read_bytes()[:700])
    with pytest.raises(InputError, match=r"runs_seed0\.tar: found a damaged archive"):
        run_study(images, model, tmp_path / "out", continue_from=earlier, seconds=LONG, setting=TWO)


def test_a_pack_is_studied_without_data_set_libraries(images: Path, model: Path, tmp_path: Path) -> None:
    pack(images, model, tmp_path / "pack", image_size=SETTING.image_size)
    script = """
import sys
from importlib.machinery import PathFinder
absent, find_spec = {"datasets", "pyarrow", "xxhash", "deepspeed"}, PathFinder.find_spec
def find(name, *rest):
    return None if name.partition(".")[0] in absent else find_spec(name, *rest)
PathFinder.find_spec = staticmethod(find)
from dataclasses import replace
from pathlib import Path
from benchmarks.accuracy.study import run_study
from tests.benchmarks.accuracy.tiny_study import SETTING
packed, images, output = map(Path, sys.argv[1:])
setting = replace(SETTING, rounds=1)
assert run_study(packed, packed, output, seconds=600, setting=setting)
# Images as files, too.
assert run_study(images, packed, output / "files", seconds=600, setting=replace(setting, methods=("fedra",)))
"""
    arguments = [str(tmp_path / "pack"), str(images), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=True)
    assert rounds(tmp_path / "out") == dict.fromkeys(SETTING.methods, 1)
