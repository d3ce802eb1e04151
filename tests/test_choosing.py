"""Whole runs that end early and keep their best round, from options and from Python, also when interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from fedra_engine import Callback, EarlyStopping, EarlyStoppingConfig, ExperimentConfig, KeepBest, Round, simulate
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands.evaluate import main as evaluate
from fedra_engine.commands.export import main as export
from fedra_engine.models.loading import resolve_model_path
from fedra_engine.run import load_run, run
from fedra_engine.runtime.errors import InputError
from tests.running import small_config

pytestmark = pytest.mark.usefixtures("quick_runs")


def config(folder: Path, **changes: Any) -> ExperimentConfig:
    """The first evaluated round, the second, is never improved on by so much; the third after it ends the run."""
    return small_config(
        folder,
        **{
            "data": {"domains": ["clean", "inverted"], "clients_per_domain": 1, "validation_fraction": 0.2},
            "clients": {"capacities": [12, 3]},
            "training": {"max_local_steps": 1},
            "rounds": 12,
            "evaluate_every": 2,
            "early_stopping": EarlyStoppingConfig(patience=2, measure="test_loss", min_improvement=100.0),
            "keep_best": "test_loss",
            **changes,
        },
    )


class Interrupt(Callback):
    """Ends the process's part in a run, after `rounds` rounds."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds

    def on_round(self, experiment: Any, state: Any, round: Round) -> None:
        if round.metrics.round + 1 == self._rounds:
            raise KeyboardInterrupt


def left_behind(folder: Path) -> dict[str, Any]:
    records = [dict(record, seconds=None) for record in RunFolder(folder).read_metrics()]
    adapters = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("best/*/*.safetensors")}
    return {"summary": json.loads((folder / "summary.json").read_text()), "records": records, "best": adapters}


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but the log and the plot, for which the tests have another one."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.log", "partition.png"))
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    return simulate(config(tmp_path_factory.mktemp("whole")), quiet=True).folder


def test_a_run_ends_early_and_keeps_its_best_round(whole: Path) -> None:
    found = left_behind(whole)
    summary, records = found["summary"], found["records"]
    assert len(records) == summary["rounds"] == 6
    evaluated = {record["round"]: sum(record["test_loss"].values()) / 2 for record in records if "test_loss" in record}
    assert list(evaluated) == [1, 3, 5]
    assert summary["stopped"] == (
        f"validation loss has not improved in 2 evaluations; the best is {evaluated[1]:#.4g}, after round 2"
    )
    best = min(evaluated, key=evaluated.__getitem__)
    assert summary["best"] == {
        "round": best,
        "measure": "test_loss",
        "value": evaluated[best],
        "accuracy": records[best]["accuracy"],
    }
    assert [path.name for path in (whole / "best").iterdir()] == [f"round_{best:04d}"]
    assert f"this one, {best + 1}, was the best by `test_loss`" in next(whole.glob("best/*/README.md")).read_text()


def test_the_best_adapter_loads_as_any_other(whole: Path) -> None:
    (folder,) = (whole / "best").iterdir()
    model = AutoModelForImageClassification.from_pretrained(
        resolve_model_path("digits_vit"), num_labels=10, ignore_mismatched_sizes=True
    )
    tuned = PeftModel.from_pretrained(model, str(folder)).state_dict()
    state = load_file(folder / "state.safetensors")["state.adapters"]
    assert sum(tensor.numel() for name, tensor in tuned.items() if "lora_" in name) == state.numel()


@pytest.mark.parametrize("rounds", [1, 4, 6])
def test_an_interrupted_run_ends_as_if_it_had_not_been(whole: Path, tmp_path: Path, rounds: int) -> None:
    """Also after it had decided to end, but before it had."""
    with pytest.raises(KeyboardInterrupt):
        simulate(config(tmp_path), callbacks=[Interrupt(rounds)], quiet=True)
    run(config(tmp_path), RunFolder(tmp_path / "run"))
    assert left_behind(tmp_path / "run") == left_behind(whole)


def test_a_run_that_ended_may_go_on_with_more_patience(whole: Path, tmp_path: Path) -> None:
    first = simulate(config(tmp_path), quiet=True)
    patient = replace(first.config.early_stopping, patience=3)
    result = run(replace(first.config, early_stopping=patient), RunFolder(first.folder))
    assert result.summary["rounds"] == len(result.history) == 8
    assert left_behind(first.folder)["records"][:6] == left_behind(whole)["records"]


class Refuse(Callback):
    def on_start(self, experiment: Any, state: Any, first_round: int) -> None:
        raise InputError("callbacks: found no server, expected one")


@pytest.mark.parametrize("callbacks", [[], [Refuse()]], ids=["a measure", "a callback"])
def test_a_run_that_may_not_go_on_stays_as_it_is(whole: Path, tmp_path: Path, callbacks: list[Callback]) -> None:
    """With the best round after the newest checkpoint, as after a kill."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "round_0005")
    shutil.copytree(next(whole.glob("best/*")), folder / "best" / "round_0005", dirs_exist_ok=True)
    before = contents(folder)
    stopping = EarlyStoppingConfig(patience=2, measure="test_loss" if callbacks else "perplexity")
    with pytest.raises(InputError, match=r"^(early_stopping\.measure: found perplexity|callbacks: found no server)"):
        run(config(tmp_path, early_stopping=stopping), RunFolder(folder), callbacks=callbacks)
    assert contents(folder) == before


@pytest.mark.parametrize("before", ["accuracy", None])
def test_a_run_does_not_go_on_with_another_measure_of_the_best_round(
    whole: Path, tmp_path: Path, before: str | None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate(config(tmp_path, keep_best=before), callbacks=[Interrupt(2)], quiet=True)
    with pytest.raises(InputError, match=r"^keep_best: found other rules .*, expected the same measure, or null to"):
        run(config(tmp_path), RunFolder(tmp_path / "run"))
    # Nothing more is kept, but what was stays.
    summary = run(config(tmp_path, keep_best=None), RunFolder(tmp_path / "run")).summary
    assert "best" not in summary
    assert (tmp_path / "run" / "best" / "round_0001").is_dir() is (before is not None)


def test_a_lost_best_round_is_named_and_no_other_called_the_best(whole: Path, tmp_path: Path) -> None:
    folder = RunFolder(Path(shutil.copytree(whole, tmp_path / "run")))
    (best,) = folder.best_folder.iterdir()
    (best / "state.safetensors").write_bytes(b"")
    summary = run(config(tmp_path), folder).summary
    assert "best" not in summary
    assert (
        f"keep_best: round {int(best.name[-4:]) + 1}, the best so far with validation loss"
        in folder.log_file.read_text()
    )
    with pytest.raises(InputError, match=r"state\.safetensors: found other bytes than were written"):
        evaluate([str(folder.path), "--best"])


def test_callbacks_from_python_choose_as_the_options_do(whole: Path, tmp_path: Path) -> None:
    plain = replace(config(tmp_path), early_stopping=EarlyStoppingConfig(), keep_best=None)
    choosing = [KeepBest(tmp_path / "kept", "test_loss"), EarlyStopping(2, "test_loss", 100.0)]
    result = simulate(plain, callbacks=choosing, quiet=True)
    expected = left_behind(whole)
    assert result.summary["stopped"] == expected["summary"]["stopped"]
    for name, content in expected["best"].items():
        assert (tmp_path / "kept" / Path(name).relative_to("best")).read_bytes() == content


def test_the_best_round_is_evaluated_again(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = json.loads((whole / "summary.json").read_text())["best"]
    capsys.readouterr()
    evaluate([str(whole), "--best", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["rounds"] == best["round"] + 1
    assert found["accuracy"] == best["accuracy"]
    evaluate([str(whole), "--best", "--json", "--data.validation_fraction", "0"])
    on_tests = json.loads(capsys.readouterr().out)
    assert on_tests["rounds"] == best["round"] + 1
    assert on_tests["test_loss"] != found["test_loss"]


def test_the_best_round_is_exported(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    best = json.loads((whole / "summary.json").read_text())["best"]
    export([str(folder), "--best"])
    capsys.readouterr()
    evaluate([str(folder), "--model", str(folder / "best_model"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(best["accuracy"], abs=1e-6)
    assert sum(found["test_loss"].values()) / 2 == pytest.approx(best["value"], rel=1e-4)
    assert (
        f"this one, {best['round'] + 1}, was the best by `test_loss`" in (folder / "best_model/README.md").read_text()
    )
    result = load_run(folder)
    last = result.state
    result.save_model(tmp_path / "of_client", client=1, best=True)
    card = (tmp_path / "of_client" / "README.md").read_text()
    rounds = best["round"] + 1
    assert f"in {rounds} rounds" in card
    assert f"weights those after round {rounds}, the best by `test_loss`" in card
    assert result.state is last
    shutil.rmtree(folder / "best")
    with pytest.raises(InputError, match=r"best: found no round, expected one of a run that had keep_best"):
        load_run(folder).save_model(tmp_path / "never", best=True)


def test_a_method_that_predicts_by_more_than_the_adapter_keeps_its_best_round(tmp_path: Path) -> None:
    clients_own = config(tmp_path, method={"name": "fedsalora"}, keep_best="accuracy", rounds=2)
    result = simulate(replace(clients_own, early_stopping=EarlyStoppingConfig()), quiet=True)
    (folder,) = (result.folder / "best").iterdir()
    assert "was not measured, but that of the clients' own models" in (folder / "README.md").read_text()
    kept, last = (load_file(at / "private.safetensors") for at in (folder, result.folder / "adapters"))
    assert kept.keys() == last.keys()
    assert all(torch.equal(kept[name], last[name]) for name in kept)


def test_the_end_names_the_samples_and_the_best_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(config(tmp_path, rounds=2, evaluate_every=1, early_stopping=EarlyStoppingConfig()))
    (best,) = (result.folder / "best").iterdir()
    said = capsys.readouterr().out
    assert "\nvalidation accuracy (%)  " in said
    assert f"\nbest round  {best}\n" in said
    command = f"fedra evaluate {result.folder} --best --data.validation_fraction 0"
    assert f"\nbest round on the test samples:  {command}\n" in said
