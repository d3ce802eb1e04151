"""`--processes`: run a command in several processes of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.data import DIGITS_DOMAINS
from fedra_engine.config.options import COUNT, Allowed
from fedra_engine.config.parsing import CommandOption, parse_option
from fedra_engine.runtime.errors import InputError, ProcessLostError, count_of
from fedra_engine.runtime.exit_codes import closing_notice_to
from fedra_engine.runtime.launch import check_busy, run_job

PROCESSES = CommandOption(
    "processes",
    "N|auto",
    "Processes of this machine that share the work of a round; auto is one for each GPU or, without any, for each "
    "core, but no more than a round has participants",
    "1",
)
_COUNT_OR_AUTO = Allowed(f"auto or {COUNT.description}", COUNT.contains)
_KEEPS_DOMAINS = ("domain", "iid", "dirichlet", "shards", "quantity", "bootstrap")
"""Partitions that give every domain clients, unless `data.clients` share all of them."""
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Without any of them there is no GPU, and torch, whose import takes seconds, need not be asked."""


class Chosen(NamedTuple):
    """How many processes to start, and on what.

    Attributes:
        gpus: of this machine; 0 if the processes run on its CPU.
        cores: that this process may use.
        reason: what made it so many.
    """

    processes: int
    gpus: int
    cores: int
    reason: str

    def __str__(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        if self.gpus:
            return f"{processes}: {self.reason}"
        # A process uses fewer where its products keep fewer busy.
        threads = max(self.cores // self.processes, 1)
        return f"{processes} of {'up to ' if threads > 1 else ''}{count_of(threads, 'thread')}: {self.reason}"


def parse_processes(text: str | None, *, dry_run: bool) -> int | None:
    """The number in the option's `text`; None for `auto`, and 1 if it is not given.

    Raises:
        InputError: it is neither; or a launcher has started this process, or nothing is to be trained.
    """
    if text is None:
        return 1
    if "RANK" in os.environ:
        raise InputError(f"processes: found {text} in a job that a launcher has started, expected no such option")
    number = None if text == "auto" else int(parse_option("processes", text, int, _COUNT_OR_AUTO))
    if dry_run and number != 1:
        raise InputError(f"processes: found {text} beside --dry_run, which trains nothing, expected 1")
    return number


def choose_processes(asked: int | None, config: ExperimentConfig) -> Chosen:
    """Choose the processes for an experiment: as many as `asked` for, or those of `auto` if that is None.

    Raises:
        InputError: more are asked for than a round has participants; or the data, which `auto` may have to read to know
            them, cannot be used.
    """
    gpus, cores = _gpus(), _cores()
    place = count_of(gpus, "GPU") if gpus else count_of(cores, "core")
    if asked is not None:
        # Where it takes the data to know, the processes themselves find out.
        if (most := _configured_participants(config)) is not None:
            check_busy(asked, most)
        return Chosen(asked, gpus, cores, f"--processes {asked}, {place}")
    room = gpus or cores
    participants = room if room == 1 else _configured_participants(config) or _counted_participants(config)
    if participants < room:
        place = f"{place}, but {count_of(participants, 'participant')} in a round"
    return Chosen(min(room, participants), gpus, cores, f"auto, {place}")


def run_in_processes(chosen: Chosen, arguments: Sequence[str]) -> NoReturn:
    """Run `fedra` with `arguments` in the `chosen` processes, and exit with their code.

    Raises:
        InputError: a configuration comes through a pipe, which one process alone can read.
        ProcessLostError: one was killed, and the main one could not say so.
        KeyboardInterrupt: this process was interrupted before the main one could say so.
    """
    _check_files(arguments)
    # The main process says that it closes its files.
    with closing_notice_to(lambda notice: None):
        end = run_job([sys.executable, "-m", "fedra_engine", *arguments], chosen.processes)
    if end.interrupt is not None and not end.reported:
        raise end.interrupt
    if end.code and not end.reported:
        raise ProcessLostError(f"{end.reason}; the rounds in checkpoints/ are kept")
    sys.exit(end.exit_code)


def _check_files(arguments: Sequence[str]) -> None:
    given = [(name, value) for name, value in pairwise(arguments) if name == "--config"]
    given += [(name, value) for name, _, value in (argument.partition("=") for argument in arguments) if value]
    for name, value in given:
        if name == "--config" and Path(value).exists() and not Path(value).is_file():
            raise InputError(f"config: found {value}, which several processes cannot read, expected a file")


def _gpus() -> int:
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not any(
        Path(device).exists() for device in _GPU_DEVICES
    ):
        return 0
    import torch

    return torch.cuda.device_count()


def _cores() -> int:
    """Physical cores that this process may use; a container's limit on the time of its CPUs counts, too."""
    from joblib import cpu_count

    return int(cpu_count(only_physical_cores=True))


def _configured_participants(config: ExperimentConfig) -> int | None:
    """The most participants of a round, from the configuration alone; None if it does not tell."""
    data, clients = config.data, config.clients
    known = clients.participants or data.clients
    if clients.sampling == "one_per_domain":
        named = len(data.domains) or (DIGITS_DOMAINS if data.source == "digits" else 0)
        known = named if data.clients is None and data.partition in _KEEPS_DOMAINS else 0
    return known or None


def _counted_participants(config: ExperimentConfig) -> int:
    """The most participants of a round, of the data divided among clients."""
    import numpy as np

    from fedra_engine.federation.clients import Clients, most_participants
    from fedra_engine.inputs import Inputs

    data = Inputs().load_data(config)
    partition = Inputs().divide(config, data.train)
    unknown = np.ones(len(partition.samples), dtype=np.int64)
    return most_participants(config.clients, Clients(partition.samples, partition.domains, unknown))
