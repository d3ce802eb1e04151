"""`fedra evaluate` gives what the run's own summary says, and says what it cannot evaluate."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands import evaluate
from fedra_engine.runtime.errors import InputError
from tests.running import run_experiment, small_config

FEW: dict[str, Any] = {
    "data": {"domains": ["clean", "inverted"], "clients_per_domain": 1},
    "clients": {"capacities": [12, 3]},
}


@pytest.fixture(scope="module", params=["fedra", "depthfl", "fedsalora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a method: of one model, of several exits, of clients' own models."""
    return run_experiment(tmp_path_factory.mktemp("run"), **FEW, method={"name": request.param})


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    evaluate.main([*arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_has_the_accuracies_of_its_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    found = evaluated(capsys, str(run))
    summary = json.loads((run / "summary.json").read_text())
    assert found["accuracy"] == summary["tuned"]
    assert found["rounds"] == summary["rounds"]
    assert found["loss"].keys() == summary["tuned"].keys()
    assert all(0 < loss < math.inf for loss in found["loss"].values())
    assert "perplexity" not in found
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    evaluate.main([str(run)])
    table = capsys.readouterr().out
    assert f"accuracy (%)  {100 * summary['tuned']['clean']:.1f}" in " ".join(table.split()).replace(" (%) ", " (%)  ")
    assert f"{100 * summary['average_tuned']:.1f}" in table


def test_other_domains_are_evaluated_by_the_same_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = (evaluated(capsys, str(run), *more) for more in ((), ("--data.domains=noisy,clean",)))
    assert list(other["accuracy"]) == ["noisy", "clean"]
    # Clients' own models belong to their own domains.
    is_personal = "name: fedsalora" in (run / "config.yaml").read_text()
    assert (other["loss"]["clean"] == pytest.approx(own["loss"]["clean"], rel=1e-5)) != is_personal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "evaluate: found no run, expected its folder"),
        (["nowhere"], "nowhere: found no config.yaml, expected the folder of an earlier run"),
        (["{run}", "--rounds=3"], "evaluate: found --rounds, expected options of data and execution alone"),
        (["{run}", "--data.classes=3"], "data: found 3 classes, expected as many as .* was trained on"),
        (["{run}", "--data.rot=3"], "--data.rot: found an unknown option, expected .*did you mean --data.root"),
        (["{run}", "--json=x"], "json: found 'x', expected true or false"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate.main([argument.replace("{run}", str(run)) for argument in arguments])


def test_a_run_that_has_trained_no_round_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(small_config(tmp_path, **FEW))
    with pytest.raises(InputError, match="found no checkpoint, expected a run that has trained a round"):
        evaluate.main([str(folder.path)])
