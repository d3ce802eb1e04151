"""How single processes of a job begin and end; no other processes are started."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from fedra_engine.runtime import exit_codes, processes
from fedra_engine.runtime.errors import InputError, ProcessLostError
from fedra_engine.runtime.processes import Processes, check_places, join_job


def be_process(monkeypatch: pytest.MonkeyPatch, index: int, count: int = 2) -> None:
    """Set what torchrun sets."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(count))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(index))


def bad_input() -> None:
    raise InputError("field: found this,\nexpected that")


def test_the_main_process_prints_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    be_process(monkeypatch, 0)
    assert exit_codes.exit_code(bad_input) == 2
    assert capsys.readouterr().err == "error: field: found this, expected that\n"


def test_another_process_prints_it_only_when_nobody_has_ended_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    be_process(monkeypatch, 1)
    monkeypatch.setattr(exit_codes, "MAIN_SPEAKS_FIRST", 0.1)
    started = time.monotonic()
    assert exit_codes.exit_code(bad_input) == 2
    assert time.monotonic() - started >= 0.1
    assert capsys.readouterr().err == "process 1: error: field: found this, expected that\n"


def test_a_main_process_ended_by_the_launcher_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    be_process(monkeypatch, 0)

    def ended_while_training() -> None:
        with exit_codes.unwound_by_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    assert exit_codes.exit_code(ended_while_training) == 143
    assert capsys.readouterr().err.startswith("error: the launcher ended the job")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    be_process(monkeypatch, 0, count=4)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="processes: found 4 on a machine with 2 GPUs, expected at most one for each"):
        join_job()


def test_processes_share_cores_only_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_cores", lambda: 4)
    monkeypatch.setattr(processes, "_use_cpu", lambda: True)
    check_places(2, 2)
    with pytest.raises(
        InputError, match="processes: found 3 with 2 threads each, expected no more than this machine's 4 cores"
    ):
        check_places(3, 2)
    with pytest.raises(InputError, match=r"processes: found 5, .* \(--oversubscribe true"):
        check_places(5)
    check_places(5, oversubscribe=True)


def test_processes_never_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_use_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="processes: found 3 on a machine with 2 GPUs"):
        check_places(3, oversubscribe=True)


def test_a_failing_collective_is_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(tensor: torch.Tensor) -> None:
        raise RuntimeError("Connection closed by peer\nand much more")

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with pytest.raises(ProcessLostError, match=r"another process .* \(Connection closed by peer\); the rounds in"):
        Processes(0, 2, torch.device("cpu")).any(True)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("[/src/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
            "error: another process of the job died, or did not answer",
        ),
        (torch.distributed.DistBackendError("NCCL error"), "error: another process of the job died, or did not answer"),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_a_reduction_of_others_that_fails_is_a_lost_process_too(
    error: RuntimeError, line: str | None, capsys: pytest.CaptureFixture
) -> None:
    def pass_through_shards() -> None:
        raise error

    if line is None:
        with pytest.raises(RuntimeError, match="shapes do not match"):
            exit_codes.exit_code(pass_through_shards)
    else:
        assert exit_codes.exit_code(pass_through_shards) == 1
        assert capsys.readouterr().err.startswith(line)


def test_a_job_of_one_exchanges_nothing() -> None:
    alone, tensor = Processes.alone(), torch.tensor([1.0, 2.0])
    alone.all_reduce_([tensor])
    alone.broadcast_([tensor])
    assert tensor.tolist() == [1, 2]
    assert (alone.any(True), alone.any(False)) == (True, False)
    assert (alone.all_gather_object("me"), alone.broadcast_object("me")) == (["me"], "me")
    with pytest.raises(InputError, match="found"), alone.raise_on_all():
        raise InputError("found")
