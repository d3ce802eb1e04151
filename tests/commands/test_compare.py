"""The command line of `compare`: which runs it asks for, and one clear line for what it cannot mean."""

import re
import shlex
from pathlib import Path

import pytest

from fedra_engine.commands.compare import parse_comparison
from fedra_engine.runtime.errors import InputError
from fedra_engine.studies.plan import Comparison


def names(comparison: Comparison) -> list[str | None]:
    return [run.config.name for run in comparison.runs]


def test_every_method_runs_with_every_seed_the_first_seed_of_all_first() -> None:
    comparison = parse_comparison(["--methods=fedra,alllarge", "--seeds=0,7", "--rounds=3"])
    assert names(comparison) == ["fedra-seed0", "alllarge-seed0", "fedra-seed7", "alllarge-seed7"]
    assert [run.config.method.name for run in comparison.runs] == ["fedra", "alllarge"] * 2
    assert [run.config.seed for run in comparison.runs] == [0, 0, 7, 7]
    assert {run.config.rounds for run in comparison.runs} == {3}
    assert comparison.output_dir == Path("runs/compare")
    assert comparison.runs[0].path == Path("runs/compare/fedra-seed0")


def test_a_configuration_file_holds_for_all_runs(tmp_path: Path) -> None:
    file = tmp_path / "setting.yaml"
    file.write_text("seed: 5\nmethod: {name: alllarge, weighting: samples}\noutput_dir: elsewhere\n")
    comparison = parse_comparison(
        ["--config", str(file), "--methods", "fedra", "--seeds", "1", "--jobs", "2", "--control=false"]
    )
    (run,) = comparison.runs
    assert (run.config.seed, run.config.method.name, run.config.method.weighting) == (1, "fedra", "samples")
    assert (run.path, comparison.jobs) == (Path("elsewhere/fedra-seed1"), 2)


def test_a_variant_changes_its_own_run_only_and_is_named_after_what_it_changes() -> None:
    entry = "fedra:method.allocation=covered:clients.capacities=[4,3,2,2,2,2]:training.lr=0.01"
    plain, variant = parse_comparison([f"--methods=fedra,{entry}", "--control=false"]).runs
    assert (plain.label, plain.config.method.allocation, plain.config.training.lr) == ("fedra", None, 0.005)
    assert (variant.config.method.allocation, variant.config.training.lr) == ("covered", 0.01)
    assert variant.config.clients.capacities == [4, 3, 2, 2, 2, 2]
    assert variant.title == "fedra allocation=covered clients.capacities=[4,3,2,2,2,2] training.lr=0.01 seed 0"
    assert variant.path.name == "fedra-allocation=covered-clients.capacities=4-3-2-2-2-2-training.lr=0.01-seed0"


def test_the_command_in_the_study_of_pacs_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "configs" / "experiments" / "pacs_study.yaml").read_text()
    (found,) = re.findall(r"^#   (fedra compare .*?)\n#\n", text, flags=re.DOTALL | re.MULTILINE)
    # A shell joins lines at a backslash.
    command = re.sub("<.*?>", str(tmp_path), found.replace("\\\n#   ", ""))
    name, compare, *arguments = shlex.split(command)
    assert (name, compare) == ("fedra", "compare")
    comparison = parse_comparison(arguments)
    assert len(comparison.entries) == 10
    assert [len(entry) for entry in points(comparison)] == [4] * 10


def points(comparison: Comparison) -> list[list[str]]:
    return [[candidate.point for candidate in candidates] for candidates in comparison.entries]


def test_the_full_depth_control_is_added_unless_there_is_one_or_it_is_refused() -> None:
    control = parse_comparison(["--methods=fedra,allsmall"]).runs[-1]
    assert (control.label, control.config.method.name) == ("alllarge ignore_capacities=true", "alllarge")
    assert control.config.method.ignore_capacities
    assert names(parse_comparison(["--methods=fedra", "--control=false"])) == ["fedra-seed0"]
    assert names(parse_comparison(["--methods=fedra,alllarge:training.lr=0.1"]))[1:] == [
        "alllarge-training.lr=0.1-seed0"
    ]


def test_the_control_has_one_rank_and_no_allocation_whatever_the_others_have() -> None:
    given = ["--methods=fedra", "--method.allocation=covered", "--clients.ranks=[8,8,4,4,2,2]"]
    fedra, control = parse_comparison(given).runs
    assert (fedra.config.method.allocation, fedra.config.clients.ranks) == ("covered", [8, 8, 4, 4, 2, 2])
    assert (control.config.method.allocation, control.config.clients.ranks) == (None, [])


GRID = "--grid=training.lr=0.003,0.01,0.03:training.lr_schedule=constant,cosine"


def test_every_entry_tries_all_points_that_it_does_not_fix_and_runs_with_one() -> None:
    entries = "fedra,flora:training.lr=0.1,fedit:training.lr=0.1:training.lr_schedule=linear"
    comparison = parse_comparison([f"--methods={entries}", GRID, "--seeds=3,4", "--control=false"])
    schedules = ["training.lr_schedule=constant", "training.lr_schedule=cosine"]
    both = [f"training.lr={lr} {schedule}" for lr in (0.003, 0.01, 0.03) for schedule in schedules]
    assert points(comparison) == [both, schedules, [""]]
    fedra, flora, (fedit,) = comparison.entries
    assert [candidate.at_edge for candidate in fedra] == [*[("training.lr",)] * 2, *[()] * 2, *[("training.lr",)] * 2]
    assert fedit.trial is None
    trial, runs = fedra[3].trial, fedra[3].runs
    assert trial.path == Path("runs/compare/grid/fedra-training.lr=0.01-training.lr_schedule=cosine-seed3")
    assert (trial.is_trial, trial.config.data.validation_fraction) == (True, 0.2)
    assert [run.path.name for run in runs] == [
        f"fedra-training.lr=0.01-training.lr_schedule=cosine-seed{seed}" for seed in (3, 4)
    ]
    for run in (trial, *runs):
        assert (run.config.training.lr, run.config.training.lr_schedule) == (0.01, "cosine")
    assert [(run.label, run.is_trial, run.config.data.validation_fraction) for run in runs] == [("fedra", False, 0)] * 2
    assert flora[0].trial.title == "flora training.lr=0.1 training.lr_schedule=constant seed 3"
    assert len({run.path for run in (*comparison.trials, *comparison.runs)}) == 8 + 2 * 9


def test_the_grid_takes_the_fraction_of_the_configuration() -> None:
    given = ["--methods=fedra", GRID, "--data.validation_fraction=0.5"]
    comparison = parse_comparison(given)
    assert {trial.config.data.validation_fraction for trial in comparison.trials} == {0.5}
    assert {run.config.data.validation_fraction for run in comparison.runs} == {0.0}
    whole = parse_comparison([given[0], given[2]])
    assert {run.config.data.validation_fraction for run in whole.runs} == {0.5}


def test_a_field_that_does_nothing_is_no_part_of_a_point() -> None:
    """FedRA has no exits, and SGD alone a momentum; 0.9 is the usual one."""
    grid = "--grid=method.depthfl.exit_every=2,4:training.optimizer=sgd,adamw:training.momentum=0.5,0.9"
    fedra, depthfl = points(parse_comparison(["--methods=fedra,depthfl", grid, "--control=false"]))
    assert fedra == [
        "training.optimizer=sgd training.momentum=0.5",
        "training.optimizer=sgd training.momentum=0.9",
        "training.optimizer=adamw",
    ]
    assert len(depthfl) == 6


def test_an_entrys_own_field_needs_an_effect_at_one_point() -> None:
    grid = "--grid=training.optimizer=sgd,adamw"
    ((sgd, adamw),) = parse_comparison(["--methods=fedra:training.momentum=0.5", grid, "--control=false"]).entries
    assert (sgd.runs[0].config.training.momentum, adamw.runs[0].config.training.momentum) == (0.5, 0.9)


def test_the_control_does_not_try_what_it_refuses() -> None:
    comparison = parse_comparison(["--methods=fedra", "--grid=method.allocation=uniform,covered"])
    assert points(comparison) == [["allocation=uniform", "allocation=covered"], [""]]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("training.lr", r"grid: found 'training\.lr' in 'training\.lr', expected <field>=<value>"),
        ("training.lr=0.1", r"grid: found one point 'training\.lr=0\.1', expected several"),
        ("training.lr=0.1,0.2,1e-1", r"grid: found training\.lr=0\.1 more than once, expected every one once"),
        ("training.lr=0.1,fast", r"training\.lr: found 'fast', expected a number"),
        ("training.rl=0.1,0.2", r"grid: found an unknown field 'training\.rl' .*did you mean training\.lr\?"),
        ("training.lr=0.1,0.2:training.lr=1,2", r"grid: found training\.lr more than once in "),
        ("seed=1,2", r"grid: found seed in 'seed=1,2', expected another field"),
        ("data.validation_fraction=0.1,0.2", r"grid: found data\.validation_fraction in "),
        ("method.depthfl.exit_every=2,4", r"grid: found method\.depthfl\.exit_every, which does nothing with any"),
        ("rounds=3,4", r"grid: found rounds, which all entries of --methods have"),
    ],
)
def test_a_grid_that_cannot_be_tried_is_refused(grid: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_comparison(["--methods=fedra:rounds=2", "--control=false", f"--grid={grid}"])


@pytest.mark.parametrize("choice", ["early_stopping.patience=1", "keep_best=accuracy"])
def test_after_a_grid_no_round_is_chosen_on_test_samples(choice: str) -> None:
    """Whether the option is for all runs or of one entry, and though the grid's own runs have validation samples."""
    others = ["--control=false", "--data.validation_fraction=0.2", GRID]
    name, _, value = choice.partition("=")
    for given in (["--methods=fedra", f"--{choice}"], [f"--methods=fedra:{choice}"]):
        with pytest.raises(InputError, match=rf"^{re.escape(name)}: found {value} with --grid, whose final runs are"):
            parse_comparison([*given, *others])
        parse_comparison([*given, *others[:2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "methods: found none, expected methods separated by commas"),
        (["--methods"], "methods: found no value, expected one"),
        (["--methods=fedra,,alllarge"], "methods: found an entry '', expected the name of a method first"),
        (["--methods=fedra:rounds=1:rounds=2"], "methods: found rounds more than once in 'fedra:rounds=1:rounds=2'"),
        (["--methods=fedra,fedra"], "methods: found fedra more than once, expected every one once"),
        (["--methods=fedra:covered"], "methods: found 'covered' in 'fedra:covered', expected <field>=<value>"),
        (["--methods=fedra:seed=1"], "methods: found seed in 'fedra:seed=1', expected another field"),
        (["--methods=fedra:data.validation_fraction=0.2"], "methods: found data.validation_fraction in 'fedra:"),
        (["--methods=fedra:jobs=3"], "methods: found jobs in 'fedra:jobs=3', expected another field"),
        (
            ["--methods=fedra:method.depthfl.exit_every=2"],
            "methods: method.depthfl.exit_every: found 2 with method.name fedra, where it does nothing",
        ),
        ([f"--methods=fedra:data.domains=[{'long' * 60}]"], r"methods: found 'fedra .*\]', expected fewer fields"),
        (
            ["--methods=fedra:method.alocation=full"],
            r"methods: .* 'method.alocation' .*\(did you mean method.allocation\?\)",
        ),
        (["--methods=fedra:training.lr=fast"], "training.lr: found 'fast', expected a number"),
        (["--methods=fedra:training.lr=-1"], r"training.lr: found -1.0, expected a number above 0 and at most"),
        (["--methods=fedra", "--seeds=0,x"], "seeds: found 'x', expected a whole number from 0 to"),
        (["--methods=fedra", "--seeds=1,2,1"], "seeds: found 1 more than once"),
        (["--methods=fedra", "--jobs=0"], "jobs: found '0', expected a whole number from 1 to"),
        (["--methods=fedra", "--seed=3"], "seed: found it as an option, expected --seeds to set it"),
        (["--methods=fedra", "--seed=0,1"], "seed: found it as an option, expected --seeds to set it"),
        (["--methods=fedra", "--method.name", "flora"], "method.name: found it as an option"),
        (["--methds=fedra"], r"--methds: found an unknown option, .*did you mean --methods\?"),
        (["--method=fedra"], r"method: found no file 'fedra'; .*did you mean --methods\?"),
        (["--methods=fedra", "--rouds=3"], r"--rouds: found an unknown option, .*did you mean --rounds"),
    ],
)
def test_bad_command_lines_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_comparison(arguments)


def test_help_shows_how_to_write_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parse_comparison(["--help"])
    assert exited.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "fedra:method.allocation=covered" in shown
    assert "--seeds SEED" in shown


def test_with_a_grid_all_seeds_have_the_test_samples_that_its_runs_do_not_see() -> None:
    comparison = parse_comparison(["--methods=fedra", "--seeds=3,1", GRID, "--control=false"])
    assert {run.config.data.split_seed for run in (*comparison.trials, *comparison.runs)} == {3}
    own = parse_comparison(["--methods=fedra", "--seeds=3,1", GRID, "--control=false", "--data.split_seed=8"])
    assert {run.config.data.split_seed for run in (*own.trials, *own.runs)} == {8}
    plain = parse_comparison(["--methods=fedra", "--seeds=3,1", "--control=false"])
    assert {run.config.data.split_seed for run in plain.runs} == {None}


def test_points_whose_runs_would_share_a_folder_are_refused() -> None:
    with pytest.raises(InputError, match=r"grid: found .*fedra-data\.root=a-b-seed0 more than once"):
        parse_comparison(["--methods=fedra", "--data.source=image_folder", "--grid=data.root=a/b,a-b"])
