"""A run goes on with what it began with and with files that are as it left them; otherwise nothing of it changes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from fedra_engine.callbacks.open_run import open_folder
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.saved_rounds import load_newest_intact
from fedra_engine.commands.simulate import parse_request
from fedra_engine.config import ExperimentConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.sources import load_source
from fedra_engine.inputs import Inputs
from fedra_engine.models.loading import resolve_model_path
from fedra_engine.run import run as train_run
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes
from tests.running import small_config

Contents = dict[str, bytes | None]


def experiment(folder: Path) -> tuple[ExperimentConfig, DomainData]:
    """A federation of four named clients on a copy of the model in `folder`."""
    config = small_config(
        folder,
        model={"path": str(folder / "model")},
        data={"partition": "natural"},
        clients={"capacities": [8]},
        training={"max_local_steps": 1, "lr_schedule": "constant"},
        evaluate_every=1,
    )
    data = load_source(small_config(folder).data, config.seed)
    assert isinstance(data.content, np.ndarray)
    pixels = data.content[:, None]
    names = np.array([f"client {row % 4}" for row in range(len(data))])
    return config, replace(data, content=pixels, clients=names)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and, in `run`, a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(resolve_model_path("digits_vit"), folder / "model")
    config, data = experiment(folder)
    run = RunFolder.create(config)
    go_on(config, data, run.path)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A run folder like that of `finished`, to be damaged."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def go_on(config: ExperimentConfig, data: DomainData, run: Path) -> None:
    train_run(config, RunFolder(run), inputs=Inputs(data=data), accelerator=Accelerator(cpu=True))


def contents(folder: Path) -> Contents:
    """Content of every file, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def open_earlier(run: Path) -> None:
    request = parse_request(["--resume", str(run)], "")
    with open_folder(request.config, request.resumed, Processes.alone()):
        pass


def assert_refused(run: Path, message: str) -> None:
    """As the command line would refuse it, with one line and without a change."""
    before = contents(run)
    with pytest.raises(InputError, match=message) as refused:
        open_earlier(run)
    assert "\n" not in str(refused.value)
    assert contents(run) == before


def change_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight": (change_weight, r"^model\.path: found other weights or settings of the model"),
    "a setting": (
        lambda model: change_json(model / "config.json", layer_norm_eps=0.5),
        r"^model\.path: found other weights or settings of the model",
    ),
    "preprocessing": (
        lambda model: change_json(model / "preprocessor_config.json", image_mean=[0.25]),
        r"^data: found other training samples",
    ),
}


def with_pixel(data: DomainData, row: int) -> DomainData:
    assert isinstance(data.content, np.ndarray)
    pixels = data.content.copy()
    pixels[row, 0, 3, 3] ^= 1
    return replace(data, content=pixels)


def classes_swapped(data: DomainData) -> DomainData:
    assert data.labels is not None
    return replace(data, labels=np.where(data.labels < 2, 1 - data.labels, data.labels))


def clients_swapped(data: DomainData) -> DomainData:
    assert data.clients is not None
    clients = data.clients.copy()
    clients[np.flatnonzero(~data.is_test)[:2]] = clients[np.flatnonzero(~data.is_test)[1::-1]]
    return replace(data, clients=clients)


DATA: dict[str, tuple[Callable[[DomainData], DomainData], str]] = {
    "class folders swapped": (classes_swapped, "^data: found other training samples"),
    "a pixel": (lambda data: with_pixel(data, np.flatnonzero(~data.is_test)[0]), "^data: found other training samples"),
    "a test pixel": (lambda data: with_pixel(data, np.flatnonzero(data.is_test)[0]), "^data: found other test samples"),
    "another order": (
        lambda data: data.select(np.arange(len(data))[::-1].copy()),
        "^data: found other training samples",
    ),
    "fewer samples": (lambda data: data.select(np.arange(len(data) - 1)), "^data: found other (training|test) samples"),
    "one more class": (
        lambda data: replace(data, classes=[*data.classes, "more"]),
        "^data: found other domains or classes",
    ),
    "a renamed domain": (
        lambda data: replace(data, domains=["other", *data.domains[1:]]),
        "^data: found other domains or classes",
    ),
    "owners swapped": (clients_swapped, "^clients: found other clients"),
}


@pytest.mark.parametrize(("change", "message"), DATA.values(), ids=DATA)
def test_a_run_does_not_go_on_with_other_data(
    finished: Path, change: Callable[[DomainData], DomainData], message: str
) -> None:
    config, data = experiment(finished)
    before = contents(finished)
    with pytest.raises(InputError, match=rf"{message} than .*/run began with, expected the same"):
        go_on(replace(config, rounds=3), change(data), finished / "run")
    assert without_log(contents(finished)) == without_log(before)


def without_log(files: Contents) -> Contents:
    return {name: content for name, content in files.items() if not name.endswith("run.log")}


@pytest.mark.parametrize(("change", "message"), MODELS.values(), ids=MODELS)
def test_a_run_does_not_go_on_with_another_model(
    finished: Path, change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    config, data = experiment(finished)
    before = contents(finished / "run")
    shutil.copytree(finished / "model", tmp_path / "before")
    try:
        change(finished / "model")
        with pytest.raises(InputError, match=rf"{message} than .*/run began with, expected the same"):
            go_on(replace(config, rounds=3), data, finished / "run")
    finally:
        shutil.copytree(tmp_path / "before", finished / "model", dirs_exist_ok=True)
    assert without_log(contents(finished / "run")) == without_log(before)


def test_damage_is_repaired_from_what_is_left(finished: Path, copied: Path) -> None:
    """An accuracy was edited in the newest checkpoint, and metrics.jsonl has lost a line; more rounds are asked for."""
    config, data = experiment(finished)
    state = copied / "checkpoints" / "round_0001" / "state.json"
    header = json.loads(state.read_text())
    header["state"]["accuracy"] = dict.fromkeys(header["state"]["accuracy"], 1.0)
    state.write_text(json.dumps(header))
    metrics = RunFolder(copied).metrics_file
    metrics.write_bytes(b"\n" + metrics.read_bytes())
    go_on(config, data, copied)
    log = (copied / "run.log").read_text()
    assert "passed over a damaged checkpoint: " in log
    assert "restored " in log
    assert [without_time(record) for record in RunFolder(copied).read_metrics()] == [
        without_time(record) for record in RunFolder(finished / "run").read_metrics()
    ]
    assert (copied / "summary.json").read_bytes() == (finished / "run" / "summary.json").read_bytes()
    found, expected = load_newest_intact(copied), load_newest_intact(finished / "run")
    assert found is not None
    assert expected is not None
    assert all(found.tensors[name].equal(tensor) for name, tensor in expected.tensors.items())


def without_time(record: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in record.items() if name != "seconds"}


def test_more_rounds_are_remembered_and_go_on_behind_the_records(finished: Path, copied: Path) -> None:
    config, data = experiment(finished)
    RunFolder(copied).append_metrics({"round": 2, "of": "no checkpoint"})
    go_on(replace(config, rounds=3), data, copied)
    assert yaml.safe_load((copied / "config.yaml").read_text())["rounds"] == 3
    records = RunFolder(copied).read_metrics()
    assert [record["round"] for record in records] == [0, 1, 2]
    assert records[:2] == RunFolder(finished / "run").read_metrics()
    assert "loss" in records[2]


@pytest.mark.parametrize("name", ["run.log", "metrics.jsonl", "summary.json", ".lock", "adapters/adapter_config.json"])
def test_a_folder_where_a_file_belongs_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink(missing_ok=True)
    (copied / name).mkdir()
    assert_refused(copied, rf"/run/{name}: found no file but something else, expected the file of the run")


@pytest.mark.parametrize("name", ["checkpoints", "adapters", "checkpoints/round_0001"])
def test_a_file_where_a_folder_belongs_is_named(copied: Path, name: str) -> None:
    shutil.rmtree(copied / name)
    (copied / name).touch()
    assert_refused(copied, rf"/run/{name}: found no folder but something else, expected the folder of the run")


CONFIGS = [b"", b"\0", b"\xff\xfe\0", b"- a", b"rounds", b"rounds: [", b"rounds: two", b"round: 2", b"{"]


@pytest.mark.parametrize("content", CONFIGS)
def test_a_damaged_configuration_is_refused(copied: Path, content: bytes) -> None:
    (copied / "config.yaml").write_bytes(content)
    assert_refused(copied, "found|expected")


def test_a_folder_for_a_configuration_is_no_run(copied: Path) -> None:
    (copied / "config.yaml").unlink()
    (copied / "config.yaml").mkdir()
    assert_refused(copied, r"found no config\.yaml, expected the folder of an earlier run")


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff", b'{"version": 2, "round": 1, "state": {}}'])
def test_a_run_whose_checkpoints_are_all_damaged_is_refused(copied: Path, content: bytes) -> None:
    for state in copied.glob("checkpoints/*/state.json"):
        state.write_bytes(content)
    assert_refused(copied, r"/run/checkpoints/round_0001/state\.json: found ")


def test_a_run_whose_records_are_damaged_in_both_files_is_refused(copied: Path) -> None:
    for file in (RunFolder(copied).metrics_file, RunFolder(copied).kept_metrics_file):
        file.write_bytes(file.read_bytes().replace(b'"accuracy"', b'"precision"'))
    assert_refused(copied, r"metrics\.jsonl: found other records than were written.*expected one of them intact")


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/round_*", "[cm]*s*"])
def test_a_run_whose_checkpoints_are_gone_is_not_started_over(copied: Path, gone: str) -> None:
    for path in copied.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_refused(copied, r"/run/checkpoints: found no checkpoint of a run that has trained, expected the newest")


def test_records_without_a_checkpoint_are_not_replaced(copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    (copied / "summary.json").unlink()
    assert_refused(copied, r"/run/checkpoints: found no checkpoint of a run that has trained")
