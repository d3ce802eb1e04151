"""The round loop. It reads like the paper's algorithm."""

from __future__ import annotations

import math
import time
from statistics import mean
from typing import Any

from accelerate import Accelerator

from fedra_engine.checkpoint import latest_checkpoint, save_checkpoint
from fedra_engine.config import ExperimentConfig, TrainingConfig
from fedra_engine.errors import InputError
from fedra_engine.execution.work import LocalWork
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.sampling import sample_participants
from fedra_engine.models.state import GlobalState
from fedra_engine.peft_io import save_adapter
from fedra_engine.reporting.console import Reporter
from fedra_engine.reporting.control import recorded_control
from fedra_engine.reporting.run_folder import RunFolder, setting_digest
from fedra_engine.trace import RoundTrace, write_inputs


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
        self._reporter.start(config, _facts(experiment))
        frozen = experiment.evaluator.accuracy(experiment.initial_state, experiment.method.evaluated_blocks())
        first, state, accuracy = self._resume()
        if config.trace and first == 0:
            write_inputs(self._folder.path, experiment.train, experiment.foundation)
        for round in range(first, config.rounds):
            state, record = self._round(round, state)
            if (round + 1) % config.evaluate_every == 0 or round + 1 == config.rounds:
                accuracy = experiment.evaluator.accuracy(state, experiment.method.evaluated_blocks())
                record["accuracy"] = accuracy
                self._reporter.evaluated(round, accuracy)
            self._folder.append_metrics(record)
            self._checkpoint(round, state, accuracy)
        self._finish(state, frozen, accuracy)

    def _round(self, round: int, state: GlobalState) -> tuple[GlobalState, dict[str, Any]]:
        """Sample, allocate, train, aggregate. Returns the new global state and what to remember of the round."""
        config, experiment = self._config, self._experiment
        started = time.perf_counter()
        participants = sample_participants(config.clients, experiment.clients, seed=config.seed, round=round)
        allocation = experiment.method.allocate(participants, round)
        lr = learning_rate(config.training, round, config.rounds)
        work = LocalWork(experiment.clients, participants, config.training, config.seed, round, lr)
        trace = RoundTrace(self._folder.path, experiment.foundation, work, allocation) if config.trace else None
        self._reporter.round_started(round, config.rounds, len(participants))
        aggregator = Aggregator(state, weighting=config.method.weighting, deterministic=config.execution.deterministic)
        losses, processed = 0.0, 0
        for updates in experiment.executor.train(work, allocation, state):
            aggregator.add(updates)
            if trace:
                trace.write_updates(updates)
            losses += float(updates.losses @ updates.processed)
            processed += int(updates.processed.sum())
            self._reporter.clients_done(len(updates.clients), int(updates.processed.sum()), losses / processed)
        after = experiment.method.aggregate(aggregator)
        if not math.isfinite(losses) or not after.adapters.isfinite().all() or not after.head.isfinite().all():
            raise InputError(
                f"training.lr: found a loss or parameters that are not finite in round {round} with a rate of {lr:g}, "
                "expected training to stay finite (lower the rate or clip_norm); the rounds before are kept"
            )
        if trace:
            trace.write_state("global_before", state)
            trace.write_state("global_after", after)
        record = {
            "round": round,
            "participants": len(participants),
            "samples": processed,
            "loss": losses / processed,
            "lr": lr,
            "blocks_held": int(allocation.any(axis=0).sum()),
            "seconds": time.perf_counter() - started,
        }
        self._reporter.round_finished(record)
        return after, record

    def _resume(self) -> tuple[int, GlobalState, dict[str, float]]:
        """The first round to train, the state before it, and the last accuracies."""
        found = latest_checkpoint(self._folder.path)
        initial = self._experiment.initial_state
        if found is None:
            return 0, initial, {}
        round, tensors, remembered = found
        state = GlobalState(*(tensors[name].to(initial.head) for name in ("adapters", "head")))
        return round + 1, state, remembered["accuracy"]

    def _checkpoint(self, round: int, state: GlobalState, accuracy: dict[str, float]) -> None:
        tensors = {"adapters": state.adapters.cpu(), "head": state.head.cpu()}
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
                "evaluated_blocks": experiment.method.evaluated_blocks().tolist(),
            }
        )
        self._reporter.finished(frozen, tuned, control)


def learning_rate(training: TrainingConfig, round: int, rounds: int) -> float:
    """The learning rate of `round`; `linear` and `cosine` fall from `lr` towards 0 after the last round."""
    progress = round / rounds
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.lr_schedule]
    return training.lr * factor


def _facts(experiment: Experiment) -> dict[str, str | int]:
    """What a user wants to see before the first round."""
    foundation = experiment.foundation
    size = sum(parameter.numel() for parameter in foundation.model.parameters())
    targets = ", ".join(target.path for target in foundation.adapter_layout.targets)
    return {
        "model": f"{type(foundation.model).__name__}, {foundation.depth} blocks, {size:,} frozen parameters",
        "adapters": f"{foundation.adapter_layout.size:,} LoRA parameters a block on {targets}",
        "head": f"{foundation.head_layout.size:,} parameters",
        "clients": f"{len(experiment.clients)} in {len(experiment.domains)} domains",
        "samples": f"{len(experiment.train.labels):,} for training",
        "blocks": f"{experiment.fused_blocks} of {foundation.depth} fused",
        "device": str(experiment.initial_state.head.device),
    }
