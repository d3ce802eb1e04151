from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from fedra_engine import experiment
from fedra_engine.callbacks.checkpoint import find_start
from fedra_engine.callbacks.fingerprint import fingerprint
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import DataConfig, DeviceConfig, TrainingConfig
from fedra_engine.data.preprocessing import preprocessing_for
from fedra_engine.data.samples import ImageSamples
from fedra_engine.data.sources import load_source
from fedra_engine.execution import executor
from fedra_engine.federation.work import learning_rate
from fedra_engine.methods.registry import METHODS
from fedra_engine.models.loading import resolve_model_path
from fedra_engine.runtime.errors import InputError
from tests.data.preprocessed import preprocess
from tests.running import continue_run, run_experiment, small_config

pytestmark = pytest.mark.usefixtures("quick_runs")

FEW: dict[str, Any] = {
    "data": {"domains": ["clean", "inverted"], "clients_per_domain": 1},
    "clients": {"capacities": [12, 3]},
}
"""Two clients, for tests that run much."""
CPU = torch.device("cpu")
MODELS_PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def final_state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapters" / "adapter_model.safetensors")


def metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def without_times(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_equal_states(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    case = {"method": {"allocation": "reference"}, "training": {"lr_schedule": "constant"}}
    whole = run_experiment(tmp_path / "whole", rounds=3, **case)
    config = small_config(tmp_path / "parts", rounds=1, **case)
    folder = RunFolder.create(config)
    continue_run(config, folder)
    continue_run(replace(config, rounds=3), folder)
    assert_equal_states(final_state(folder.path), final_state(whole))
    resumed = without_times(metrics(folder.path))
    assert [record["loss"] for record in resumed] == [record["loss"] for record in metrics(whole)]


@pytest.mark.parametrize(("deterministic", "kept"), [(True, 4), (False, 1)])
def test_a_deterministic_run_goes_on_with_its_lanes_however_much_memory_is_free(
    deterministic: bool, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"rounds": 1, "execution": {"deterministic": deterministic}}
    monkeypatch.setattr(executor, "choose_lanes", lambda *_: 4)
    run = run_experiment(tmp_path, **changes)
    monkeypatch.setattr(executor, "choose_lanes", lambda *_: 1)
    resumed = experiment.build_experiment(small_config(tmp_path, **changes), CPU)
    find_start(resumed, RunFolder(run), fingerprint(resumed))
    assert resumed.executor.lanes == kept


def test_one_client_after_another_stays_so_whatever_lanes_were_before(tmp_path: Path) -> None:
    run = run_experiment(tmp_path, rounds=1, execution={"deterministic": True, "lanes": 4})
    config = small_config(tmp_path, rounds=1, execution={"deterministic": True, "executor": "sequential"})
    resumed = experiment.build_experiment(config, CPU)
    find_start(resumed, RunFolder(run), fingerprint(resumed))
    assert resumed.executor.lanes == 1


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    first, second = (run_experiment(tmp_path / name, rounds=1) for name in ("first", "second"))
    other = run_experiment(tmp_path / "other", rounds=1, seed=1)
    assert_equal_states(final_state(first), final_state(second))
    assert metrics(first)[0]["loss"] != metrics(other)[0]["loss"]


def test_the_sequential_executor_gives_the_same_run(tmp_path: Path) -> None:
    model = {"dtype": "float64"}
    sweep = run_experiment(tmp_path / "sweep", model=model)
    sequential = run_experiment(tmp_path / "sequential", model=model, execution={"executor": "sequential"})
    for name, tensor in final_state(sequential).items():
        torch.testing.assert_close(final_state(sweep)[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def test_set() -> ImageSamples:
    """The held-out digits as the embedded model takes them."""
    path, data = resolve_model_path("digits_vit"), load_source(DataConfig(**FEW["data"]), 0)
    return preprocess(data.test, preprocessing_for(path, AutoConfig.from_pretrained(path)))


@pytest.mark.parametrize("method", METHODS)
def test_the_lines_beside_the_adapter_give_what_the_summary_says_of_it(
    tmp_path: Path, method: str, test_set: ImageSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_experiment(tmp_path, **FEW, training={"lr": 0.05}, method={"name": method})
    summary = json.loads((run / "summary.json").read_text())
    card = (run / "adapters" / "README.md").read_text()
    assert summary["exported_accuracy"] != summary["frozen"]
    assert (summary["tuned_is"] is None) == (method not in ("depthfl", "fedsalora"))
    if summary["tuned_is"] is None:
        assert summary["exported_accuracy"] == summary["tuned"]
    else:
        assert summary["tuned_is"] in card
        assert summary["exported_accuracy"] != summary["tuned"]
    monkeypatch.chdir(run / "adapters")
    # One channel, so there are no lines for a pipeline.
    (lines,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert method != "fedra" or lines in MODELS_PAGE.read_text()
    names: dict[str, Any] = {}
    exec(lines, names)
    with torch.no_grad():
        inputs = test_set.inputs(torch.arange(len(test_set.labels)), torch.device("cpu"), torch.float32)
        right = names["logits"](**inputs).argmax(1) == test_set.labels
    for domain, accuracy in enumerate(summary["exported_accuracy"].values()):
        assert float(right[test_set.domains == domain].double().mean()) == pytest.approx(accuracy, abs=1e-9)
    assert f"{100 * summary['average_exported']:.1f} %" in card


@pytest.mark.parametrize("name", ["alllarge", "allsmall"])
def test_controls_run_to_the_end(tmp_path: Path, name: str) -> None:
    run = run_experiment(tmp_path, rounds=1, method={"name": name})
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["evaluated_blocks"]) == {"alllarge": 12, "allsmall": 3}[name]
    assert metrics(run)[0]["blocks_held"] == len(summary["evaluated_blocks"])


def test_capacities_beyond_the_depth_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clients\.capacities: found 13, expected values from 1 to .* 12"):
        run_experiment(tmp_path, clients={"capacities": [13, 10, 8, 6, 4, 3]})


def test_a_diverging_run_stops_and_keeps_the_rounds_before(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^training\.on_bad_update: found .* in round 1 from clients .*expected"):
        run_experiment(tmp_path, training={"optimizer": "sgd", "lr": 1e30, "clip_norm": None})
    assert metrics(tmp_path / "run") == []


def test_images_the_model_cannot_take_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot take the data's inputs"):
        run_experiment(tmp_path, data={"image_size": 12})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.854, 0.5, 0.146])],
)
def test_the_learning_rate_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    training = TrainingConfig(lr=2.0, lr_schedule=schedule)
    found = [learning_rate(training, round, 4) / 2 for round in range(4)]
    assert found == pytest.approx(expected, abs=1e-3)


def live_tensors() -> int:
    gc.collect()
    return sum(type(thing) in (torch.Tensor, torch.nn.Parameter) for thing in gc.get_objects())


def test_a_run_leaves_no_tensors_in_memory(tmp_path: Path) -> None:
    # Costs on devices are measured by passes, too.
    devices = [DeviceConfig(compute=1.0, upload=1.0, download=1.0)]
    changes = {**FEW, "clients": {**FEW["clients"], "devices": devices}, "rounds": 1}
    # The first fills caches that all runs share.
    run_experiment(tmp_path / "first", **changes)
    before = live_tensors()
    run_experiment(tmp_path / "second", **changes)
    assert live_tensors() <= before


@pytest.mark.slow
def test_another_process_leaves_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which its sets are, and but for what holds times and the folder's name."""
    # The plot of the partition is one of the files.
    monkeypatch.undo()
    changes = {**FEW, "rounds": 1, "method": {"name": "depthfl"}}
    here, there = run_experiment(tmp_path / "here", **changes), tmp_path / "there" / "run"
    script = (
        "from pathlib import Path; from tests.running import run_experiment; "
        f"run_experiment(Path({str(there.parent)!r}), **{changes!r})"
    )
    other_order = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, env=other_order, capture_output=True)
    files, others = ({str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in (here, there))
    assert files == others >= {"adapters/adapter_config.json", "adapters/README.md", "summary.json"}
    different = {name for name in files if (here / name).read_bytes() != (there / name).read_bytes()}
    # The records have seconds; a checkpoint has a digest of them.
    records = {"metrics.jsonl", "checkpoints/metrics.jsonl", "checkpoints/round_0000/state.json"}
    assert different <= records | {"config.yaml", "run.log", "report.html"}
    assert without_times(metrics(here)) == without_times(metrics(there))
