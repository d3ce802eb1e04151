"""The round loop. It reads like the paper's algorithm."""

from __future__ import annotations

import time
from dataclasses import asdict
from statistics import mean

import numpy as np
import torch
from accelerate import Accelerator

from fedra_engine.checkpoint import latest_checkpoint, save_checkpoint
from fedra_engine.config import ExperimentConfig
from fedra_engine.config_comparison import setting_digest
from fedra_engine.data.domain_data import DomainData
from fedra_engine.errors import InputError
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.scheduling import WorkDivision
from fedra_engine.experiment import build_experiment, describe
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.work import LocalWork
from fedra_engine.files import whole_files
from fedra_engine.models.sharded_parameters import is_sharded
from fedra_engine.models.sharding import Sharding
from fedra_engine.models.state import GlobalState
from fedra_engine.peft_io import save_adapter, save_private
from fedra_engine.processes import Processes
from fedra_engine.reporting.console import Reporter
from fedra_engine.reporting.control import recorded_control
from fedra_engine.reporting.partition_report import report_partition
from fedra_engine.reporting.records import RoundMetrics, Tally
from fedra_engine.reporting.run_folder import RunFolder
from fedra_engine.trace import RoundTrace, write_inputs


class Simulation:
    """One experiment, from its configuration to a trained global adapter in its run folder."""

    def __init__(
        self,
        config: ExperimentConfig,
        folder: RunFolder,
        reporter: Reporter,
        accelerator: Accelerator,
        data: DomainData | None = None,
    ) -> None:
        """Build the experiment of `config`, with the `data` that a source gave if it is loaded already."""
        self._config = config
        self._folder = folder
        self._reporter = reporter
        self.processes = Processes.of(accelerator)
        with self.processes.together():
            sharding = Sharding.of(accelerator)
            self.experiment = build_experiment(config, accelerator.device, self.processes, sharding, data)
            if config.trace and not folder.config_file.is_file():
                raise InputError(f"trace: found no {folder.path} here, expected a folder that all processes share")
        self.processes.broadcast_(list(self.experiment.initial_state.tensors().values()))
        sharded = is_sharded(self.experiment.foundation.model)
        self._division = WorkDivision(self.processes, self.experiment.train_samples.lengths, in_step=sharded)

    def run(self) -> None:
        """Train all rounds that the run folder does not have yet, evaluate, and leave the results there."""
        config = self._config
        if self.processes.is_main:
            self._introduce()
        frozen = self.evaluate(self.experiment.initial_state)
        first, state, accuracy = self.resume()
        if first > 0:
            trained = f"going on after round {first} of" if first < config.rounds else "finished before, with all of"
            self._reporter.message(f"{trained} {config.rounds} rounds")
        if config.trace and first == 0 and self.processes.is_main:
            write_inputs(self._folder.path, self.experiment.train_samples, self.experiment.foundation)
        for round in range(first, config.rounds):
            state, metrics = self.train_round(round, state)
            if (round + 1) % config.evaluate_every == 0 or round + 1 == config.rounds:
                metrics.accuracy = accuracy = self.evaluate(state)
                self._reporter.evaluated(round, accuracy)
            if self.processes.is_main:
                self._record(metrics)
                self.checkpoint(round, state, accuracy)
        if self.processes.is_main:
            self._finish(state, frozen, accuracy)

    def train_round(
        self, round: int, state: GlobalState, executor: Executor | None = None
    ) -> tuple[GlobalState, RoundMetrics]:
        """Sample, assign, train, aggregate.

        Args:
            round: its number, from 0.
            state: the global state before it.
            executor: who trains; the experiment's if not given.

        Returns:
            The new global state and what to remember of the round.
        """
        executor = self.experiment.executor if executor is None else executor
        config, method = self._config, self.experiment.method
        started = time.perf_counter()
        work, assignment, devices = self.experiment.round_work(round)
        trace = (
            RoundTrace(self._folder.path, self.experiment.foundation, work, assignment, self.processes)
            if config.trace
            else None
        )
        self._reporter.round_started(round, config.rounds, len(work.participants))
        aggregator = method.aggregator(state, round)
        tally = Tally()
        with self._division.share(work, assignment) as share:
            for updates in executor.train(*share, state):
                method.receive(updates)
                aggregator.add(updates)
                if trace:
                    trace.write_updates(updates)
                tally.add(updates)
                self._reporter.trained(tally.clients, tally.samples, tally.mean_loss)
        tally = self._merge(aggregator, tally)
        # Before the method decomposes or clusters what it got; again after it.
        self._check_finite(work, np.isfinite(float(tally.loss)), *aggregator.sums())
        after = self._serve(state, aggregator, assignment, round) if tally.samples else state
        # Equal sums give equal states, to the last bit only on equal hardware.
        self.processes.broadcast_(list(after.tensors().values()))
        self._check_finite(work, after.finite())
        method.after_round(after, round)
        if trace:
            trace.write_state("global_before", state)
            trace.write_state("global_after", after)
        metrics = RoundMetrics(
            round=round,
            participants=len(work.participants),
            samples=tally.samples,
            loss=tally.mean_loss(),
            lr=work.lr,
            blocks_held=int(assignment.held.any(axis=0).sum()),
            seconds=time.perf_counter() - started,
        )
        if devices is not None:
            metrics.simulated_seconds, metrics.late, metrics.dropped = devices.seconds, devices.late, devices.dropped
        self._reporter.round_finished(asdict(metrics))
        return after, metrics

    def _check_finite(self, work: LocalWork, known: bool | np.bool_, *tensors: torch.Tensor) -> None:
        if known and all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return
        raise InputError(
            f"training.lr: found a loss or parameters that are not finite in round {work.round + 1} with a rate of "
            f"{work.lr:g}, expected training to stay finite (lower the rate or clip_norm); the rounds before are kept"
        )

    def _merge(self, aggregator: Aggregator, own: Tally) -> Tally:
        """What all processes trained. Each of them has then taken in all updates."""
        counts = torch.tensor([own.clients, own.samples, float(own.loss)], dtype=torch.float64)
        self.processes.all_reduce_([*aggregator.sums(), counts])
        self.experiment.method.synchronize(self.processes)
        clients, samples, loss = counts.tolist()
        merged = Tally(int(clients), int(samples), torch.tensor(loss, dtype=torch.float64))
        self._reporter.trained(merged.clients, merged.samples, merged.mean_loss)
        return merged

    def _serve(self, previous: GlobalState, aggregator: Aggregator, assignment: Assignment, round: int) -> GlobalState:
        """The server optimizer's step towards the aggregated state."""
        mean = self.experiment.method.aggregate(aggregator, previous, round)
        exits = torch.from_numpy(assignment.trained_exits()).to(previous.heads.device)
        columns = self.experiment.foundation.adapter_layout.columns(assignment.factors)
        return self.experiment.server.step(previous, mean, aggregator.trained(), exits, columns)

    def evaluate(self, state: GlobalState) -> dict[str, float]:
        """Accuracy of the method's model by domain."""
        method, evaluator = self.experiment.method, self.experiment.evaluator
        self._reporter.evaluating(evaluator.samples)
        personal = method.personal_states(state)
        if personal is not None:
            return evaluator.personal_accuracy(personal, state, method.evaluated_model())
        return evaluator.accuracy(state, method.evaluated_model())

    def resume(self) -> tuple[int, GlobalState, dict[str, float]]:
        """The first round to train, the state before it, and the last accuracies."""
        with self.processes.together():
            found = latest_checkpoint(self._folder.path) if self.processes.is_main else None
        found = self.processes.broadcast_object(found)
        initial = self.experiment.initial_state
        if found is None:
            return 0, initial, {}
        round, tensors, remembered = found
        parts = _split(tensors)
        self.experiment.method.restore(parts.get("method", {}))
        self.experiment.server.restore(parts.get("server", {}))
        return round + 1, initial.restored(parts["state"]), remembered["accuracy"]

    def _introduce(self) -> None:
        """Say, and show, what is to be trained."""
        experiment, reporter = self.experiment, self._reporter
        facts = describe(experiment)
        if self.processes.count > 1:
            facts["processes"] = str(self.processes.count)
        reporter.start(self._config, facts)
        for note in experiment.train_data.notes:
            reporter.message(note)
        report_partition(experiment.train_data, experiment.clients, self._folder.path, reporter.message)
        if experiment.method.caution is not None:
            reporter.message(f"note: {experiment.method.caution}")

    def _record(self, metrics: RoundMetrics) -> None:
        self._folder.append_metrics(metrics.record())

    def checkpoint(self, round: int, state: GlobalState, accuracy: dict[str, float]) -> None:
        """Save what `resume` needs to go on after `round`, with the last accuracies."""
        experiment = self.experiment
        parts = {"state": state.tensors(), "method": experiment.method.tensors(), "server": experiment.server.tensors()}
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        save_checkpoint(
            self._folder.path, round, tensors, {"accuracy": accuracy, "setting": setting_digest(self._config)}
        )

    def _finish(self, state: GlobalState, frozen: dict[str, float], tuned: dict[str, float]) -> None:
        config, experiment = self._config, self.experiment
        with whole_files(self._folder.path / "adapters") as adapters:
            save_adapter(adapters, experiment.foundation, config, state)
            if experiment.method.personal_states(state) is not None:
                save_private(adapters, experiment.method.tensors())
        control = recorded_control(config)
        self._folder.write_summary(
            {
                "rounds": config.rounds,
                "frozen": frozen,
                "tuned": tuned,
                "average_frozen": mean(frozen.values()),
                "average_tuned": mean(tuned.values()),
                "evaluated_blocks": experiment.method.evaluated_model().blocks.tolist(),
                "caution": experiment.method.caution,
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
