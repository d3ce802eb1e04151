"""What is measured of a point, and how it is kept."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from fedra_engine.runtime.errors import InputError, one_line, shown
from fedra_engine.runtime.files import write_whole

_MAY_BE_ZERO = ("gpu_memory", "server_seconds", "repeated_seconds", "uploaded", "downloaded", "reduced")


@dataclass(frozen=True)
class Measurement:
    """A round in which all clients train.

    Attributes:
        clients: of the round.
        processes: of the job.
        threads: of each process, on a CPU.
        device: `cpu`, or the GPU's name.
        lanes: clients trained at the same time by each process.
        steps: local steps of all clients.
        rounds: measured ones.
        seconds: wall-clock time of a round, median over these.
        busy_seconds: CPU-seconds of a round over all processes, mean over the rounds; on GPUs, GPU-seconds, those of
            the round times their number.
        server_seconds: CPU-seconds of a round in which training costs nothing; see `server_seconds`.
        repeated_seconds: those of the round's work that every process does for all clients: sampling, allocation and
            the division of the work.
        memory: largest resident set of a process, bytes.
        gpu_memory: most memory allocated on a GPU, bytes; 0 on a CPU.
        uploaded: bytes from all clients to the server in a round, by counting.
        downloaded: bytes from the server to all clients, by counting.
        reduced: bytes of the sums that processes merge in a round.
    """

    clients: int
    processes: int
    threads: int
    device: str
    lanes: int
    steps: int
    rounds: int
    seconds: float
    busy_seconds: float
    server_seconds: float
    repeated_seconds: float
    memory: int
    gpu_memory: int
    uploaded: float
    downloaded: float
    reduced: int

    def write(self, file: Path) -> None:
        """Appears whole or not at all."""
        write_whole(file, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> Measurement:
        """What `write` wrote.

        Raises:
            InputError: it holds something else.
        """
        try:
            measurement = cls(**json.loads(file.read_text()))
            for name, kind in get_type_hints(cls).items():
                value = getattr(measurement, name)
                if not isinstance(value, (int, float) if kind is float else kind):
                    raise ValueError(f"{name} {shown(value)}")
                if not isinstance(value, str) and not (0 if name in _MAY_BE_ZERO else 1e-9) <= value < math.inf:
                    raise ValueError(f"{name} {shown(value)}")
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{file}: found no measurement of this version ({one_line(error)}), expected one, or no such file"
            ) from error
        return measurement


def measurement_file(folder: Path) -> Path:
    """Where a point's folder has its measurement, once there is one."""
    return folder / "measurement.json"
