"""Devices decide who can take part, how long a round takes and whose update arrives, the same on every process."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import ClientsConfig, DeviceConfig, ExperimentConfig
from fedra_engine.config.validation import validate
from fedra_engine.costs.device_times import GIBIBYTE, simulate_round, simulated_seconds
from fedra_engine.costs.model import ClientCosts, CostModel
from fedra_engine.experiment import build_experiment
from fedra_engine.federation.clients import Clients, Devices, devices_by_domain, draw_devices, sample_participants
from fedra_engine.runtime.errors import InputError
from tests.running import run_experiment, small_config

pytestmark = pytest.mark.usefixtures("quick_runs")

MANY = 20_000


def costs_of(participants: int, **some: float) -> ClientCosts:
    values = {"samples": 1.0} | some
    return ClientCosts(
        **{field.name: np.full(participants, values.get(field.name, 0.0)) for field in fields(ClientCosts)}
    )


def one_for_all(device: DeviceConfig, clients: int = 4) -> Devices:
    return Devices([device], np.zeros(clients, dtype=np.int64), seed=5)


def test_time_is_transfer_and_training_at_the_devices_rates() -> None:
    # A GFLOP at 2 GFLOP/s, 1 MB up at 4 Mbit/s, 2 MB down at 8 Mbit/s.
    costs = costs_of(4, sample_flops=1e9, uploaded=1e6, downloaded=2e6)
    everyone = np.arange(4)
    device = DeviceConfig(compute=2, upload=4, download=8)
    assert simulated_seconds(one_for_all(device), everyone, costs, 0).tolist() == [0.5 + 2 + 2] * 4
    assert simulated_seconds(one_for_all(replace(device, upload=None)), everyone, costs, 0).tolist() == [2.5] * 4
    assert simulated_seconds(one_for_all(DeviceConfig()), everyone, costs, 0).tolist() == [0] * 4


def test_variation_is_log_normal_and_new_in_every_round() -> None:
    devices = one_for_all(DeviceConfig(compute=1, variation=0.5), MANY)
    costs, everyone = costs_of(MANY, sample_flops=3e9), np.arange(MANY)
    first, second = (np.log(simulated_seconds(devices, everyone, costs, round)) for round in (0, 1))
    assert first.mean() == pytest.approx(np.log(3), abs=0.02)
    assert first.std() == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_late_and_broken_off_participants_do_not_arrive() -> None:
    # Domains of three clients: fast, slow, and one that always drops out.
    profiles = [DeviceConfig(compute=4), DeviceConfig(compute=1), DeviceConfig(compute=4, dropout=1.0)]
    devices = devices_by_domain(profiles, np.repeat([0, 1, 2], 3), ["a", "b", "c"], seed=0)
    participants = np.array([0, 2, 3, 7])
    costs = costs_of(4, sample_flops=8e9)
    patient = simulate_round(devices, participants, costs, 0, None)
    assert patient.arrived.tolist() == [True, True, True, False]
    assert (patient.dropped, patient.late, patient.seconds) == (1, 0, 8)
    strict = simulate_round(devices, participants, costs, 0, 5.0)
    assert strict.arrived.tolist() == [True, True, False, False]
    # The server waits for those that do not come.
    assert (strict.dropped, strict.late, strict.seconds) == (1, 1, 5)
    assert simulate_round(devices, participants[:2], costs.select(np.arange(2)), 0, 5.0).seconds == 2


def test_drop_out_has_its_probability() -> None:
    devices = one_for_all(DeviceConfig(dropout=0.3), MANY)
    lost = simulate_round(devices, np.arange(MANY), costs_of(MANY), 0, None).dropped
    assert lost / MANY == pytest.approx(0.3, abs=0.02)


def test_a_client_meets_the_same_fate_whoever_else_takes_part() -> None:
    profiles = [DeviceConfig(compute=1, dropout=0.5, variation=0.5), DeviceConfig(compute=2, dropout=0.2)]
    devices = draw_devices(profiles, 100, seed=3)
    every = simulate_round(devices, np.arange(100), costs_of(100, sample_flops=1e9), 7, 0.9)
    participants = np.array([3, 40, 41, 99])
    alone = simulate_round(devices, participants, costs_of(4, sample_flops=1e9), 7, 0.9)
    assert alone.arrived.tolist() == every.arrived[participants].tolist()


def test_drawn_devices_have_equal_chances() -> None:
    shares = np.bincount(draw_devices([DeviceConfig()] * 4, MANY, seed=0).of_client) / MANY
    assert shares == pytest.approx(0.25, abs=0.02)


def federation(devices: Devices | None, clients: int) -> Clients:
    return Clients([np.arange(5)] * clients, np.arange(clients) % 2, np.ones(clients, dtype=np.int64), None, devices)


@pytest.mark.parametrize("config", [ClientsConfig(), ClientsConfig(sampling="uniform", participants=9)])
def test_only_available_clients_are_sampled(config: ClientsConfig) -> None:
    devices = Devices([DeviceConfig(availability=0.5), DeviceConfig()], np.arange(20) // 10, seed=1)
    sampled = [sample_participants(config, federation(devices, 20), seed=1, round=round) for round in range(200)]
    for round, participants in enumerate(sampled):
        assert devices.available(round)[participants].all()
    taking_part = np.bincount(np.concatenate(sampled), minlength=20)
    assert taking_part[:10].mean() < 0.8 * taking_part[10:].mean()


def test_fewer_available_clients_than_asked_for_all_take_part() -> None:
    devices = one_for_all(DeviceConfig(availability=0.1), 20)
    config = ClientsConfig(sampling="uniform", participants=15)
    participants = sample_participants(config, federation(devices, 20), seed=1, round=0)
    assert participants.tolist() == np.flatnonzero(devices.available(0)).tolist()


def test_devices_that_are_always_there_change_no_draw() -> None:
    config = ClientsConfig(sampling="uniform", participants=7)
    for options in (config, ClientsConfig()):
        with_devices = sample_participants(options, federation(one_for_all(DeviceConfig(), 20), 20), seed=1, round=4)
        without = sample_participants(options, federation(None, 20), seed=1, round=4)
        assert with_devices.tolist() == without.tolist()


def capacities(memory: list[float], **changes: object) -> NDArray[np.int64]:
    devices = [DeviceConfig(memory=gibibytes) for gibibytes in memory]
    config = small_config(Path(), clients={"devices": devices, "capacities": "memory"} | changes)
    validate(config)
    return build_experiment(config, torch.device("cpu")).clients.capacities[::5]


def test_memory_decides_the_capacities() -> None:
    config = small_config(Path())
    experiment = build_experiment(config, torch.device("cpu"))
    costs = CostModel(experiment.foundation, experiment.train_samples, config.lora, config.training)
    needed = costs.memory_by_blocks(8)
    # No client takes more than the blocks of its number are counted with.
    clients = np.arange(0, 30, 5)
    assignment = experiment.method.assign(clients, 0)
    counted = costs.count(experiment.clients, clients, assignment, experiment.method)
    assert (counted.memory <= needed[counted.blocks.astype(int) - 1]).all()
    exact = [needed[0], needed[1] - 1, needed[1], needed[5] + 1, needed[11], 10 * needed[11]]
    found = capacities([size / GIBIBYTE for size in exact])
    assert found.tolist() == [1, 1, 2, 6, 12, 12]
    # Lower ranks leave room for more blocks.
    assert capacities([needed[5] / GIBIBYTE], ranks=[2, 8, 8, 8, 8, 8]).tolist()[:2] > [6, 6]


def test_too_little_memory_is_reported() -> None:
    with pytest.raises(InputError, match=r"clients\.devices: found 1e-05 GiB .* expected at least the 0\.\d+ GiB"):
        capacities([1e-5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": [DeviceConfig(), DeviceConfig(compute=0)]}, r"clients\.devices\[1\]\.compute: found 0, expected"),
        ({"devices": [DeviceConfig(availability=0)]}, r"clients\.devices\[0\]\.availability: found 0, expected a numb"),
        ({"devices": [DeviceConfig(dropout=1.1)]}, r"clients\.devices\[0\]\.dropout: found 1\.1, expected a number"),
        ({"devices": [DeviceConfig()], "capacities": "memory"}, r"clients\.devices\[0\]\.memory: found null with"),
        ({"capacities": "memory"}, r"clients\.capacities: found memory with no clients\.devices"),
        ({"deadline": 3.0}, r"clients\.deadline: found 3\.0 with clients\.devices \[\]"),
        (
            {"devices": [DeviceConfig(memory=1)], "capacities": "memory", "capacity_schedule": "drawn"},
            r"clients\.capacity_schedule: found drawn with clients\.capacities memory",
        ),
    ],
)
def test_what_contradicts_itself_is_reported(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(small_config(Path(), clients=changes))


def test_devices_for_another_number_of_domains_are_reported() -> None:
    config = small_config(Path(), clients={"devices": [DeviceConfig()] * 2})
    domains = "6 domains in this order: clean, inverted, rotated, noisy, edges, textured$"
    expected = rf"^clients\.devices: found 2 entries, expected 1, or one for each of the {domains}"
    with pytest.raises(InputError, match=expected):
        build_experiment(config, torch.device("cpu"))


def test_more_devices_than_clients_that_mix_domains_are_reported() -> None:
    mixed = {"partition": "iid", "clients": 4}
    config = small_config(Path(), data=mixed, clients={"devices": [DeviceConfig()] * 6})
    expected = (
        r"^clients\.devices: found 6 entries, expected at most one for each of the 4 clients, which get them in turn$"
    )
    with pytest.raises(InputError, match=expected):
        build_experiment(config, torch.device("cpu"))


SHORT = {"data": {"domains": ["clean", "noisy"]}, "evaluate_every": 3, "rounds": 3}


def final(folder: Path) -> bytes:
    return (folder / "adapters" / "adapter_model.safetensors").read_bytes()


def test_rounds_record_what_the_devices_made_of_them(tmp_path: Path) -> None:
    plain = {"capacities": [4, 2], "sampling": "uniform"}
    devices = [DeviceConfig(compute=1, upload=10, dropout=0.3), DeviceConfig(compute=0.1)]
    records = {}
    for name, clients in {
        "none": plain,
        "perfect": plain | {"devices": [DeviceConfig()]},
        "lossy": plain | {"devices": devices},
        "strict": plain | {"devices": devices, "deadline": 1e-6},
    }.items():
        folder = run_experiment(tmp_path / name, clients=clients, **SHORT)
        records[name] = RunFolder(folder).read_metrics()
    devices_fields = {"simulated_seconds", "late", "dropped"}
    assert not devices_fields & set(records["none"][0])
    assert all(
        (record["simulated_seconds"], record["late"], record["dropped"]) == (0, 0, 0) for record in records["perfect"]
    )
    for mine, others in zip(records["none"], records["perfect"], strict=True):
        assert mine["loss"] == others["loss"]
    assert sum(record["dropped"] for record in records["lossy"]) > 0
    for record in records["lossy"]:
        assert record["participants"] + record["dropped"] == 10
        # The slow domain has two blocks, and nobody there drops out.
        assert record["simulated_seconds"] == records["lossy"][0]["simulated_seconds"] > 0
    for record in records["strict"]:
        assert (record["participants"], record["samples"], record["loss"]) == (0, 0, None)
        assert record["simulated_seconds"] == 1e-6
    assert final(tmp_path / "none" / "run") == final(tmp_path / "perfect" / "run")


def test_a_method_that_remembers_its_clients_takes_losses(tmp_path: Path) -> None:
    devices = [DeviceConfig(availability=0.7, dropout=0.3)]
    folder = run_experiment(
        tmp_path,
        clients={"capacities": [4, 2], "sampling": "uniform", "devices": devices},
        method={"name": "fedsalora"},
        **SHORT,
    )
    assert len(RunFolder(folder).read_metrics()) == 3


def test_the_default_has_no_devices() -> None:
    assert ExperimentConfig().clients.devices == []
