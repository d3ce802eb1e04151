"""The round loop. It reads like the paper's algorithm."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import mean

import numpy as np
import torch
from accelerate import Accelerator

from fedra_engine.checkpoint import latest_checkpoint, save_checkpoint
from fedra_engine.config import ExperimentConfig
from fedra_engine.errors import InputError
from fedra_engine.execution.work import LocalWork
from fedra_engine.experiment import build_experiment, describe
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.sampling import sample_participants
from fedra_engine.models.state import GlobalState
from fedra_engine.peft_io import save_adapter
from fedra_engine.reporting.console import Reporter
from fedra_engine.reporting.control import recorded_control
from fedra_engine.reporting.partition_report import report_partition
from fedra_engine.reporting.run_folder import RunFolder, setting_digest
from fedra_engine.schedule import learning_rate
from fedra_engine.trace import RoundTrace, write_inputs


@dataclass
class RoundMetrics:
    """What `metrics.jsonl` remembers of a round.

    Attributes:
        round: its number, from 0.
        participants: clients that trained.
        samples: samples they went through, over all local steps.
        loss: mean training loss over these; None when nobody trained.
        lr: learning rate.
        blocks_held: blocks that somebody held.
        seconds: wall-clock time.
        accuracy: per domain, where the state after the round was evaluated.
    """

    round: int
    participants: int
    samples: int
    loss: float | None
    lr: float
    blocks_held: int
    seconds: float
    accuracy: dict[str, float] | None = None


class Simulation:
    """One experiment, from its configuration to a trained global adapter in its run folder."""

    def __init__(
        self, config: ExperimentConfig, folder: RunFolder, reporter: Reporter, accelerator: Accelerator
    ) -> None:
        if accelerator.num_processes > 1:
            raise InputError(
                f"accelerate launch: found {accelerator.num_processes} processes, expected 1 "
                "(several processes are not supported yet)"
            )
        self._config = config
        self._folder = folder
        self._reporter = reporter
        self._experiment = build_experiment(config, accelerator.device)

    def run(self) -> None:
        """Train all rounds that the run folder does not have yet, evaluate, and leave the results there."""
        config, experiment = self._config, self._experiment
        self._reporter.start(config, describe(experiment))
        for note in experiment.train_data.notes:
            self._reporter.message(note)
        report_partition(experiment.train_data, experiment.clients, self._folder.path, self._reporter.message)
        if experiment.method.caution is not None:
            self._reporter.message(f"note: {experiment.method.caution}")
        frozen = self._evaluate(experiment.initial_state)
        first, state, accuracy = self._resume()
        if config.trace and first == 0:
            write_inputs(self._folder.path, experiment.train, experiment.foundation)
        for round in range(first, config.rounds):
            state, metrics = self._round(round, state)
            if (round + 1) % config.evaluate_every == 0 or round + 1 == config.rounds:
                metrics.accuracy = accuracy = self._evaluate(state)
                self._reporter.evaluated(round, accuracy)
            self._folder.append_metrics({k: v for k, v in asdict(metrics).items() if k != "accuracy" or v is not None})
            self._checkpoint(round, state, accuracy)
        self._finish(state, frozen, accuracy)

    def _round(self, round: int, state: GlobalState) -> tuple[GlobalState, RoundMetrics]:
        """Sample, assign, train, aggregate. Returns the new global state and what to remember of the round."""
        config, method = self._config, self._experiment.method
        started = time.perf_counter()
        work, assignment = self._work(round)
        trace = RoundTrace(self._folder.path, self._experiment.foundation, work, assignment) if config.trace else None
        self._reporter.round_started(round, config.rounds, len(work.participants))
        aggregator = method.aggregator(state, round)
        losses, processed = 0.0, 0
        for updates in self._experiment.executor.train(work, assignment, state):
            method.receive(updates)
            aggregator.add(updates)
            if trace:
                trace.write_updates(updates)
            losses += float(updates.losses @ updates.processed)
            processed += int(updates.processed.sum())
            self._reporter.clients_done(len(updates.clients), int(updates.processed.sum()), losses / processed)
        after = self._serve(state, method.aggregate(aggregator, state, round), assignment) if processed else state
        if not np.isfinite(losses) or not after.finite():
            raise InputError(
                f"training.lr: found a loss or parameters that are not finite in round {round} with a rate of "
                f"{work.lr:g}, expected training to stay finite (lower the rate or clip_norm); the rounds before are "
                "kept"
            )
        if trace:
            trace.write_state("global_before", state)
            trace.write_state("global_after", after)
        metrics = RoundMetrics(
            round=round,
            participants=len(work.participants),
            samples=processed,
            loss=losses / processed if processed else None,
            lr=work.lr,
            blocks_held=int(assignment.held.any(axis=0).sum()),
            seconds=time.perf_counter() - started,
        )
        self._reporter.round_finished(asdict(metrics))
        return after, metrics

    def _work(self, round: int) -> tuple[LocalWork, Assignment]:
        """The round's participants, with what they train; those that hold nothing are left out."""
        config, experiment = self._config, self._experiment
        participants = sample_participants(config.clients, experiment.clients, seed=config.seed, round=round)
        assignment = experiment.method.assign(participants, round)
        some = np.flatnonzero(assignment.held.any(axis=1))
        lr = learning_rate(config.training, round, config.rounds)
        work = LocalWork(experiment.clients, participants[some], config.training, config.seed, round, lr)
        return work, assignment.of(some)

    def _serve(self, previous: GlobalState, mean: GlobalState, assignment: Assignment) -> GlobalState:
        """The server optimizer's step towards the aggregated state."""
        device = previous.heads.device
        blocks = torch.from_numpy(assignment.trained_blocks.any(axis=0)).to(device)
        exits = torch.from_numpy(assignment.trained_exits()).to(device)
        return self._experiment.server.step(previous, mean, blocks, exits)

    def _evaluate(self, state: GlobalState) -> dict[str, float]:
        method, evaluator = self._experiment.method, self._experiment.evaluator
        personal = method.personal_states(state)
        if personal is not None:
            return evaluator.personal_accuracy(personal, method.evaluated_model())
        return evaluator.accuracy(state, method.evaluated_model())

    def _resume(self) -> tuple[int, GlobalState, dict[str, float]]:
        """The first round to train, the state before it, and the last accuracies."""
        found = latest_checkpoint(self._folder.path)
        initial = self._experiment.initial_state
        if found is None:
            return 0, initial, {}
        round, tensors, remembered = found
        parts = _split(tensors)
        self._experiment.method.restore(parts.get("method", {}))
        self._experiment.server.restore(parts.get("server", {}))
        return round + 1, initial.restored(parts["state"]), remembered["accuracy"]

    def _checkpoint(self, round: int, state: GlobalState, accuracy: dict[str, float]) -> None:
        experiment = self._experiment
        parts = {"state": state.tensors(), "method": experiment.method.tensors(), "server": experiment.server.tensors()}
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        save_checkpoint(
            self._folder.path, round, tensors, {"accuracy": accuracy, "setting": setting_digest(self._config)}
        )

    def _finish(self, state: GlobalState, frozen: dict[str, float], tuned: dict[str, float]) -> None:
        config, experiment = self._config, self._experiment
        save_adapter(self._folder.path / "adapters", experiment.foundation, config, state)
        control = recorded_control(config)
        self._folder.write_summary(
            {
                "rounds": config.rounds,
                "frozen": frozen,
                "tuned": tuned,
                "average_frozen": mean(frozen.values()),
                "average_tuned": mean(tuned.values()),
                "evaluated_blocks": experiment.method.evaluated_model().blocks.tolist(),
            }
        )
        self._reporter.finished(frozen, tuned, control)


def _split(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """`<part>.<name>` → tensor as part → name → tensor."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    return parts
