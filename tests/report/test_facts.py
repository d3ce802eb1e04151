"""What a report knows of a run is what the run's folder says, also of an older or broken one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedra_engine.callbacks.run_folder import FACTS
from fedra_engine.config import LoraConfig, MethodConfig
from fedra_engine.report.facts import Totals, read_run
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.measure_text import measure_text
from tests.report.run_folders import FROZEN, TUNED, records, start_facts, write_run


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, rounds=6))
    assert (run.name, run.method, run.has_ended) == ("run", "fedra", True)
    assert [each.number for each in run.rounds] == [1, 2, 3, 4, 5, 6]
    assert list(run.curve) == [0, 2, 4, 6]
    assert run.curve[0] == FROZEN
    assert run.curve[6] == pytest.approx(TUNED)
    assert run.start == start_facts()
    first = records(6)[0]["allocation"]
    assert run.rounds[0].held == {int(client): blocks for client, blocks in first.items()}
    assert sum(run.rounds[0].holders) == 4 + 2 + 1


def test_shares_are_known_where_the_code_of_a_metric_does_not_run(tmp_path: Path, own_names: None) -> None:
    assert measure_text("mine", 0.5) == "0.5000"
    read_run(write_run(tmp_path, facts=start_facts(shares=["accuracy", "mine"])))
    assert measure_text("mine", 0.5) == "50.0 %"


def test_settings_that_differ_from_the_defaults_are_told_with_these(tmp_path: Path) -> None:
    changes = {"lora": LoraConfig(rank=4), "method": MethodConfig(name="hetlora"), "evaluate_every": 20}
    run = read_run(write_run(tmp_path, rounds=80, changes=changes))
    assert run.changed == {"lora.rank": (4, 8), "method.name": ("hetlora", "fedra")}


def test_what_a_run_costs_is_counted_for_every_update(tmp_path: Path) -> None:
    """Each round, one client of each kind takes part: 4, 2 and 1 blocks."""
    run = read_run(write_run(tmp_path, rounds=5))
    assert run.totals == pytest.approx(Totals(5 * 7e6, 5 * 7000, 5 * 14000))


def test_where_participants_are_not_recorded_one_by_one_a_client_costs_what_it_does_on_average(tmp_path: Path) -> None:
    lines = [{**line, "participants": 3000, "holders": [3000, 1, 0, 5]} for line in records(2)]
    for line in lines:
        del line["allocation"]
    run = read_run(write_run(tmp_path, rounds=2, lines=lines))
    assert run.totals == pytest.approx(Totals(2 * 3000 * 7e6 / 3, 2 * 3000 * 7000 / 3, 2 * 3000 * 14000 / 3))
    assert run.rounds[0].holders == run.rounds[0].trainers == [3000, 1, 0, 5]


def test_blocks_that_are_held_but_not_trained_are_told_apart(tmp_path: Path) -> None:
    everything = {str(client): [0, 1, 2, 3] for client in (0, 2)}
    line = {**records(1)[0], "allocation": everything, "trained": {"0": [1], "2": [1, 3]}}
    kinds = [replace(start_facts().kinds[0], trained=trained, flops=float(trained)) for trained in (1, 2)]
    run = read_run(write_run(tmp_path, rounds=1, lines=[line], facts=start_facts(kinds=kinds)))
    assert list(run.rounds[0].holders) == [2, 2, 2, 2]
    assert list(run.rounds[0].trainers) == [0, 2, 0, 1]
    assert run.totals is not None
    assert run.totals.flops == 1 + 2


def test_a_run_of_an_older_version_lacks_some_facts(tmp_path: Path) -> None:
    lines = [{name: value for name, value in line.items() if name != "allocation"} for line in records(2)]
    folder = write_run(tmp_path, rounds=2, lines=lines)
    (folder / FACTS).unlink()
    run = read_run(folder)
    assert run.start is None
    assert run.totals is None
    assert run.rounds[0].held is None
    assert list(run.rounds[0].holders) == []


def test_a_run_that_has_not_ended_has_rounds_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path, rounds=3)
    (folder / "summary.json").unlink()
    run = read_run(folder)
    assert not run.has_ended
    assert len(run.rounds) == 3


DAMAGE: dict[str, Any] = {
    "metrics.jsonl": '{"round": 0}\n',
    "summary.json": '{"frozen": {"a": 1}}',
    "config.yaml": "- a",
    "facts.json": '{"blocks": 4}',
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path)
    (folder / name).write_text(DAMAGE[name])
    with pytest.raises(InputError, match=rf"{name.replace('.', '[.]')}.*(found|expected)"):
        read_run(folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found no config\.yaml, expected the folder of an earlier run"):
        read_run(tmp_path)
