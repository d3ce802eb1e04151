"""Tables, fits and projections, against values computed by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from fedra_engine.runtime.errors import InputError
from fedra_engine.studies.measurements import (
    Measurement,
    cells,
    fit_texts,
    fitted_exponent,
    projected_seconds,
    projection_text,
    write_report,
)
from fedra_engine.studies.plan import Network

ONE = Measurement(
    clients=100,
    processes=1,
    threads=1,
    device="cpu",
    lanes=8,
    steps=200,
    rounds=3,
    seconds=2.0,
    busy_seconds=1.9,
    server_seconds=0.02,
    repeated_seconds=0.01,
    memory=2**29,
    gpu_memory=0,
    uploaded=3e6,
    downloaded=4e6,
    reduced=10**6,
)
# Two seconds a hundred clients, and a tenth of that more for every factor of ten.
GROWING = [replace(ONE, clients=100 * 10**power, seconds=2 * 10 ** (1.1 * power)) for power in range(3)]
NETWORK = Network(latency=1e-3, bandwidth=1e9)


def test_the_exponent_is_that_of_the_points_with_full_lanes() -> None:
    few = replace(ONE, clients=10, seconds=50.0)
    assert fitted_exponent([few, *GROWING]) == pytest.approx(1.1)
    assert fitted_exponent([few, GROWING[0]]) is None


def test_growth_is_reported_for_each_number_of_processes() -> None:
    double = [
        replace(one, processes=2, memory=one.memory * 3 // 2 if one.clients > 100 else one.memory) for one in GROWING
    ]
    first, second = fit_texts([*GROWING, *double])
    assert first.startswith("1 process: seconds per round grow with clients to the power of 1.100 from 100 to 10,000")
    assert "clients, busy seconds to that of 0.000; " in first
    assert first.endswith("memory with 10,000 is 1.000 times that with 100.")
    assert second.startswith("2 processes: ")
    assert second.endswith("memory with 10,000 is 1.500 times that with 100.")


def test_cells_are_rates_and_units() -> None:
    header, row = cells([ONE])
    found = dict(zip(header, row, strict=True))
    assert found["clients/s"] == "50"
    assert found["ms/client"] == "19"
    assert found["server ms/client"] == "0.200"
    assert found["memory (MiB)"] == "512"
    assert found["GPU (MiB)"] == "–"
    assert (found["up (MB)"], found["down (MB)"]) == ("3", "4")
    (_, gpu) = cells([replace(ONE, gpu_memory=2**30)])
    assert gpu[header.index("GPU (MiB)")] == "1,024"


def test_csv_has_every_point_in_order(tmp_path: Path) -> None:
    write_report(tmp_path, "command", [ONE, GROWING[1], replace(ONE, processes=2)], None)
    lines = list(csv.DictReader((tmp_path / "scaling.csv").read_text().splitlines()))
    assert [(line["processes"], line["clients"]) for line in lines] == [("1", "100"), ("1", "1000"), ("2", "100")]
    assert set(lines[0]) == {field.name for field in fields(Measurement)}
    assert float(lines[0]["seconds"]) == 2.0


def test_a_ring_reduction_sends_its_share_twice_around() -> None:
    reductions = [projected_seconds(ONE, processes, NETWORK)[1] for processes in (1, 2, 8)]
    assert reductions == pytest.approx([0, 2 * (1e-3 + 0.5e-3), 14 * (1e-3 + 0.125e-3)])


def test_projected_times_keep_what_every_process_repeats() -> None:
    assert projected_seconds(ONE, 1, NETWORK) == (2.0, 0)
    seconds, _ = projected_seconds(ONE, 4, NETWORK)
    assert seconds == pytest.approx(1.99 / 4 + 0.01 + 6 * (1e-3 + 0.25e-3))
    text = projection_text([ONE], [1, 4], NETWORK)
    assert text is not None
    # 2 s of one process against 0.515 s of four.
    assert [line for line in text.splitlines() if line.startswith("| 100")] == [
        "| 100 | 1 | 2 | 0 | 100.0 |",
        "| 100 | 4 | 0.515 | 7.5 | 97.1 |",
    ]


def test_the_report_says_that_projections_were_not_measured(tmp_path: Path) -> None:
    text = projection_text([*GROWING, replace(GROWING[-1], processes=2, clients=10**6)], [1, 8], NETWORK)
    assert text is not None
    assert text.startswith("## More processes: computed, not measured")
    # Of the largest round on one process.
    assert "| 10,000 | 8 |" in text
    assert projection_text([replace(ONE, processes=2)], [8], NETWORK) is None
    write_report(tmp_path, "python launchers/scaling.py --clients 100", GROWING, text)
    page = (tmp_path / "scaling.md").read_text()
    assert "python launchers/scaling.py --clients 100\n" in page
    assert page.index("to the power of 1.100") < page.index("computed, not measured")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "scaling.csv").read_text().splitlines()) == 4


def test_measurements_survive_their_file(tmp_path: Path) -> None:
    (tmp_path / "measurement.json").write_text(json.dumps(asdict(ONE)))
    assert Measurement.read(tmp_path / "measurement.json") == ONE


@pytest.mark.parametrize("text", ['{"clients": 100}', '{"clients": 10', "[]"])
def test_a_file_that_is_no_measurement_is_reported(text: str, tmp_path: Path) -> None:
    (tmp_path / "measurement.json").write_text(text)
    with pytest.raises(InputError, match=r"measurement\.json: found .*, expected a measurement of this version"):
        Measurement.read(tmp_path / "measurement.json")


def test_the_report_names_every_device(tmp_path: Path) -> None:
    write_report(tmp_path, "command", [ONE, replace(ONE, clients=1000, device="GPU of a kind")], None)
    assert "Device: GPU of a kind and cpu; 1 thread" in (tmp_path / "scaling.md").read_text()
