"""The command line of a scaling scaling becomes its points."""

from __future__ import annotations

import pytest

from fedra_engine.commands.scale import parse_scaling
from fedra_engine.runtime.errors import InputError
from fedra_engine.studies.plan import Network


def test_points_are_all_pairs_and_all_clients_take_part() -> None:
    scaling = parse_scaling(
        ["--clients=100,10", "--processes", "2,1", "--output_dir=out", "--training.max_local_steps=1", "--bandwidth=3"]
    )
    assert [(point.processes, point.clients) for point in scaling.points] == [(1, 10), (1, 100), (2, 10), (2, 100)]
    assert scaling.network == Network(2e-5, 3e9)
    point = scaling.points[-1]
    assert point.path.parts == ("out", "100-clients-2-processes")
    assert point.title == "100 clients, 2 processes"
    config = point.config
    assert (config.data.partition, config.data.clients) == ("bootstrap", 100)
    assert (config.clients.sampling, config.clients.participants) == ("uniform", None)
    assert config.training.max_local_steps == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"clients: found none, expected numbers of clients"),
        (["--clients"], r"clients: found no value"),
        (["--clients=ten"], r"clients: found 'ten', expected a whole number from 1 to "),
        (["--clients=10,10"], r"clients: found 10 more than once"),
        (["--clients=10", "--processes=0"], r"processes: found '0', expected a whole number from 1 to "),
        (["--clients=10", "--seconds=-1"], r"seconds: found '-1', expected a number above 0 and at most"),
        (["--clients=10", "--latency=fast"], r"latency: found 'fast', expected a number above 0 and at most"),
        (["--clients=10", "--bandwidth=inf"], r"bandwidth: found 'inf', expected a number above 0 and at most"),
        (["--clients=10", "--data.clients=5"], r"data\.clients: found it as an option, expected --clients to set it$"),
        (["--clients=10", "--report-to=mlflow"], r"report_to: found it as an option, expected none: rounds are"),
        (
            ["--clients=10", "--early_stopping.patience=1"],
            r"early_stopping\.patience: found it as an option, expected no",
        ),
        (["--clients=10", "--client=5"], r"--client: found an unknown option, .*did you mean --clients\?"),
        (["--clients=10", "--rounds=0"], r"rounds: found 0, expected"),
    ],
)
def test_what_cannot_be_used_is_reported(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_scaling(arguments)
