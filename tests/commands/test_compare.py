"""The command line of `compare`: which runs it asks for, and one clear line for what it cannot mean."""

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
        (["--methods=fedra", "--seed=3"], "seed: found it as an option of its own, expected --seeds to set it"),
        (["--methods=fedra", "--seed=0,1"], "seed: found it as an option of its own, expected --seeds to set it"),
        (["--methods=fedra", "--method.name", "flora"], "method.name: found it as an option of its own"),
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
