"""The scripts in `examples/` run as they are, do what they promise, and are what the documentation shows."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedra_engine import ExperimentConfig, Result, simulate
from tests.documented import BLOCKS
from tests.running import small_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHOWN = [block.code for block in BLOCKS if block.code.startswith("# examples/")]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_names: None) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What the script defined."""
    file = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr("sys.argv", [str(file), *arguments])
    return runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short_and_shown(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 40
    assert any(code.startswith(f"# examples/{file.name}\n") for code in SHOWN)


def test_the_documentation_shows_the_examples_as_they_are() -> None:
    for code in SHOWN:
        first, part = code.split("\n", maxsplit=1)
        assert part.strip("\n") in (ROOT / first.removeprefix("# ")).read_text()


def test_the_readme_has_a_run_from_python() -> None:
    code = next(code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL))
    names: dict[str, Any] = {}
    exec(code.replace("rounds=20", "rounds=1"), names)
    assert isinstance(names["result"], Result)
    assert (names["result"].folder / "my_adapter" / "adapter_model.safetensors").is_file()


def test_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("first_run", monkeypatch)["result"]
    assert result.folder.resolve().parent == tmp_path / "runs"
    assert len(result.history) == 10
    assert (result.folder / "my_adapter" / "adapter_model.safetensors").is_file()
    assert f"accuracy by domain: {result.accuracy}" in capsys.readouterr().out


def test_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapters are smaller than FedRA's, and both executors see the same term."""
    names = run("own_method", monkeypatch, "there")
    sparse = names["result"]
    assert sparse.folder.parent == Path("there")
    plain = simulate(replace(sparse.config, output_dir="plain"), method="fedra", quiet=True)
    assert sparse.state.adapters.abs().sum() < 0.9 * plain.state.adapters.abs().sum()
    strong = {"name": "sparse", "sparse": names["SparseConfig"](weight=0.01)}
    few: dict[str, Any] = {"data": {"domains": ["clean"], "clients_per_domain": 2}, "clients": {"capacities": [4]}}
    sgd: dict[str, Any] = {"method": strong, "model": {"dtype": "float64"}, "training": {"optimizer": "sgd"}}
    states = []
    for executor in ("sweep", "sequential"):
        config = small_config(tmp_path / executor, **few, **sgd, rounds=1, execution={"executor": executor})
        config.training.max_local_steps = 2
        states.append(simulate(config, quiet=True).state.adapters)
    torch.testing.assert_close(states[0], states[1], rtol=1e-8, atol=1e-12)


def test_own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("own_data", monkeypatch)["result"]
    assert list(result.accuracy) == ["dark", "bright"]
    assert result.experiment.clients.capacities.tolist() == [12] * 3 + [6] * 3
    assert result.accuracy["dark"] > 0.9


def test_own_source(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("own_source", monkeypatch)["result"]
    assert result.config.data.source == "npz"
    assert list(result.accuracy) == ["first", "second"]
    assert len(result.experiment.test_samples.domains) == 120


def test_own_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("own_model", monkeypatch)
    assert "accuracy by domain: {'clean': " in capsys.readouterr().out
    (card,) = Path("runs").glob("*/adapters/README.md")
    assert "my_model" in card.read_text()
    assert isinstance(names["Network"](), torch.nn.Module)


def test_stop_early(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("stop_early", monkeypatch)
    rounds, config = len(names["result"].history), names["config"]
    assert isinstance(config, ExperimentConfig)
    assert rounds < config.rounds
    shown = capsys.readouterr().out
    assert f"stopped after round {rounds}: " in shown
    assert f"{rounds} of 40 rounds were enough" in shown


def test_own_metric(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("own_metric", monkeypatch)["result"]
    for domain, accuracy in result.accuracy.items():
        assert result.measures["worst_class"][domain] <= accuracy <= result.measures["top_2"][domain]
    assert max(result.measures["top_2"].values()) > max(result.accuracy.values())
    (record,) = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()][3:]
    assert record["top_2"] == result.measures["top_2"]
    assert f"top 2:       {record['top_2']}" in capsys.readouterr().out


def test_own_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("own_allocator", monkeypatch)
    assert names["result"].config.method.allocation == "window"
    capacities, participants = np.array([12, 3, 5, 1]), np.array([0, 1, 3])
    held = names["window"](0, capacities, participants, 12, np.random.default_rng(0), None)
    assert held.sum(axis=1).tolist() == [12, 3, 1]
    assert (np.abs(np.diff(held.astype(int), axis=1)).sum(axis=1) <= 2).all(), "not one after another"
