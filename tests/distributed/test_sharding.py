"""A model in shards, on two processes, gives what a whole one gives on one; and no process ever has all of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.saved_rounds import load_newest_intact
from fedra_engine.runtime.processes import Processes
from tests.distributed.jobs import LAUNCHER, ROOT, engine_errors, finish, start
from tests.distributed.sharding_worker import CASES, OWNERS, Job
from tests.running import run_experiment
from tests.tiny import make_model

pytestmark = pytest.mark.slow

pytest.importorskip("deepspeed")

WORKER = Path(__file__).parent / "sharding_worker.py"
SHIPPED = ROOT / "configs" / "accelerate" / "zero3.yaml"
SETTINGS = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {
        "stage": 3,
        "stage3_prefetch_bucket_size": 300,
        # The models of these tests are small; nothing of them is to stay.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 1500,
        "stage3_max_reuse_distance": 0,
    },
}


@dataclass(frozen=True)
class Launch:
    """Starts jobs of two processes on the CPU by `accelerate launch`."""

    folder: Path

    def __call__(self, script: Path, *arguments: str, settings: object = SETTINGS) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `script` with `settings` for DeepSpeed."""
        file = self.folder / "zero3.json"
        file.write_text(json.dumps(settings))
        launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={SHIPPED}"]
        return finish(start([*launch, f"--deepspeed_config_file={file}", str(script), *arguments]))


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    with pytest.MonkeyPatch.context() as patch:
        extensions = tmp_path_factory.mktemp("extensions")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        yield Launch(tmp_path_factory.mktemp("deepspeed"))
        # What DeepSpeed compiles at its first use takes minutes, and nobody needs it.
        assert not list(extensions.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of all cases, each in a folder of its family's name."""
    folder = tmp_path_factory.mktemp("models")
    for family in {case.family for case in CASES.values()}:
        make_model(family).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def sharded(folder: Path, launch: Launch) -> dict[str, dict[str, Tensor]]:
    """The results of every case, of two processes."""
    code, _, error = launch(WORKER, str(folder))
    assert code == 0, error
    return {name: load_file(folder / f"{name}.safetensors") for name in CASES}


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The results of every case, of one process."""
    return {name: Job(folder / case.family, case, Processes.alone()).run() for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_shards_give_what_one_gives_with_the_whole(
    name: str, sharded: dict[str, dict[str, Tensor]], whole: dict[str, dict[str, Tensor]]
) -> None:
    found, expected = sharded[name], whole[name]
    limit = 1e-8 if CASES[name].dtype == "float64" else 1e-5
    assert found.keys() == expected.keys()
    for part in ("adapters", "heads"):
        assert torch.equal(found[f"0.{part}"], expected[f"0.{part}"])
        for round in range(len(OWNERS)):
            before, after = expected[f"{round}.{part}"], expected[f"{round + 1}.{part}"]
            if part == "adapters":
                assert not torch.equal(before, after)
            error = (found[f"{round + 1}.{part}"] - after).abs().max() if after.numel() else 0
            change = (after - before).abs().max() if after.numel() else 0
            assert error <= limit * change
    for measured in expected.keys() - {"resident", "peak"}:
        if not measured[0].isdigit():
            torch.testing.assert_close(found[measured], expected[measured], rtol=limit, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_between_passes_a_process_has_its_shards_and_in_a_pass_not_the_whole_model(
    name: str, sharded: dict[str, dict[str, Tensor]], whole: dict[str, dict[str, Tensor]]
) -> None:
    assert whole[name]["resident"].tolist() == [1]
    assert sharded[name]["resident"].max() <= 0.6
    assert sharded[name]["peak"].max() <= 0.8


def test_a_process_that_dies_in_the_middle_of_a_pass_ends_all(folder: Path, launch: Launch) -> None:
    code, _, error = launch(WORKER, str(folder), "killed")
    assert code == 1
    (line,) = engine_errors(error)
    # On a busy machine, torchrun may notice it before the other process does.
    noticed = ("error: another process of the job died, or did not answer", "error: the launcher ended the job")
    assert line.startswith(noticed)


def test_an_experiment_launched_with_the_shipped_configuration_is_the_one_of_one_process(
    launch: Launch, tmp_path: Path
) -> None:
    """Evaluation, the choice of lanes and a classifier made of features; only large weights are sharded."""
    alone = run_experiment(tmp_path / "one", rounds=1, model={"dtype": "float64", "head_init": "class_means"})
    options = ["--config", str(alone / "config.yaml"), "--output_dir", str(tmp_path), "--name", "two"]
    settings = json.loads((ROOT / "configs" / "deepspeed" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 2000
    code, output, error = launch(LAUNCHER, *options, settings=settings)
    assert code == 0, error
    assert "frozen parameters in shards" in output
    together = tmp_path / "two"
    found, expected = (load_file(run / "checkpoints" / "round_0000" / "state.safetensors") for run in (together, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (together, alone)]
    changes = [summary.pop("block_changes") for summary in summaries]
    assert changes[0] == pytest.approx(changes[1], rel=1e-7)
    measures = [summary.pop("measures") for summary in summaries]
    for name in ("test_loss", "macro_f1", "calibration_error"):
        assert measures[0][name]["tuned"] == pytest.approx(measures[1][name]["tuned"], rel=1e-7)
    assert summaries[0] == summaries[1]
    fingerprints = [found.state["fingerprint"] for run in (together, alone) if (found := load_newest_intact(run))]
    assert fingerprints[0] == fingerprints[1]
    losses = [RunFolder(run).read_metrics()[0]["loss"] for run in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
