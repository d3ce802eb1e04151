"""The `simulate` launcher, from command line to run folder."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

IMAGES = [
    "--data.source=image_folder",
    "--data.clients_per_domain=1",
    "--data.min_samples=1",
    "--clients.capacities=[4]",
]
SMALL = ["--data.domains=[clean,noisy]", "--data.clients_per_domain=2", "--clients.capacities=[4,2]"]


@pytest.fixture
def simulate(launch: Callable[..., object]) -> Callable[..., object]:
    """A function that runs the launcher with arguments and returns its exit code."""
    return partial(launch, "simulate")


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder `empty` and images `damaged` that end too early."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Path("empty").mkdir()
    for name in ("dog", "cat"):
        folder = Path("damaged", "photo", name)
        folder.mkdir(parents=True)
        for index in range(5):
            Image.new("L", (12, 12)).save(folder / f"{index}.png")
    for image in Path("damaged").rglob("dog/*.png"):
        image.write_bytes(image.read_bytes()[:30])
    return tmp_path


def metrics(folder: Path) -> list[dict[str, object]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_a_resumed_run_ends_as_an_uninterrupted_one(simulate, tmp_path: Path) -> None:
    # A decaying rate would depend on the number of rounds, which a resumed run may then not change.
    schedule = "--training.lr_schedule=constant"
    options = [*SMALL, "--output_dir", str(tmp_path), "--evaluate_every=1", schedule]
    assert simulate(*options, "--name=whole", "--rounds=3") == 0
    assert simulate(*options, "--name=parts", "--rounds=1") == 0
    assert simulate("--resume", str(tmp_path / "parts"), "--rounds=3") == 0
    assert len(metrics(tmp_path / "whole")) == 3
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")]
    assert summaries[0] == summaries[1]
    assert simulate("--resume", str(tmp_path / "parts")) == 0
    said = (tmp_path / "parts" / "run.log").read_text()
    assert said.index("resumed after round 1 of 3 rounds") < said.index("finished before, with all of 3 rounds")


def test_config_yaml_repeats_the_run_in_a_new_folder(simulate, tmp_path: Path) -> None:
    assert simulate(*SMALL, "--output_dir", str(tmp_path), "--rounds=1", "--name=first") == 0
    assert simulate("--config", str(tmp_path / "first" / "config.yaml")) == 0
    (again,) = (path for path in tmp_path.iterdir() if path.name != "first")
    assert metrics(again) == metrics(tmp_path / "first")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds=none"], "error: rounds: found 'none', expected a whole number from 1 to "),
        (["--clients.capacities=[13]"], "error: clients.capacities: found 13, expected values from 1 to "),
        (
            ["--data.source=image_folder", "--data.root=nowhere"],
            "error: data.root: found no folder 'nowhere'",
        ),
        ([*IMAGES, "--data.root=empty"], "error: data.root: found no folders in 'empty', expected one for each domain"),
        ([*IMAGES, "--data.root=damaged"], "error: data.root: cannot read damaged/photo/dog/"),
        (["--lora.target_modules=[nothing]"], "error: lora.target_modules: found 'nothing', which matches nothing"),
        (
            ["--clients.sampling=uniform", "--clients.participants=31"],
            "error: clients.participants: found 31, expected at most the 30 clients there are",
        ),
        (
            ["--method.allocation=reference", "--seed=4294967296"],
            "error: seed: found 4294967296 with method.allocation reference",
        ),
        (["--seed=-1"], "error: seed: found -1, expected a whole number from 0 to"),
        (["--model.path=./empty"], "error: model.path: empty/config.json is missing or no JSON"),
    ],
)
def test_bad_input_is_one_line_code_2_and_no_folder(
    simulate, inputs: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert simulate("--output_dir=runs", *options) == 2
    error = capfd.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not list(inputs.glob("runs/*"))


def test_a_run_is_not_resumed_with_other_settings(simulate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(*SMALL, "--output_dir", str(tmp_path), "--name=run", "--rounds=1") == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1").replace("rounds: 1", "rounds: 2"))
    assert simulate("--resume", str(tmp_path / "run")) == 2
    assert "found other settings than" in capsys.readouterr().err


def test_a_dry_run_trains_nothing_and_leaves_nothing(simulate, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert simulate(*SMALL, "--output_dir", str(tmp_path), "--dry-run") == 0
    assert "without evaluation" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry_run", "maybe"], "dry_run: found 'maybe', expected true or false"),
        (["--dry_run", "true", "--resume", "somewhere"], "resume: found --dry_run beside it"),
    ],
)
def test_a_dry_run_asked_for_wrongly_is_refused(
    simulate, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert simulate(*arguments) == 2
    assert message in capsys.readouterr().err


def test_quiet_prints_the_results_alone_and_keeps_the_log(
    simulate, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    options = [*SMALL, "--output_dir", str(tmp_path), "--rounds=1", "--name=run", "--quiet", "--log_level=debug"]
    assert simulate(*options) == 0
    out, error = capfd.readouterr()
    assert [line.split()[0] for line in out.splitlines() if line] == ["accuracy", "frozen", "tuned", "on"]
    assert error == ""
    said = (tmp_path / "run" / "run.log").read_text()
    assert "  round 1/1  " in said
    assert "  local steps took " in said


def test_what_was_written_is_listed_at_the_end(simulate, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert simulate(*SMALL, "--output_dir", str(tmp_path), "--rounds=1", "--name=run") == 0
    listed = capfd.readouterr().out.rpartition("\n\n")[2].splitlines()
    paths = [Path(line.split(maxsplit=1)[1].removeprefix("folder  ")) for line in listed]
    names = ["run", "report.html", "adapters", "metrics.jsonl", "run.log"]
    assert [path.name for path in paths] == names
    assert all(path.exists() for path in paths)
