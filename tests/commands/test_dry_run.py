from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from fedra_engine.commands.dry_run import print_probe
from fedra_engine.config import DeviceConfig
from fedra_engine.experiment import build_experiment
from fedra_engine.runtime.tables import PlainConsole
from fedra_engine.studies.measure import time_step
from tests.running import small_config

CPU = torch.device("cpu")


UNITS = {"KiB": 2**10, "MiB": 2**20}


def test_the_probe_shows_the_parts_the_costs_the_clients_and_the_time(tmp_path: Path) -> None:
    config = small_config(tmp_path, data={"domains": ["clean", "noisy"]}, clients={"capacities": [4, 2]})
    console = PlainConsole(file=io.StringIO(), width=40)
    print_probe(config, CPU, console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    words = [line.split() for line in lines]
    assert "attention  sdpa" in lines
    assert "stem       vit.embeddings (1,472 parameters)" in lines
    assert "blocks     vit.layers: 12 × ViTLayer (33,472 parameters each)" in lines
    assert "adapter    mlp.fc2: 128 → 64, rank 8" in lines
    assert "head       classifier: 64 → 10, with bias" in lines
    # Capacity, rank, blocks and trainable parameters.
    assert ["2", "8", "2", "14,986"] in [line[:4] for line in words]
    assert ["4", "8", "4", "29,322"] in [line[:4] for line in words]
    costs = {line[0]: line for line in words if line[:2] in (["2", "8"], ["4", "8"])}
    flops = {capacity: float(line[-2]) for capacity, line in costs.items()}
    # Forward, twice that backward through hidden states, and adapters; five tokens and two FLOPs per parameter.
    assert flops["2"] > 2 * 2 * 5 * 2 * 33_000 / 1e6
    assert flops["4"] == pytest.approx(2 * flops["2"], rel=0.01)
    for line in costs.values():
        memory, *parts = (float(value) * UNITS[unit] for value, unit in zip(line[8:16:2], line[9:17:2], strict=True))
        assert min(parts) > 0
        assert memory == pytest.approx(sum(parts), rel=0.01)
    # Domain, capacity, clients and samples.
    assert ["clean", "4", "5", "140"] in [line[:4] for line in words]
    assert ["noisy", "2", "5", "140"] in [line[:4] for line in words]
    # Then the range of samples, and the same number of steps for all.
    assert [line[5] for line in words if line[:2] == ["clean", "4"]] == ["2"]
    assert "samples: 280 training, 120 test" in lines
    # One client of capacity 4 and one of 2 of 12 blocks in each of two rounds.
    (coverage,) = [line for line in lines if line.startswith("coverage over 2 rounds: ")]
    assert "all blocks have a holder in 0.0 % of them; a block has 0.50 holders on average" in coverage
    # Then the ten clients, and the time.
    assert sum(line[1:2] in (["clean"], ["noisy"]) and line[0].isdigit() for line in words) == 10
    assert lines[-1].startswith("one step of 2 clients with 12 samples took ")
    assert lines[-1].endswith("for 2 rounds, without evaluation")
    assert not list(tmp_path.iterdir())


def test_the_probe_counts_blocks_with_adapters_alone(tmp_path: Path) -> None:
    console = PlainConsole(file=io.StringIO(), width=40)
    clients = {"capacities": [12]}
    print_probe(small_config(tmp_path, clients=clients, lora={"layers_to_transform": [2, 5]}), CPU, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "trainable  7,168 parameters in each of 2 blocks and 650 of the head: 14,986\n" in shown
    assert "all 2 blocks with adapters have a holder in 100.0 % of them; a block has 6.00 holders on average" in shown


def test_the_probe_counts_the_stand_ins_of_missing_blocks(tmp_path: Path) -> None:
    flops = {}
    for name in ("fedra", "fedstandin"):
        console = PlainConsole(file=io.StringIO(), width=40)
        print_probe(small_config(tmp_path, clients={"capacities": [4]}, method={"name": name}), CPU, console)
        assert isinstance(console.file, io.StringIO)
        (row,) = (line.split() for line in console.file.getvalue().splitlines() if line.startswith("       4     8"))
        flops[name] = float(row[-2])
    assert flops["fedstandin"] > 1.02 * flops["fedra"]


def test_the_probe_shows_what_devices_make_of_the_first_round(tmp_path: Path) -> None:
    clients = {"devices": [DeviceConfig(compute=0.1)], "deadline": 1e-3}
    console = PlainConsole(file=io.StringIO())
    print_probe(small_config(tmp_path, clients=clients), CPU, console)
    assert isinstance(console.file, io.StringIO)
    said = "on the clients' devices the first round takes 0.001 s: 0 updates arrive, 6 are late, 0 participants drop"
    assert said in " ".join(console.file.getvalue().split())


def test_a_timed_step_leaves_the_state_as_it_was_and_is_scaled_to_the_round() -> None:
    config = small_config(Path(), training={"batch_size": 4, "max_local_steps": 3, "local_epochs": 3})
    experiment = build_experiment(config, CPU)
    before = {name: tensor.clone() for name, tensor in experiment.initial_state.tensors().items()}
    step = time_step(experiment)
    assert all(torch.equal(tensor, before[name]) for name, tensor in experiment.initial_state.tensors().items())
    assert (step.clients, step.samples) == (6, 24)
    # Every client of the step goes on for two more such steps.
    assert abs(step.round_seconds - 3 * step.seconds) <= 1e-9 * step.seconds
