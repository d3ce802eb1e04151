"""The `scaling` launcher, from command line to tables, with measurements in processes of their own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

import pytest
from filelock import FileLock

from fedra_engine.runtime.launch import JobEnd

pytestmark = pytest.mark.slow

SMALL = [
    "--data.domains=[clean,noisy]",
    "--clients.capacities=[4,2]",
    "--data.samples_per_client=9",
    "--training.batch_size=6",
    "--training.max_local_steps=1",
    "--execution.lanes=2",
    "--seconds=0.1",
    # Wherever the tests run.
    "--oversubscribe=true",
]
SLOT, HEAD = 8 * (4 * (64 + 64) + 2 * (64 + 128)), 65 * 10


@pytest.fixture
def scaling(launch: Callable[..., object]) -> Callable[..., object]:
    """A function that runs the launcher with arguments and returns its exit code."""
    return partial(launch, "scaling")


def test_points_are_measured_once_and_reported(scaling, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, f"--output_dir={tmp_path}", "--processes=1,2"]
    assert scaling(*options, "--clients=4") == 0
    first = capsys.readouterr().out
    assert "1/2  4 clients, 1 process: " in first
    assert "2/2  4 clients, 2 processes: " in first
    alone, shared = (json.loads((tmp_path / f"4-clients-{n}-processes/measurement.json").read_text()) for n in (1, 2))
    assert (alone["clients"], alone["steps"], alone["lanes"], alone["processes"]) == (4, 4, 2, 1)
    # Two clients hold four blocks, two hold two; every parameter takes four bytes.
    assert alone["uploaded"] == alone["downloaded"] == shared["uploaded"] == 4 * (12 * SLOT + 4 * HEAD)
    # Sums in float64, with a weight for each block and the head.
    assert alone["reduced"] == 8 * (12 * SLOT + HEAD + 12 + 1)
    assert 0 < alone["server_seconds"] < alone["busy_seconds"] < 60
    assert alone["memory"] > 2**26
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/measurement.json")}
    assert scaling(*SMALL, f"--output_dir={tmp_path}", "--clients=4,6") == 0
    again = capsys.readouterr().out
    assert again.count("(measured before)") == 1
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    with (tmp_path / "scaling.csv").open(newline="") as file:
        points = [(line["processes"], line["clients"]) for line in csv.DictReader(file)]
    assert points == [("1", "4"), ("1", "6")]
    assert scaling(*options, "--clients=4", "--training.lr=0.1") == 2
    assert scaling(*options, "--clients=4", "--threads=2") == 2
    rate, threads = capsys.readouterr().err.splitlines()
    assert rate.startswith("error: training.lr: found 0.005 in ")
    assert threads.startswith("error: threads: found 1 in ")
    alone_file = tmp_path / "4-clients-1-processes/measurement.json"
    alone_file.write_text(json.dumps(alone | {"clients": 40}))
    assert scaling(*options, "--clients=4") == 2
    assert capsys.readouterr().err.startswith("error: clients: found 40 in ")


def test_bad_input_is_one_line_and_code_2(scaling, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, f"--output_dir={tmp_path}"]
    assert scaling(*options, "--clients=1") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.clients: found 1 with data.partition bootstrap, expected at least one for ")
    assert error.count("\n") == 1
    with FileLock(tmp_path / ".2-clients-1-processes.lock"):
        assert scaling(*options, "--clients=2") == 2
    assert capsys.readouterr().err.startswith("error: output_dir: found another command that measures ")


def test_nothing_starts_where_there_are_too_few_cores(
    scaling, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedra_engine.runtime.processes._cores", lambda: 2)
    monkeypatch.setattr("fedra_engine.studies.scale.run_job", None)
    options = [*SMALL, f"--output_dir={tmp_path}/out", "--clients=9", "--processes=1,3"]
    assert scaling(*options, "--oversubscribe=false") == 2
    assert capsys.readouterr().err.startswith("error: processes: found 3, expected no more than this machine's 2 cores")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "end", "code", "told"),
    [
        ("error: lora.rank: found x\n", JobEnd(0, 2, True), 2, "error: lora.rank: found x"),
        ("noise\nprocess 1: error: lora.rank: found x\n", JobEnd(1, 2, True), 2, "error: lora.rank: found x"),
        ("error: lost\n", JobEnd(0, 1, True), 1, "error: 4 clients, 2 processes: process 0 ended with exit code 1,"),
        ("Killed\n", JobEnd(0, -9, False), 1, "error: 4 clients, 2 processes: process 0 was killed by SIGKILL,"),
    ],
)
def test_how_a_worker_ends_is_reported(
    scaling,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    end: JobEnd,
    code: int,
    told: str,
) -> None:
    def run_job(command: list[str], processes: int, *, output: IO[str], **_: object) -> JobEnd:
        output.write(said)
        return end

    monkeypatch.setattr("fedra_engine.studies.scale.run_job", run_job)
    assert scaling(*SMALL, f"--output_dir={tmp_path}", "--clients=4", "--processes=2") == code
    assert capsys.readouterr().err.startswith(told)
