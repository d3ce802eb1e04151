"""Runs of a comparison begin, go on, are found finished, or fail alone."""

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from fedra_engine import simulation
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.comparison.plan import PlannedRun
from fedra_engine.comparison.runs import check_runs, execute, read_result
from fedra_engine.comparison.workers import execute_all
from fedra_engine.runtime.errors import InputError
from tests.comparison.planned import planned_run

DIVERGING = ["--training.optimizer=sgd", "--training.lr=1e30", "--training.clip_norm=null"]


def losses(run: PlannedRun) -> list[float]:
    return [record["loss"] for record in RunFolder(run.path).read_metrics()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> PlannedRun:
    run = planned_run(tmp_path_factory.mktemp("finished"))
    assert execute(run).state == "done"
    return run


def test_a_run_leaves_an_ordinary_run_folder_and_its_costs(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    outcome = execute(run)
    assert outcome.state == "done"
    left = {entry.name for entry in run.path.iterdir()}
    assert left >= {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "adapters", "run.log", "costs.json"}
    result, summary = read_result(run), json.loads((run.path / "summary.json").read_text())
    assert (result.label, result.seed, result.rounds) == ("fedra", 0, 2)
    assert (result.accuracy, result.frozen) == (summary["tuned"], summary["frozen"])
    records = RunFolder(run.path).read_metrics()
    assert result.seconds == records[0]["seconds"] + records[1]["seconds"]
    after_first = sum(records[0]["accuracy"].values()) / 2
    assert result.curve == {0: summary["average_frozen"], 1: after_first, 2: summary["average_tuned"]}


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned_run(tmp_path)
    first = execute(run)
    monkeypatch.setattr("fedra_engine.comparison.runs.Simulation", None)
    no_matter = ["--evaluate_every=5", "--execution.lanes=1"]
    again = execute(planned_run(tmp_path, "fedra", *no_matter))
    assert again.state == "done"
    assert again.note == f"{first.note} (finished before)"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", ""),
        ("summary.json", "[]"),
        ("summary.json", '{"rounds": 2}'),
        ("summary.json", '{"rounds": "2", "frozen": {}, "tuned": {}}'),
        ("summary.json", '{"rounds": 2, "average_frozen": 0.1, "frozen": {"a": 0.1}, "tuned": {"a": NaN}}'),
        ("summary.json", "[" * 100_000),
        (
            "summary.json",
            '{"rounds": 2, "average_frozen": NaN, "frozen": {"a": 0.1}, "tuned": {"a": 0.1}}',
        ),
        ("summary.json", f'{{"rounds": {"9" * 400}, "average_frozen": {"9" * 400}}}'),
        ("costs.json", ""),
        ("costs.json", "{}"),
        ("costs.json", '{"trainable_parameters": 1, "uploaded_bytes": "x", "training_flops": 1}'),
        ("costs.json", '{"trainable_parameters": 1, "uploaded_bytes": -1, "training_flops": 1}'),
        ("costs.json", '{"trainable_parameters": 1, "uploaded_bytes": NaN, "training_flops": 1}'),
        ("costs.json", '{"trainable_parameters": 1, "uploaded_bytes": "2", "training_flops": 1}'),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", "\n"),
        ("metrics.jsonl", "{}\n{}\n"),
        ("metrics.jsonl", '{"round": 0, "seconds": null}\n{"round": 1, "seconds": 1}\n'),
    ],
)
def test_a_damaged_file_fails_its_run_alone_and_is_named(
    finished: PlannedRun, tmp_path: Path, file: str, content: str
) -> None:
    shutil.copytree(finished.path, tmp_path / finished.path.name)
    run = planned_run(tmp_path)
    (run.path / file).write_text(content)
    outcome = execute(run)
    assert outcome.state == "failed"
    assert outcome.note.startswith(f"{run.path / file}: ")
    assert (run.path / file).read_text() == content


def test_a_finished_run_without_a_round_is_named(finished: PlannedRun, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / finished.path.name)
    run = planned_run(tmp_path)
    summary = RunFolder(run.path).summary_file
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"rounds": 0}))
    RunFolder(run.path).metrics_file.write_text("")
    RunFolder(run.path).kept_metrics_file.write_text("")
    with pytest.raises(InputError, match=r"summary\.json: found something else than a run wrote"):
        read_result(run)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [("summary.json", "tuned", 0.99), ("summary.json", "average_frozen", 0.99), ("metrics.jsonl", "loss", 0.5)],
)
def test_an_edited_result_is_not_taken_over(
    finished: PlannedRun, tmp_path: Path, file: str, field: str, value: float
) -> None:
    shutil.copytree(finished.path, tmp_path / finished.path.name)
    run = planned_run(tmp_path)
    *before, last = (
        (run.path / file).read_text().splitlines() if file.endswith("l") else [(run.path / file).read_text()]
    )
    edited = json.loads(last)
    edited[field] = dict.fromkeys(edited[field], value) if field == "tuned" else value
    (run.path / file).write_text("".join(f"{line}\n" for line in (*before, json.dumps(edited))))
    outcome = execute(run)
    assert outcome.state == "failed"
    assert outcome.note.startswith(f"{run.path / file}: found ")


def test_an_interrupted_run_goes_on_from_its_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned_run(tmp_path / "whole", "fedsalora", "--rounds=3")
    execute(whole)
    run = planned_run(tmp_path / "parts", "fedsalora", "--rounds=3")
    save = simulation.save_checkpoint

    def save_and_interrupt(*arguments: object) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "save_checkpoint", save_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute(run)
    assert (run.path / "checkpoints" / "round_0000").is_dir()
    monkeypatch.setattr(simulation, "save_checkpoint", save)
    outcome = execute(run)
    assert outcome.note.endswith("(interrupted before, went on)")
    assert losses(run) == losses(whole)
    assert read_result(run).accuracy == read_result(whole).accuracy


@pytest.mark.parametrize("name", ["diary.txt", ".git", ".lock"])
def test_a_folder_of_something_else_is_named_before_the_first_run_and_left_alone(tmp_path: Path, name: str) -> None:
    run = planned_run(tmp_path)
    run.path.mkdir()
    (run.path / name).write_text("Monday")
    with pytest.raises(InputError, match="fedra-seed0: found something that is no run"):
        check_runs([planned_run(tmp_path, "fedit"), run])
    outcome = execute(run)
    assert outcome.state == "failed"
    assert "found something that is no run" in outcome.note
    assert (run.path / name).read_text() == "Monday"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--training.lr=0.01", r"training\.lr: found 0\.005 in .*fedra-seed0/config\.yaml, expected 0\.01"),
        ("--rounds=3", r"rounds: found 2 in .*config\.yaml, expected 3"),
        ("--method.weighting=samples", r"method\.weighting: found uniform in .*, expected samples"),
        ("--data.dirichlet_alpha=0.1", r"data\.dirichlet_alpha: found 0\.5 in .*, expected 0\.1"),
    ],
)
def test_a_run_with_other_settings_is_named_before_the_first_run(tmp_path: Path, option: str, message: str) -> None:
    RunFolder.create(planned_run(tmp_path).config)
    runs = [planned_run(tmp_path, "fedit", option), planned_run(tmp_path, "fedra", option)]
    with pytest.raises(InputError, match=message):
        check_runs(runs)


def test_a_method_that_cannot_work_with_the_setting_fails_alone(tmp_path: Path) -> None:
    runs = [planned_run(tmp_path, method, "--rounds=1") for method in ("alllarge", "fedra")]
    failed, done = execute_all(runs, 1, lambda outcome: None)
    assert (failed.state, done.state) == ("failed", "done")
    assert failed.note.startswith("clients.capacities: found at most 4 of 12 blocks with method.name alllarge")
    assert not runs[0].path.exists()


def test_options_that_only_one_method_refuses_fail_that_method_alone(tmp_path: Path) -> None:
    entries = ("flora", "flexlora", "fedra")
    runs = [planned_run(tmp_path, entry, "--rounds=1", "--server.optimizer=fedavgm") for entry in entries]
    check_runs(runs)
    outcomes = execute_all(runs, 1, lambda outcome: None)
    assert [outcome.state for outcome in outcomes] == ["failed", "failed", "done"]
    for name, outcome in zip(entries[:2], outcomes[:2], strict=True):
        assert outcome.note.startswith(f"server: found optimizer fedavgm with lr 0.1 and method.name {name}, expected ")


def test_what_to_know_of_a_method_is_reported_also_when_it_has_finished_before(tmp_path: Path) -> None:
    run = planned_run(tmp_path, "hetlora", "--rounds=1")
    for outcome in (execute(run), execute(run)):
        assert outcome.note.endswith(
            "; note: hetlora with one rank, 8, for all clients: clients.ranks gives them different ones"
        )
    assert outcome.note.count("(finished before)") == 1
    assert read_result(run).caution in outcome.note


@pytest.mark.parametrize("entry", ["fedra", "flexlora", "fedhello:method.fedhello.fisher_every=1"])
def test_a_run_that_diverges_fails(entry: str, tmp_path: Path) -> None:
    run = planned_run(tmp_path, entry, *DIVERGING)
    outcome = execute(run)
    assert outcome.state == "failed"
    assert outcome.note.startswith(
        "training.on_bad_update: found a loss, gradients or parameters that are not finite in"
    )


def test_a_run_of_another_process_is_left_to_it_and_looked_after_at_the_end(tmp_path: Path) -> None:
    runs = [planned_run(tmp_path, method, "--rounds=1") for method in ("fedra", "fedit")]
    elsewhere = FileLock(runs[0].lock_file)
    elsewhere.acquire()
    told = []

    def report(outcome) -> None:
        told.append((outcome.run.label, outcome.state))
        if outcome.run.label == "fedit":
            elsewhere.release()

    outcomes = execute_all(runs, 1, report)
    assert told == [("fedra", "busy"), ("fedit", "done"), ("fedra", "done")]
    assert {outcome.state for outcome in outcomes} == {"done"}


def test_a_run_that_stays_with_another_process_is_busy(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    with FileLock(run.lock_file):
        (outcome,) = execute_all([run], 1, lambda outcome: None)
    assert outcome.state == "busy"
    assert not run.path.exists()


def test_a_method_that_there_is_not_is_known_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^method\.name: found 'fedti', expected one of fedra, "):
        check_runs([planned_run(tmp_path, "fedit"), planned_run(tmp_path, "fedti")])
    assert not list(tmp_path.iterdir())
