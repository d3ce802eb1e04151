from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from fedra_engine.config import TrainingConfig
from fedra_engine.errors import InputError
from fedra_engine.reporting.run_folder import RunFolder
from fedra_engine.schedule import learning_rate
from tests.running import continue_run, run_experiment, small_config


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
    whole = run_experiment(tmp_path / "whole", rounds=3, method={"allocation": "reference"})
    config = small_config(tmp_path / "parts", rounds=1, method={"allocation": "reference"})
    folder = RunFolder.create(config)
    continue_run(config, folder)
    continue_run(replace(config, rounds=3), folder)
    assert_equal_states(final_state(folder.path), final_state(whole))
    resumed = without_times(metrics(folder.path))
    assert [record["loss"] for record in resumed] == [record["loss"] for record in metrics(whole)]


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


@pytest.mark.parametrize("method", ["fedra", "flora", "fedexlora"])
def test_the_saved_adapter_loads_with_peft_and_scores_what_the_summary_says(tmp_path: Path, method: str) -> None:
    from fedra_engine.data.preprocessing import preprocessing_for
    from fedra_engine.data.sources import load_source
    from tests.data.preprocessed import preprocess

    run = run_experiment(tmp_path, rounds=3, training={"lr": 0.1}, method={"name": method})
    config = small_config(tmp_path)
    settings = json.loads((run / "adapters" / "adapter_config.json").read_text())
    base = AutoModelForImageClassification.from_pretrained(settings["base_model_name_or_path"])
    rewritten = run / "adapters" / "base_weights.safetensors"
    assert rewritten.exists() == (method != "fedra")
    if rewritten.exists():
        assert not base.load_state_dict(load_file(rewritten), strict=False).unexpected_keys
    model = PeftModel.from_pretrained(base, str(run / "adapters")).eval()
    test = preprocess(
        load_source(config.data, 0).test, preprocessing_for(settings["base_model_name_or_path"], base.config)
    )
    inputs = test.inputs(torch.arange(len(test.labels)), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        right = model(**inputs).logits.argmax(1) == test.labels
    tuned = json.loads((run / "summary.json").read_text())["tuned"]
    for domain, accuracy in enumerate(tuned.values()):
        assert float(right[test.domains == domain].double().mean()) == pytest.approx(accuracy, abs=1e-9)


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
