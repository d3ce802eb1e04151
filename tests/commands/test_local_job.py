"""How many processes `--processes` starts, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from fedra_engine.commands import local_job
from fedra_engine.commands.local_job import choose_processes, run_in_processes
from fedra_engine.commands.simulate import parse_request
from fedra_engine.config import ClientsConfig, DataConfig, ExperimentConfig
from fedra_engine.config.data import DIGITS_DOMAINS
from fedra_engine.data.sources.digits import DOMAINS
from fedra_engine.runtime.errors import InputError, ProcessLostError
from fedra_engine.runtime.exit_codes import Interrupted
from fedra_engine.runtime.launch import JobEnd

COUNTED = 3
"""Stands for what the data show."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets the GPUs and cores there are."""

    def have(gpus: int, cores: int) -> None:
        monkeypatch.setattr(local_job, "_gpus", lambda: gpus)
        monkeypatch.setattr(local_job, "_cores", lambda: cores)
        monkeypatch.setattr(local_job, "_counted_participants", lambda config: COUNTED)

    return have


@pytest.mark.parametrize(
    ("gpus", "cores", "asked", "processes", "text"),
    [
        (0, 2, None, 2, "2 processes of 1 thread: auto, 2 cores"),
        (0, 1, None, 1, "1 process of 1 thread: auto, 1 core"),
        (0, 64, None, 6, "6 processes of up to 10 threads: auto, 64 cores, but 6 participants in a round"),
        (4, 64, None, 4, "4 processes: auto, 4 GPUs"),
        (8, 64, None, 6, "6 processes: auto, 8 GPUs, but 6 participants in a round"),
        (0, 2, 4, 4, "4 processes of 1 thread: --processes 4, 2 cores"),
        (2, 8, 2, 2, "2 processes: --processes 2, 2 GPUs"),
    ],
)
def test_auto_takes_every_gpu_or_core_that_a_round_keeps_busy(
    machine, gpus: int, cores: int, asked: int | None, processes: int, text: str
) -> None:
    machine(gpus, cores)
    chosen = choose_processes(asked, ExperimentConfig())
    assert (chosen.processes, str(chosen)) == (processes, text)


def test_more_processes_than_participants_are_refused_before_any_starts(machine) -> None:
    machine(0, 100)
    with pytest.raises(InputError, match=r"^processes: found 99, expected at most the 6 participants of a round"):
        choose_processes(99, ExperimentConfig())
    # Without reading the data nobody knows.
    assert choose_processes(99, ExperimentConfig(clients=ClientsConfig(sampling="uniform"))).processes == 99


@pytest.mark.parametrize(
    ("data", "clients", "participants"),
    [
        ({}, {}, DIGITS_DOMAINS),
        ({"domains": ["clean", "noisy"]}, {}, 2),
        ({"domains": ["clean", "noisy"], "clients": 9}, {}, COUNTED),
        ({"source": "image_folder", "root": "x"}, {}, COUNTED),
        ({"source": "image_folder", "root": "x"}, {"sampling": "uniform", "participants": 5}, 5),
        ({"clients": 9}, {"sampling": "uniform"}, 9),
        ({"partition": "natural"}, {}, COUNTED),
        ({}, {"sampling": "uniform"}, COUNTED),
    ],
)
def test_the_data_are_read_only_where_the_configuration_does_not_tell_the_participants(
    machine, data: dict[str, Any], clients: dict[str, Any], participants: int
) -> None:
    machine(0, 100)
    config = ExperimentConfig(data=DataConfig(**data), clients=ClientsConfig(**clients))
    assert choose_processes(None, config).processes == participants


def test_participants_are_counted_as_a_run_counts_them() -> None:
    config = ExperimentConfig(clients=ClientsConfig(sampling="uniform"))
    assert local_job._counted_participants(config) == 5 * DIGITS_DOMAINS == 5 * len(DOMAINS)
    config.clients.sampling = "one_per_domain"
    assert local_job._counted_participants(config) == DIGITS_DOMAINS


@pytest.mark.parametrize(
    ("rank", "arguments", "message"),
    [
        (None, ["--processes=two"], r"processes: found 'two', expected auto or a whole number from 1 to"),
        (None, ["--processes=0"], r"processes: found '0', expected auto or a whole number"),
        (None, ["--processes=auto", "--dry_run"], r"processes: found auto beside --dry_run, which trains nothing"),
        ("1", ["--processes=2"], r"processes: found 2 in a job that a launcher has started, expected no such option"),
        ("0", ["--processes=1"], r"processes: found 1 in a job that a launcher has started"),
    ],
)
def test_what_cannot_be_is_refused(
    rank: str | None, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(InputError, match=message):
        parse_request(arguments, "")


def test_a_job_of_a_launcher_needs_no_such_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert parse_request([], "").processes == 1


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (JobEnd(0, 0, False), 0),
        (JobEnd(0, 2, True), 2),
        (JobEnd(1, -9, True), 1),
        (JobEnd(0, 130, True, Interrupted(2)), 130),
        (JobEnd(0, -9, False), ProcessLostError),
        (JobEnd(1, -9, False), ProcessLostError),
        (JobEnd(0, -9, False, Interrupted(2)), Interrupted),
        (JobEnd(0, 0, False, Interrupted(2)), Interrupted),
    ],
)
def test_what_the_main_process_has_said_is_not_said_again(
    machine, end: JobEnd, code: int | type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(0, 2)
    monkeypatch.setattr(local_job, "run_job", lambda *_: end)
    chosen = choose_processes(None, ExperimentConfig())
    with pytest.raises(SystemExit if isinstance(code, int) else code) as raised:
        run_in_processes(chosen, ["simulate"])
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == code


@pytest.mark.parametrize("arguments", [["--config", "/dev/null"], ["--rounds", "2", "--config=/dev/null"]])
def test_a_configuration_that_only_one_process_could_read_is_refused(arguments: list[str]) -> None:
    with pytest.raises(InputError, match=r"^config: found /dev/null, which several processes cannot read, expected a"):
        run_in_processes(local_job.Chosen(2, 0, 2, ""), ["simulate", *arguments])
