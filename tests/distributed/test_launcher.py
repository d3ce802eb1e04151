"""`launchers/simulate.py` in two processes, started as docs/processes.md says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedra_engine.callbacks.run_folder import RunFolder
from tests.distributed.jobs import LAUNCHER, ROOT, engine_errors, finish, run_job, start

pytestmark = pytest.mark.slow

CPU_CONFIG = ROOT / "configs" / "accelerate" / "multi_cpu.yaml"


def test_the_embedded_default_runs_to_its_end(tmp_path: Path) -> None:
    code, output, error = run_job(LAUNCHER, ["--rounds=1", "--name=run", "--output_dir", str(tmp_path)])
    assert (code, engine_errors(error)) == (0, [])
    assert output.count("run folder: ") == output.count("tuned  ") == 1
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (record,) = folder.read_metrics()
    assert record["participants"] == 6
    assert json.loads(folder.summary_file.read_text())["tuned"] == pytest.approx(record["accuracy"])
    assert (folder.path / "adapters" / "adapter_model.safetensors").is_file()


def test_accelerate_starts_two_processes_on_the_cpu_and_bad_options_are_reported_once(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU_CONFIG)]
    code, output, error = finish(start([*launch, str(LAUNCHER), "--rounds=none", "--output_dir", str(tmp_path)]))
    assert code != 0
    assert engine_errors(error) == ["error: rounds: found 'none', expected a whole number from 1 to 1,000,000,000"]
    assert "rank      : 1" in error
    assert (output, list(tmp_path.iterdir())) == ("", [])
