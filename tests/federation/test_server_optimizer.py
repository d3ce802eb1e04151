"""Server optimizers against their formulas, step by step in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedra_engine.config import ServerConfig
from fedra_engine.federation.server_optimizer import ServerOptimizer
from fedra_engine.models.state import GlobalState

BLOCKS, SIZE, HEAD = 3, 4, 5
ALL = torch.ones(BLOCKS, 1, dtype=torch.bool)
ONE = torch.ones(1, dtype=torch.bool)


def random_state(seed: int) -> GlobalState:
    rng = np.random.default_rng(seed)
    return GlobalState(torch.from_numpy(rng.normal(size=(BLOCKS, SIZE))), torch.from_numpy(rng.normal(size=(1, HEAD))))


def run(config: ServerConfig, rounds: int = 4) -> GlobalState:
    state = random_state(0)
    server = ServerOptimizer(config, state)
    for round in range(rounds):
        state = server.step(state, random_state(round + 1), ALL, ONE)
    return state


def expected(config: ServerConfig, rounds: int = 4) -> np.ndarray:
    x = random_state(0).adapters.numpy()
    m, v = np.zeros_like(x), np.full_like(x, config.tau**2)
    beta1, beta2 = config.betas
    for round in range(rounds):
        delta = random_state(round + 1).adapters.numpy() - x
        if config.optimizer == "fedavg":
            x = x + config.lr * delta
        elif config.optimizer == "fedavgm":
            m = beta1 * m + delta
            x = x + config.lr * m
        else:
            m = beta1 * m + (1 - beta1) * delta
            if config.optimizer == "fedadam":
                v = beta2 * v + (1 - beta2) * delta**2
            else:
                v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
            x = x + config.lr * m / (np.sqrt(v) + config.tau)
    return x


@pytest.mark.parametrize("lr", [1.0, 0.3])
@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_every_optimizer_follows_its_formula(optimizer: str, lr: float) -> None:
    config = ServerConfig(optimizer=optimizer, lr=lr, betas=(0.8, 0.95), tau=0.02)
    np.testing.assert_allclose(run(config).adapters, expected(config), rtol=1e-12)


@pytest.mark.parametrize("lr", [None, 0.3])
@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_a_factor_nobody_trained_keeps_its_value_and_its_moments(optimizer: str, lr: float | None) -> None:
    config = ServerConfig(optimizer=optimizer, lr=lr)
    server, other = ServerOptimizer(config, random_state(0)), ServerOptimizer(config, random_state(0))
    state = server.step(random_state(0), random_state(1), ALL, ONE, slice(2, SIZE))
    everything = other.step(random_state(0), random_state(1), ALL, ONE)
    assert torch.equal(state.adapters[:, :2], random_state(0).adapters[:, :2])
    assert torch.equal(state.adapters[:, 2:], everything.adapters[:, 2:])
    fresh = ServerOptimizer(config, random_state(0)).tensors()
    for name, moments in server.tensors().items():
        if name.startswith("adapters"):
            assert torch.equal(moments[:, :2], fresh[name][:, :2])
            assert torch.equal(moments[:, 2:], other.tensors()[name][:, 2:])


def test_every_optimizer_has_a_default_rate() -> None:
    rates = {name: ServerConfig(optimizer=name).rate for name in ("fedavg", "fedavgm", "fedadam", "fedyogi")}
    assert rates == pytest.approx({"fedavg": 1.0, "fedavgm": 0.1, "fedadam": 0.01, "fedyogi": 0.01})
    assert ServerConfig(optimizer="fedadam", lr=0.5).rate == 0.5


@pytest.mark.parametrize(
    "trained_values",
    [[[True], [False], [True]], [[True] * SIZE, [True, False, False, True], [False] * SIZE]],
    ids=["blocks", "ranks"],
)
@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_what_nobody_trained_keeps_its_value_and_its_moments(optimizer: str, trained_values: list[list[bool]]) -> None:
    config = ServerConfig(optimizer=optimizer, lr=0.3)
    server = ServerOptimizer(config, random_state(0))
    state = server.step(random_state(0), random_state(1), ALL, ONE)
    trained = torch.tensor(trained_values)
    touched = trained.expand(BLOCKS, SIZE)
    before = {name: tensor.clone() for name, tensor in server.tensors().items()}
    # The mean of a round has the old value where nobody trained.
    mean = random_state(2)
    mean.adapters[~touched] = state.adapters[~touched]
    after = server.step(state, mean, trained, ONE)
    assert torch.equal(after.adapters == state.adapters, ~touched)
    for name, tensor in server.tensors().items():
        if name.startswith("adapters"):
            assert torch.equal(tensor == before[name], ~touched)


def test_an_optimizer_goes_on_from_its_tensors() -> None:
    config = ServerConfig(optimizer="fedyogi")
    first, second = (ServerOptimizer(config, random_state(0)) for _ in range(2))
    first.step(random_state(0), random_state(1), ALL, ONE)
    second.restore({name: tensor.clone() for name, tensor in first.tensors().items()})
    results = [server.step(random_state(1), random_state(2), ALL, ONE) for server in (first, second)]
    assert torch.equal(results[0].adapters, results[1].adapters)
    assert torch.equal(results[0].heads, results[1].heads)
