"""Run requests: new runs, resumed ones, and which are refused."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from fedra_engine.callbacks.fingerprint import setting_digest
from fedra_engine.callbacks.open_run import open_folder
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.saved_rounds import save_checkpoint
from fedra_engine.commands.simulate import RunRequest, parse_request
from fedra_engine.config import ExperimentConfig
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes


def parse(*arguments: str) -> RunRequest:
    return parse_request(arguments, "")


def make_run(tmp_path: Path, rounds: int = 5, lr_schedule: str = "constant", done: int = 0) -> RunFolder:
    config = ExperimentConfig(rounds=rounds, name="earlier", output_dir=str(tmp_path))
    config.training.lr_schedule = lr_schedule
    folder = RunFolder.create(config)
    for round in range(done):
        mark = folder.keep_metrics({"round": round})
        state = {"fingerprint": {"setting": setting_digest(config)}, "metrics": mark}
        save_checkpoint(folder.path, round, {"head": torch.zeros(2)}, state)
        folder.append_metrics({"round": round})
    return folder


def opened_folder(request: RunRequest) -> AbstractContextManager[RunFolder]:
    return open_folder(request.config, request.resumed, Processes.alone())


def rounds_of(folder: RunFolder) -> list[int]:
    return [record["round"] for record in folder.read_metrics()]


def test_a_resumed_run_has_its_own_configuration(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=5, done=3)
    request = parse("--resume", str(folder.path))
    assert request.config.rounds == 5
    with opened_folder(request) as opened:
        assert opened.path == folder.path
    assert rounds_of(opened) == [0, 1, 2]


def test_a_run_without_an_intact_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=3)
    for file in folder.path.glob("checkpoints/*/state.safetensors"):
        file.write_bytes(b"")
    before = folder.config_file.stat().st_mtime_ns
    request = parse("--resume", str(folder.path), "--rounds", "9")
    with pytest.raises(InputError, match=r"round_0002/.*expected an intact checkpoint"), opened_folder(request):
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
    with (
        pytest.raises(InputError, match=r"^config\.yaml: found other settings than .*/earlier began"),
        opened_folder(request),
    ):
        pass


def test_a_run_may_go_on_with_another_execution(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=3)
    text = folder.config_file.read_text()
    folder.config_file.write_text(
        text.replace("lanes: auto", "lanes: 2").replace("evaluate_every: 20", "evaluate_every: 1")
    )
    request = parse("--resume", str(folder.path))
    assert (request.config.execution.lanes, request.config.evaluate_every) == (2, 1)
    with opened_folder(request) as opened:
        assert rounds_of(opened) == [0, 1, 2]


@pytest.mark.parametrize("rounds", [[], ["--rounds", "9"]])
def test_the_configuration_of_a_resumed_run_is_checked(tmp_path: Path, rounds: list[str]) -> None:
    folder = make_run(tmp_path, done=3)
    folder.config_file.write_text(folder.config_file.read_text().replace("lanes: auto", "lanes: 0"))
    with pytest.raises(InputError, match=r"^execution\.lanes: found 0, expected a whole number from 1 to"):
        parse("--resume", str(folder.path), *rounds)


def test_a_run_that_is_going_on_is_not_resumed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=3)
    request = parse("--resume", str(folder.path))
    with opened_folder(request) as opened:
        opened.append_metrics({"round": 3})
        with pytest.raises(InputError, match=r"resume: found another process at work on .*earlier"):
            opened_folder(request).__enter__()
        assert rounds_of(opened) == [0, 1, 2, 3]
    with opened_folder(request):
        pass


def test_a_resumed_run_cannot_have_fewer_rounds_than_it_did(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=5, done=3)
    request = parse("--resume", str(folder.path), "--rounds", "2")
    with (
        pytest.raises(InputError, match=r"rounds: found 2, expected at least the 3 done"),
        opened_folder(request),
    ):
        pass


def test_more_rounds_are_refused_where_they_change_earlier_ones(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=5, lr_schedule="cosine", done=3)
    with pytest.raises(InputError, match=r"rounds: found 9, expected 5 as before, because the cosine"):
        parse("--resume", str(folder.path), "--rounds", "9")


def fail_in_folder(tmp_path: Path, records: list[dict[str, int]]) -> None:
    with opened_folder(parse("--output_dir", str(tmp_path), "--name", "new")) as folder:
        for record in records:
            folder.keep_metrics(record)
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


def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    request = parse("--output_dir", str(tmp_path), "--name", "my run")
    message = f"--resume '{tmp_path}/my run' resumes it"
    with pytest.raises(KeyboardInterrupt, match=message), opened_folder(request):
        raise KeyboardInterrupt


def test_what_is_shown_is_asked_for_beside_the_fields_also_when_a_run_goes_on(tmp_path: Path) -> None:
    assert (parse().quiet, parse().log_level) == (False, logging.INFO)
    folder = make_run(tmp_path, done=3)
    for begin in ([], ["--resume", str(folder.path)]):
        request = parse(*begin, "--quiet", "--log-level", "debug")
        assert (request.quiet, request.log_level) == (True, logging.DEBUG)
    assert request.resumed is not None
    with pytest.raises(InputError, match=r"^log_level: found 'loud', expected debug or info or warning or error$"):
        parse("--log_level=loud")
