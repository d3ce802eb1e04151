"""Runs of a comparison begin, go on, are found finished, or fail alone."""

import io
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from fedra_engine.callbacks import checkpoint
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands.compare import parse_comparison
from fedra_engine.runtime import exit_codes
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.tables import PlainConsole
from fedra_engine.studies.compare import (
    Outcome,
    check_runs,
    choose,
    compare,
    execute,
    execute_all,
    shown_progress,
    warnings_named,
)
from fedra_engine.studies.plan import Candidate, PlannedRun
from fedra_engine.studies.results import read_result
from tests.studies.planned import planned_run

pytestmark = pytest.mark.usefixtures("quick_runs")

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
    assert left >= {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "adapters", "run.log"}
    assert left >= {"costs.json", "outcomes.json"}
    result, summary = read_result(run), json.loads((run.path / "summary.json").read_text())
    assert (result.label, result.seed, result.rounds) == ("fedra", 0, 2)
    assert (result.accuracy, result.frozen) == (summary["tuned"], summary["frozen"])
    records = RunFolder(run.path).read_metrics()
    assert result.seconds == records[0]["seconds"] + records[1]["seconds"]
    after_first = sum(records[0]["accuracy"].values()) / 2
    assert result.curve == {0: summary["average_frozen"], 1: after_first, 2: summary["average_tuned"]}
    assert result.outcomes.tests == {"clean": 60, "noisy": 60}
    correct = {domain: of_domain.count("1") / 60 for domain, of_domain in result.outcomes.correct.items()}
    assert correct == result.accuracy


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned_run(tmp_path)
    first = execute(run)
    monkeypatch.setattr("fedra_engine.studies.compare.train_run", None)
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
        ("outcomes.json", ""),
        ("outcomes.json", "{}"),
        ("outcomes.json", '{"samples": "x", "tests": {"clean": 2}, "correct": {"clean": "01"}}'),
        (
            "outcomes.json",
            '{"samples": "x", "tests": {"clean": 2, "noisy": 1}, "correct": {"clean": "0", "noisy": "1"}}',
        ),
        (
            "outcomes.json",
            '{"samples": "x", "tests": {"clean": 1, "noisy": 1}, "correct": {"clean": "0", "noisy": "2"}}',
        ),
        ("outcomes.json", '{"samples": "x", "tests": {"clean": "1", "noisy": 1}, "correct": null}'),
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


def test_what_a_finished_run_lacks_is_made_up_for(finished: PlannedRun, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / finished.path.name)
    run, files = planned_run(tmp_path), ("costs.json", "outcomes.json")
    before = [(run.path / name).read_text() for name in files]
    for name in files:
        (run.path / name).unlink()
    assert execute(run).note.endswith("(finished before)")
    assert [(run.path / name).read_text() for name in files] == before


def test_a_warning_says_of_which_run_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("fedra_engine.callbacks.loss_watch")
    with warnings_named("fedra lr=10% seed 1"):
        log.warning("the loss is %d %%", 3)
        log.info("nothing to see")
    assert capsys.readouterr().err == "fedra lr=10% seed 1: the loss is 3 %\n"


def test_a_trial_is_not_counted(tmp_path: Path) -> None:
    trial = replace(planned_run(tmp_path, "fedra", "--rounds=1"), is_trial=True)
    assert execute(trial).state == "done"
    assert not (trial.path / "costs.json").exists()
    assert not (trial.path / "outcomes.json").exists()


def candidates(output_dir: Path, *averages: float | None) -> tuple[list[Candidate], dict[Path, Outcome]]:
    """Candidates whose trials have these average accuracies, or have failed."""
    made, tried = [], dict[Path, Outcome]()
    for index, average in enumerate(averages):
        trial = replace(planned_run(output_dir / str(index), "fedra", "--rounds=1"), is_trial=True)
        made.append(Candidate(str(index), (), trial, ()))
        tried[trial.path] = Outcome(trial, "failed" if average is None else "done", f"note {index}")
        if average is not None:
            folder = RunFolder.create(trial.config)
            accuracy = {"clean": average + 0.1, "noisy": average - 0.1}
            folder.append_metrics({"round": 0, "seconds": 1.0, "accuracy": accuracy})
            folder.write_summary({"rounds": 1, "frozen": accuracy, "tuned": accuracy, "average_frozen": average})
    return made, tried


def test_the_best_candidate_is_chosen_and_the_earlier_of_equals(tmp_path: Path) -> None:
    made, tried = candidates(tmp_path, 0.5, None, 0.75, 0.75, 0.25)
    assert choose(made, tried) == made[2]


def test_the_only_candidate_needs_no_trial() -> None:
    only = Candidate("", (), None, ())
    assert choose([only], {}) == only


def test_there_is_no_choice_if_all_trials_failed_or_any_is_busy(tmp_path: Path) -> None:
    made, tried = candidates(tmp_path, None, None)
    failed = choose(made, tried)
    assert isinstance(failed, Outcome)
    assert (failed.state, failed.note) == ("failed", "all runs of its grid failed, the first with note 0")
    tried[made[1].trial.path] = Outcome(made[1].trial, "busy", "another process is executing it")
    busy = choose(made, tried)
    assert isinstance(busy, Outcome)
    assert busy.state == "busy"


def test_a_finished_run_without_a_round_is_named(finished: PlannedRun, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / finished.path.name)
    run = planned_run(tmp_path)
    summary = RunFolder(run.path).summary_file
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"rounds": 0}))
    RunFolder(run.path).metrics_file.write_text("")
    RunFolder(run.path).kept_metrics_file.write_text("")
    with pytest.raises(InputError, match=r"summary\.json: found something else than was written"):
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
    save = checkpoint.save_checkpoint

    def save_and_interrupt(*arguments: object) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute(run)
    assert (run.path / "checkpoints" / "round_0000").is_dir()
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    outcome = execute(run)
    assert outcome.note.endswith("(interrupted before, resumed)")
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


RECORDS = [
    {"round": 0, "loss": 1.25, "accuracy": {"a": 0.25, "b": 0.75}},
    {"round": 1, "loss": 0.5},
    {"round": 2, "loss": None},
]
"""Of a run of four rounds."""


def begun_run(output_dir: Path) -> PlannedRun:
    run = planned_run(output_dir, "fedra", "--rounds=4")
    RunFolder.create(run.config).append_metrics(*RECORDS[:1])
    return run


def wait_for(console: PlainConsole, text: str) -> None:
    """Until `text` was printed."""
    until = time.monotonic() + 60
    while text not in console.file.getvalue():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_runs_have_done_is_told_in_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedra_engine.studies.compare.SECONDS_BETWEEN_LINES", 0.01)
    run, console = begun_run(tmp_path), PlainConsole(file=io.StringIO(), force_terminal=False)
    running = {run.title: run}
    with shown_progress(console, running):
        for record in RECORDS[1:]:
            RunFolder(run.path).append_metrics(record)
            wait_for(console, f"round {record['round'] + 1} of 4")
        del running[run.title]
        RunFolder(run.path).append_metrics({"round": 3, "loss": 0.1})
    # Nothing of what an earlier command did, or of what has been reported.
    assert console.file.getvalue().splitlines() == [
        "fedra seed 0: round 2 of 4, loss 0.5000, accuracy 50.0 %",
        "fedra seed 0: round 3 of 4, loss 0.5000, accuracy 50.0 %",
    ]


def test_lines_about_a_run_are_not_many(tmp_path: Path) -> None:
    run, console = begun_run(tmp_path), PlainConsole(file=io.StringIO(), force_terminal=False)
    with shown_progress(console, {run.title: run}):
        RunFolder(run.path).append_metrics(*RECORDS[1:])
        time.sleep(0.1)
    assert console.file.getvalue() == ""


def test_a_terminal_shows_what_runs_have_done_while_they_go_on(tmp_path: Path) -> None:
    run, console = begun_run(tmp_path), PlainConsole(file=io.StringIO(), force_terminal=True, width=100)
    with shown_progress(console, {run.title: run}):
        RunFolder(run.path).append_metrics(RECORDS[1])
        wait_for(console, "fedra seed 0: round 2 of 4, loss 0.5000, accuracy 50.0 %")
        assert exit_codes._Watch.show is not None
        exit_codes._Watch.show("interrupted, closing files")
        wait_for(console, "interrupted, closing files")
    assert "round 1 of 4" not in console.file.getvalue()


def test_damaged_records_keep_nobody_from_showing_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedra_engine.studies.compare.SECONDS_BETWEEN_LINES", 0.01)
    good, damaged = begun_run(tmp_path), planned_run(tmp_path, "fedit")
    RunFolder.create(damaged.config).metrics_file.write_text('{"round": "x"}\n[]\n')
    console = PlainConsole(file=io.StringIO(), force_terminal=False)
    with shown_progress(console, {damaged.title: damaged, good.title: good}):
        RunFolder(good.path).append_metrics(RECORDS[1])
        wait_for(console, "round 2 of 4")
    assert console.file.getvalue() == "fedra seed 0: round 2 of 4, loss 0.5000, accuracy 50.0 %\n"


def test_a_method_that_there_is_not_is_known_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^method\.name: found 'fedti', expected one of fedra, "):
        check_runs([planned_run(tmp_path, "fedit"), planned_run(tmp_path, "fedti")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_leaves_out_progress_but_not_why_runs_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, quiet: bool
) -> None:
    def execute_none(runs: Sequence[PlannedRun], jobs: int, report: Callable[[Outcome], None]) -> list[Outcome]:
        outcomes = [Outcome(runs[0], "failed", "training diverged"), Outcome(runs[1], "busy", "is being executed")]
        for outcome in outcomes:
            report(outcome)
        return outcomes

    monkeypatch.setattr("fedra_engine.studies.compare.execute_all", execute_none)
    options = [
        "--methods=fedra",
        "--seeds=0,1",
        "--control=false",
        f"--output_dir={tmp_path}",
        f"--quiet={str(quiet).lower()}",
    ]
    with pytest.raises(InputError, match=r"found 1 of 2 runs that failed .*the reasons are above"):
        compare(parse_comparison(options))
    said = capsys.readouterr().out
    assert "1/2  fedra seed 0: training diverged" in said
    assert [text in said for text in ("2 runs in ", "is being executed")] == [not quiet] * 2
