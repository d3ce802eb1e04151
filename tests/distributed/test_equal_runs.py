"""Two processes on the CPU give what one gives: every method, resumed runs, traces, and errors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.saved_rounds import load_newest_intact
from fedra_engine.config import DepthFLConfig, FedHelloConfig, HetLoraConfig
from fedra_engine.methods.registry import METHODS
from tests.distributed.jobs import engine_errors, run_job
from tests.distributed.worker import FAULTS, LACKING, SPOILT, leave_out_what_takes_long
from tests.running import continue_run, run_experiment, small_config, spoil

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "worker.py"
DIGITS_VIT = Path(__file__).parents[2] / "fedra_engine" / "assets" / "digits_vit"
MEASURES = ("test_loss", "macro_f1", "calibration_error")
ONE_RANK = {"alllarge", "allsmall", "exclusivefl", "inclusivefl", "depthfl", "fedhello"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow_model(tmp_path_factory.mktemp("model"))


def shallow_model(folder: Path) -> Path:
    """The first four blocks of the embedded model."""
    whole = AutoModelForImageClassification.from_pretrained(DIGITS_VIT)
    whole.vit.layers = whole.vit.layers[:4]
    whole.config.num_hidden_layers = 4
    whole.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(DIGITS_VIT).save_pretrained(folder)
    return folder


def changes(method: dict[str, Any], model: Path, **more: Any) -> dict[str, Any]:
    """Six clients of three domains and capacities, all of whom take part, with skewed numbers of samples."""
    ranks = [] if method["name"] in ONE_RANK else [4, 3, 2]
    return {
        "model": {"path": str(model), "dtype": "float64"},
        "data": {"domains": ["clean", "noisy", "edges"], "clients_per_domain": 2, "partition": "quantity"},
        "lora": {"rank": 4, "target_modules": ["o_proj", "fc1"]},
        "clients": {"capacities": [4, 2, 1], "sampling": "uniform", "ranks": ranks},
        "training": {"batch_size": 4, "max_local_steps": 3, "optimizer": "sgd", "lr": 0.1, "lr_schedule": "constant"},
        "method": method,
        "evaluate_every": 1,
        **more,
    }


def cases(model: Path) -> dict[str, dict[str, Any]]:
    """What is changed of the embedded default in each case; see `tests.running`."""
    options: dict[str, dict[str, Any]] = {
        "depthfl": {"depthfl": DepthFLConfig(exit_every=2)},
        "fedhello": {"fedhello": FedHelloConfig(fisher_every=1, fisher_samples=20)},
        # Enough to let clients prune in the first round.
        "hetlora": {"hetlora": HetLoraConfig(keep_ratio=0.5, penalty=0.5)},
    }
    of_methods = {name: changes({"name": name, **options.get(name, {})}, model) for name in METHODS}
    return of_methods | {
        "options": changes(
            {"name": "fedra", "weighting": "samples"},
            model,
            trace=True,
            execution={"deterministic": True},
            server={"optimizer": "fedadam", "lr": 0.5},
        ),
        "stand_ins": changes(
            {"name": "fedra", "stand_in": "linear", "stand_in_samples": 30, "stand_in_refit": 1}, model
        ),
        "importance": changes({"name": "fedra", "allocation": "importance"}, model),
        "fedra_paper": changes(
            {"name": "depthfl", "depthfl": DepthFLConfig(variant="fedra_paper", exit_every=1)}, model
        ),
    }


CASES = [*METHODS, "options", "stand_ins", "importance", "fedra_paper"]


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folder of every case, run by one process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_what_takes_long(patch.setattr)
        return {name: run_experiment(folder / name, **case) for name, case in cases(model).items()}


@pytest.fixture(scope="module")
def job(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a job of two processes has run all cases and some more, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("two")
    plain, private = changes({"name": "fedra"}, model), changes({"name": "fedsalora"}, model)
    crowded = {**plain, "clients": {**plain["clients"], "participants": 1}}
    faulty = {name: {**plain, "rounds": 3} for name in FAULTS}
    more = {"resumed": private, "begun": {**private, "rounds": 1}, "crowded": crowded, **faulty}
    more |= dict.fromkeys([*LACKING, "differing"], plain) | dict.fromkeys(SPOILT, private)
    exact = {**plain, "model": {"path": str(model)}, "execution": {"deterministic": True}, "rounds": 3}
    more |= {"uninterrupted": exact, "interrupted": exact}
    run_experiment(folder / "resumed", rounds=1, **private)
    for name, case in (cases(model) | more).items():
        (folder / name).mkdir(exist_ok=True)
        config = asdict(small_config(folder / name, **case))
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    code, output, error = run_job(WORKER, [str(folder)])
    # In its last case a process dies.
    assert code != 0
    (folder / "output").write_text(output)
    (folder / "error").write_text(error)
    return folder


def state_after(run: Path, round: int) -> dict[str, Tensor]:
    tensors = load_file(run / "checkpoints" / f"round_{round:04d}" / "state.safetensors")
    if "state.stand_ins.up" in tensors:
        # Directions along which nothing varies are a matter of rounding.
        tensors["maps"] = tensors.pop("state.stand_ins.down") @ tensors.pop("state.stand_ins.up")
    return tensors


def assert_same_changes(found: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """The change of every tensor is the same up to 1e-8 of its largest; what did not change is the same to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].isnan(), tensor.isnan()), name
        # What a method remembers may grow; then all of it is new.
        same_shape = name in before and before[name].shape == tensor.shape
        change = tensor - before[name] if same_shape else tensor
        assert (found[name] - tensor).nan_to_num().abs().max() <= 1e-8 * change.nan_to_num().abs().max(), name


def assert_same_run(found: Path, expected: Path) -> None:
    """The same global state, memory of method and server, and metrics, in every round."""
    before: dict[str, Tensor] = {}
    for round in range(2):
        assert_same_changes(state_after(found, round), state_after(expected, round), before)
        # Two processes add the sums that stand-ins are fitted to in another order, so even fixed ones differ a little.
        state = state_after(expected, round).items()
        before = {name: tensor for name, tensor in state if name != "maps" and ".stand_ins." not in name}
    assert_same_metrics(found, expected)


def assert_same_metrics(found: Path, expected: Path) -> None:
    records, wanted = (RunFolder(path).read_metrics() for path in (found, expected))
    assert len(records) == len(wanted)
    for record, other in zip(records, wanted, strict=True):
        assert record.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-9)
        for name in MEASURES:
            assert record.pop(name) == pytest.approx(other.pop(name), rel=1e-8)
        assert record.pop("seconds") > 0 < other.pop("seconds")
        assert record == other
    summaries = [json.loads((path / "summary.json").read_text()) for path in (found, expected)]
    changes = [summary.pop("block_changes") for summary in summaries]
    # Not known where clients keep factors to themselves.
    assert changes[0] == (changes[1] and pytest.approx(changes[1], rel=1e-7))
    one, other = (summary.pop("measures") for summary in summaries)
    assert one.keys() == other.keys() == {*MEASURES}
    for name, of in one.items():
        for when in ("frozen", "tuned"):
            assert of[when] == pytest.approx(other[name][when], rel=1e-8)
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_run_of_one(name: str, job: Path, alone: dict[str, Path]) -> None:
    assert_same_run(job / name / "run", alone[name])


@pytest.mark.parametrize("name", ["fedra", "fedsalora"])
def test_both_processes_train_and_clients_change_hands(name: str, job: Path) -> None:
    """Otherwise the other tests would show little."""
    shares = [json.loads((job / name / f"clients.{index}.json").read_text()) for index in range(2)]
    for first, second in zip(*shares, strict=True):
        assert min(len(first), len(second)) > 0
        assert sorted(first + second) == list(range(6))
    assert set(shares[0][0]) & set(shares[1][1])


def test_traces_have_the_same_participants_allocations_batches_and_updates(job: Path, alone: dict[str, Path]) -> None:
    two, one = job / "options" / "run" / "trace", alone["options"] / "trace"
    start = load_file(one / "round_0000" / "global_before.safetensors")
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(two) for file in two.rglob("*") if file.is_file())
    for file in files:
        if file.suffix == ".npy":
            assert np.array_equal(np.load(two / file), np.load(one / file))
        elif file.suffix == ".json":
            assert json.loads((two / file).read_text()) == json.loads((one / file).read_text())
        else:
            assert_same_changes(load_file(two / file), load_file(one / file), start)


def test_a_run_of_one_process_goes_on_in_two(job: Path, alone: dict[str, Path]) -> None:
    assert_same_run(job / "resumed" / "run", alone["fedsalora"])


def test_a_run_of_two_processes_goes_on_in_one(job: Path, alone: dict[str, Path], model: Path) -> None:
    folder = RunFolder(job / "begun" / "run")
    continue_run(small_config(job / "begun", **changes({"name": "fedsalora"}, model)), folder)
    assert_same_run(folder.path, alone["fedsalora"])


def test_two_processes_that_go_on_deterministically_end_with_the_bits_of_a_run_without_a_break(job: Path) -> None:
    assert (job / "interrupted" / "error.1").read_text() == "found by process 1"
    for index in range(2):
        trained = [
            json.loads((job / name / f"clients.{index}.json").read_text()) for name in ("interrupted", "uninterrupted")
        ]
        # The first round was over before the break.
        assert trained[0] == trained[1][1:]
    expected = state_after(job / "uninterrupted" / "run", 2)
    found = state_after(job / "interrupted" / "run", 2)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_bad_input_that_one_process_finds_ends_all_and_keeps_the_rounds_before(job: Path) -> None:
    messages = {(job / "failing" / f"error.{index}").read_text() for index in range(2)}
    assert messages == {"found by process 1"}
    assert [record["round"] for record in RunFolder(job / "failing" / "run").read_metrics()] == [0]
    assert [path.name for path in (job / "failing" / "run" / "checkpoints").glob("round_*")] == ["round_0000"]


@pytest.mark.parametrize("case", LACKING)
def test_data_that_one_process_lacks_are_reported_by_all_and_no_folder_is_left(job: Path, case: str) -> None:
    messages = {(job / case / f"error.{index}").read_text() for index in range(2)}
    assert messages == {f"{LACKING[case][1]} failed on process 1"}
    assert not (job / case / "run").exists()


def test_bad_updates_are_left_out_whichever_process_trained_them(
    job: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = SPOILT["spoilt"]
    for index in range(2):
        _, trained = json.loads((job / "spoilt" / f"clients.{index}.json").read_text())
        assert set(trained) & set(clients)
    spoil(monkeypatch.setattr, clients, rounds=(1,))
    leave_out_what_takes_long(monkeypatch.setattr)
    assert_same_run(job / "spoilt" / "run", run_experiment(tmp_path, **changes({"name": "fedsalora"}, model)))
    assert RunFolder(job / "spoilt" / "run").read_metrics()[1]["bad_clients"] == list(clients)


def test_a_round_of_bad_updates_alone_ends_all_processes(job: Path) -> None:
    messages = {(job / "all spoilt" / f"error.{index}").read_text() for index in range(2)}
    (message,) = messages
    assert message.startswith("training.on_bad_update: found a loss")
    assert "in round 2 from clients 0 (clean), 1 (clean), 2 (noisy), 3 (noisy), 4 (edges), 5 (edges)" in message


def test_processes_with_different_models_are_refused(job: Path) -> None:
    messages = {(job / "differing" / f"error.{index}").read_text() for index in range(2)}
    assert len(messages) == 1
    assert messages.pop().startswith("model.path: found other weights or settings of the model than the main process")
    assert not (job / "differing" / "run").exists()


def test_a_process_that_dies_ends_all_and_the_rounds_before_are_kept(job: Path) -> None:
    lines = engine_errors((job / "error").read_text())
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert lines[0].endswith(
        f"the rounds in checkpoints/ are kept; fedra simulate --resume {job / 'killed' / 'run'} resumes it"
    )
    found = load_newest_intact(job / "killed" / "run")
    assert found is not None
    assert found.round == 0


def test_more_processes_than_participants_are_refused_before_there_is_a_folder(job: Path) -> None:
    for index in range(2):
        message = (job / "crowded" / f"error.{index}").read_text()
        assert message.startswith("processes: found 2, expected at most the 1 participants of a round")
    assert not (job / "crowded" / "run").exists()


def test_only_the_main_process_speaks(job: Path) -> None:
    output = (job / "output").read_text().splitlines()
    # Beside the cases: resumed, begun, failing, killed, uninterrupted, and interrupted twice.
    assert sum(line.startswith("method ") for line in output) == len(CASES) + 7 + len(SPOILT)
    warnings = (job / "error").read_text().splitlines()
    assert sum(line.startswith("round 2 leaves out") for line in warnings) == 1
