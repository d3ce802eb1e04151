"""The command line: what the options make, and one clear line for what they cannot."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedra_engine.checkpoint import save_checkpoint
from fedra_engine.config import ExperimentConfig
from fedra_engine.errors import InputError
from fedra_engine.exit_codes import BAD_INPUT, exit_code
from fedra_engine.reporting.run_folder import RunFolder, setting_digest
from fedra_engine.run_request import RunRequest, parse_request

CONFIGS = Path(__file__).parents[1] / "configs" / "experiments"


def parse(*arguments: str) -> RunRequest:
    return parse_request(arguments, "")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def make_run(tmp_path: Path, rounds: int = 5, lr_schedule: str = "constant", done: int = 0) -> RunFolder:
    config = ExperimentConfig(rounds=rounds, name="earlier", output_dir=str(tmp_path))
    config.training.lr_schedule = lr_schedule
    folder = RunFolder.create(config)
    for round in range(done):
        folder.append_metrics({"round": round})
        save_checkpoint(folder.path, round, {"head": torch.zeros(2)}, {"setting": setting_digest(config)})
    return folder


def rounds_of(folder: RunFolder) -> list[int]:
    return [record["round"] for record in folder.read_metrics()]


def test_no_options_are_the_defaults() -> None:
    assert parse().config == ExperimentConfig()
    assert parse().resumed is None


def test_options_reach_their_fields_and_come_after_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "rounds: 7\ntraining:\n  lr: 1e-3\n  clip_norm: null\n  betas: [0.5, 0.6]\n")
    config = parse("--config", path, "--rounds", "5", "--lora.target_modules", "[a, b]", "--method.name=x").config
    assert (config.rounds, config.lora.target_modules, config.method.name) == (5, ["a", "b"], "x")
    assert (config.training.lr, config.training.clip_norm, config.training.betas) == (1e-3, None, (0.5, 0.6))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    root = ["--data.root", "images"] if "image_folder" in path.read_text() else []
    assert parse("--config", str(path), *root).config.rounds > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--foo", "3"], "--foo: found an unknown option, expected one that --help lists"),
        (["--round", "3"], "--round: found an unknown option, expected .* (did you mean --rounds?)"),
        (["--data.rot=x"], "--data.rot: found an unknown option, expected .* (did you mean --data.root?)"),
        (["--rounds", "x"], "rounds: found x, expected a whole number"),
        (["--rounds", "1.5"], "rounds: found 1.5, expected a whole number"),
        (["--rounds", "0"], "rounds: found 0, expected a whole number from 1 up"),
        (["--rounds"], "rounds: found no value, expected one"),
        (["--data.image_size", "x"], "data.image_size: found x, expected a whole number or null"),
        (
            ["--clients.capacities", "[a]"],
            "clients.capacities: found ['a'], expected a list (a whole number each) or memory",
        ),
        (["--clients.capacities=x"], "clients.capacities: found x, expected a list (a whole number each) or memory"),
        (["--clients.devices=5"], "clients.devices: found 5, expected a list (fields compute, upload, "),
        (["--clients.devices=[null]"], "clients.devices: found None, expected a list (fields compute, upload, "),
        (["--clients.devices=[{speed: 1}]"], "clients.devices: found an unknown field speed, expected a list (fields "),
        (["--clients.devices=[{compute: fast}]"], "clients.devices: found fast, expected a list (fields compute, "),
        (["--training.betas", "[1]"], "training.betas: found [1], expected a list of 2 (a number each)"),
        (["--data.source", "x"], "data.source: found x, expected one of digits, image_folder"),
        (["--trace", "maybe"], "trace: found maybe, expected true or false"),
        (["--lora", "3"], "lora: found '3', expected a YAML file, or options --lora.<field>"),
        (["--config", "none.yaml"], "config: found no file .*none.yaml, expected a YAML file"),
        (["--resume"], "resume: found no value, expected one"),
        (["--resume", "none"], "none: found no config.yaml, expected the folder of an earlier run"),
        (
            ["--resume", "none", "--seed", "1"],
            "resume: found --seed beside it, expected no other option than",
        ),
    ],
)
def test_unusable_options_are_told(arguments: list[str], message: str) -> None:
    check_error(arguments, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rouds: 3\n", "rouds: found an unknown field in .*bad.yaml, expected .* (did you mean rounds?)"),
        (
            "data:\n  rot: x\n",
            "data.rot: found an unknown field in .*bad.yaml, expected .* (did you mean data.root?)",
        ),
        ("data: 3\n", "data: found 3, expected fields of it: source, root"),
        ("rounds: 3\ndata:\n", "data: found None, expected fields of it: source, root"),
        ("rounds: null\n", "rounds: found null, expected a whole number"),
        ("training:\n  lr: fast\n", "training.lr: found fast, expected a number"),
        ("lora:\n  target_modules: [a, 3]\n", "lora.target_modules: found ['a', 3], expected a list"),
        ("", "config: found nothing in .*bad.yaml, expected fields and values"),
        ("- a\n", "config: found - a in .*bad.yaml, expected fields and values"),
        ("a: b: c\n", "config: .* in .*bad.yaml; expected a YAML file of fields and values"),
        (b"\xff\xfe\x00", "config: .* in .*bad.yaml; expected a YAML file of fields and values"),
    ],
)
def test_unusable_files_are_told(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    check_error(["--config", str(path)], message)


def check_error(arguments: list[str], message: str) -> None:
    """Parsing fails with one line that begins with `message`, in which `.*` is anything."""
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert re.match(".*".join(map(re.escape, message.split(".*"))), text), text


def test_bad_input_is_one_line_on_stderr_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise InputError("data.root: found\n  nothing")

    assert exit_code(main) == BAD_INPUT == 2
    captured = capsys.readouterr()
    assert captured.err == "error: data.root: found nothing\n"
    assert captured.out == ""


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    assert exit_code(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_explains_every_field_without_waiting_for_torch() -> None:
    program = (
        "import sys\n"
        "from fedra_engine.run_request import parse_request\n"
        "try:\n    parse_request(['--help'], '')\n"
        "finally:\n    assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for text in ("--training.max_local_steps", "upper limit of a client's local steps", "--resume FOLDER"):
        assert text in done.stdout


def test_a_resumed_run_has_its_own_configuration(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=5, done=3)
    request = parse("--resume", str(folder.path))
    assert request.config.rounds == 5
    with request.open_folder() as opened:
        assert opened.path == folder.path
    assert rounds_of(opened) == [0, 1, 2]


def test_a_resumed_run_may_have_more_rounds_and_remembers_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=5, done=3)
    with parse("--resume", str(folder.path), "--rounds", "9").open_folder():
        pass
    assert parse("--resume", str(folder.path)).config.rounds == 9


def test_a_resumed_run_forgets_metrics_without_a_checkpoint(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=3)
    folder.append_metrics({"round": 3})
    with parse("--resume", str(folder.path)).open_folder() as opened:
        assert rounds_of(opened) == [0, 1, 2]


def test_a_resumed_run_goes_back_to_the_checkpoint_that_is_intact(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=3, done=3)
    (folder.path / "checkpoints" / "round_0002" / "state.json").write_text("{")
    with parse("--resume", str(folder.path)).open_folder() as opened:
        assert rounds_of(opened) == [0, 1]


def test_a_run_without_an_intact_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=3)
    for file in folder.path.glob("checkpoints/*/state.safetensors"):
        file.write_bytes(b"")
    before = folder.config_file.stat().st_mtime_ns
    request = parse("--resume", str(folder.path), "--rounds", "9")
    with pytest.raises(InputError, match=r"round_0002/.*expected an intact checkpoint"), request.open_folder():
        pass
    assert folder.config_file.stat().st_mtime_ns == before
    assert rounds_of(folder) == [0, 1, 2]


@pytest.mark.parametrize(
    ("old", "new"),
    [("\nseed: 0\n", "\nseed: 1\n"), ("name: fedra", "name: alllarge"), ("rank: 8", "rank: 4"), ("lr: 0.005", "lr: 1")],
)
def test_a_run_does_not_go_on_with_other_settings(tmp_path: Path, old: str, new: str) -> None:
    folder = make_run(tmp_path, done=3)
    text = folder.config_file.read_text()
    assert text.count(old) == 1
    folder.config_file.write_text(text.replace(old, new))
    request = parse("--resume", str(folder.path))
    with pytest.raises(InputError, match=r"earlier/config\.yaml: found other settings"), request.open_folder():
        pass


def test_a_run_may_go_on_with_another_execution(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=3)
    text = folder.config_file.read_text()
    folder.config_file.write_text(
        text.replace("lanes: auto", "lanes: 2").replace("evaluate_every: 20", "evaluate_every: 1")
    )
    request = parse("--resume", str(folder.path))
    assert (request.config.execution.lanes, request.config.evaluate_every) == (2, 1)
    with request.open_folder() as opened:
        assert rounds_of(opened) == [0, 1, 2]


@pytest.mark.parametrize("rounds", [[], ["--rounds", "9"]])
def test_the_configuration_of_a_resumed_run_is_checked(tmp_path: Path, rounds: list[str]) -> None:
    folder = make_run(tmp_path, done=3)
    folder.config_file.write_text(folder.config_file.read_text().replace("lanes: auto", "lanes: 0"))
    check_error(["--resume", str(folder.path), *rounds], "execution.lanes: found 0, expected a whole number from 1 up")


def test_a_run_that_is_going_on_is_not_resumed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=3)
    request = parse("--resume", str(folder.path))
    with request.open_folder() as opened:
        opened.append_metrics({"round": 3})
        with pytest.raises(InputError, match=r"resume: found another process at work on .*earlier"):
            request.open_folder().__enter__()
        assert rounds_of(opened) == [0, 1, 2, 3]
    with request.open_folder() as opened:
        assert rounds_of(opened) == [0, 1, 2]


def test_a_resumed_run_cannot_have_fewer_rounds_than_it_did(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=5, done=3)
    request = parse("--resume", str(folder.path), "--rounds", "2")
    with (
        pytest.raises(InputError, match=r"rounds: found 2, expected at least the 3 done"),
        request.open_folder(),
    ):
        pass


def test_more_rounds_are_refused_where_they_change_earlier_ones(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=5, lr_schedule="cosine", done=3)
    with pytest.raises(InputError, match=r"rounds: found 9, expected 5 as before, because the cosine"):
        parse("--resume", str(folder.path), "--rounds", "9")


def fail_in_folder(tmp_path: Path, records: list[dict[str, int]]) -> None:
    with parse("--output_dir", str(tmp_path), "--name", "new").open_folder() as folder:
        for record in records:
            folder.append_metrics(record)
        raise InputError("model.path: found nothing")


def test_bad_input_found_late_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path"):
        fail_in_folder(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_bad_input_found_after_a_round_keeps_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path"):
        fail_in_folder(tmp_path, [{"round": 0}])
    assert RunFolder.open(tmp_path / "new").read_metrics() == [{"round": 0}]
