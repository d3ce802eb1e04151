"""The round loop. It reads like the paper's algorithm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from fedra_engine.callbacks.adapter_files import save_adapter, save_private, write_card
from fedra_engine.callbacks.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from fedra_engine.callbacks.console import Reporter
from fedra_engine.callbacks.fingerprint import check_fingerprint, fingerprint
from fedra_engine.callbacks.partition_report import report_partition
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.trace import RoundTrace, write_inputs
from fedra_engine.config import ExperimentConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.scheduling import WorkDivision
from fedra_engine.experiment import build_experiment, describe
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.records import MOST_NAMED, SUSPICIOUS, ReturnedUpdates, RoundMetrics, Tally
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.sharding import Sharding, is_sharded
from fedra_engine.models.state import EvaluatedModel, GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import whole_files
from fedra_engine.runtime.processes import Processes


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
        """Build the experiment of `config`, with the `data` that a source gave if it is loaded already.

        Raises:
            InputError: something in the configuration cannot be used, or the run in `folder` began with something
                else or is damaged; nothing in the folder has changed but its log.
        """
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
        by_cost_alone = config.execution.deterministic or is_sharded(self.experiment.foundation.model)
        self._division = WorkDivision(
            self.processes, self.experiment.train_samples.lengths, by_cost_alone=by_cost_alone
        )
        self._lanes: list[int] = []
        """Of every process after the last round trained; fewer than in the beginning where memory ran out."""
        self._fingerprint = fingerprint(self.experiment)
        of_main = self.processes.broadcast_object(self._fingerprint)
        with self.processes.together():
            check_fingerprint(self._fingerprint, of_main, "the main process")
            if self.processes.is_main:
                self._find_start()

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
        if self.processes.is_main:
            # A run may go on with more rounds.
            self._folder.write_config(config)
        if config.trace and first == 0 and self.processes.is_main:
            write_inputs(self._folder.path, self.experiment.train_samples, self.experiment.foundation)
        for round in range(first, config.rounds):
            state, metrics = self.train_round(round, state)
            if (round + 1) % config.evaluate_every == 0 or round + 1 == config.rounds:
                metrics.accuracy = accuracy = self.evaluate(state)
                self._reporter.evaluated(round, accuracy)
            if self.processes.is_main:
                self.checkpoint(round, state, accuracy, [metrics])
        reported = self._reported_otherwise(state)
        exported = accuracy if reported is None else self._evaluate_exported(state)
        if self.processes.is_main:
            self._finish(state, frozen, accuracy, exported, reported)

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
        returned, loss = self._merge(aggregator, tally)
        bad = self._check_updates(round, returned)
        # Before the method decomposes or clusters what it got; again after it.
        self._check_finite(work, *aggregator.sums())
        after = self._serve(state, aggregator, assignment, round) if returned.samples else state
        # Equal sums give equal states, to the last bit only on equal hardware.
        self.processes.broadcast_(list(after.tensors().values()))
        self._check_finite(work, *after.tensors().values())
        method.after_round(after, round)
        if trace:
            trace.write_state("global_before", state)
            trace.write_state("global_after", after)
        metrics = RoundMetrics(
            round=round,
            participants=int(returned.good.sum()),
            samples=returned.samples,
            loss=loss,
            lr=work.lr,
            blocks_held=int(assignment.held[~np.isin(work.participants, bad)].any(axis=0).sum()),
            seconds=time.perf_counter() - started,
        )
        if devices is not None:
            metrics.simulated_seconds, metrics.late, metrics.dropped = devices.seconds, devices.late, devices.dropped
        if len(bad):
            metrics.bad_updates, metrics.bad_clients = len(bad), bad[:MOST_NAMED].tolist()
        self._reporter.round_finished(asdict(metrics))
        return after, metrics

    def _check_updates(self, round: int, returned: ReturnedUpdates) -> NDArray[np.int64]:
        """The clients whose updates are bad; says who they are, and whose updates are far larger than the others'.

        Raises:
            InputError: all updates are bad, or one is and the configuration has none dropped.
        """
        bad, (far, median) = returned.clients[~returned.good], returned.suspicious()
        mode, known = self._config.training.on_bad_update, self.experiment.name_clients
        if len(bad) and (mode == "error" or len(bad) == len(returned.clients)):
            expected = "a finite one" if mode == "drop" else "finite ones, or training.on_bad_update drop"
            raise InputError(
                f"training.on_bad_update: found a loss, gradients or parameters that are not finite in round "
                f"{round + 1} from {known(bad)}, expected {expected}. Usual causes: training.lr or clip_norm too high, "
                "model.dtype float16 or bfloat16, bad inputs or labels. The rounds before are kept"
            )
        if len(bad):
            self._reporter.message(
                f"warning: round {round + 1} leaves out {known(bad)}: a loss, gradient or parameter is not finite"
            )
        if len(far):
            self._reporter.message(
                f"warning: round {round + 1} has updates of more than {SUSPICIOUS:g} times the median norm, "
                f"{median:.3g}, from {known(far)}"
            )
        return bad

    def _check_finite(self, work: LocalWork, *tensors: torch.Tensor) -> None:
        """Raise InputError unless what was made of the good updates is finite."""
        if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return
        raise InputError(
            f"training.lr: found a global state that is not finite after round {work.round + 1} with a rate of "
            f"{work.lr:g}, though the updates were; expected training to stay finite (lower training.lr, clip_norm or "
            "server.lr). The rounds before are kept"
        )

    def _merge(self, aggregator: Aggregator, own: Tally) -> tuple[ReturnedUpdates, float | None]:
        """What all processes trained, and the mean loss of a sample. Each of them has then taken in all updates."""
        loss = torch.tensor([float(own.loss)], dtype=torch.float64)
        self.processes.all_reduce_([*aggregator.sums(), loss])
        self.experiment.method.synchronize(self.processes)
        parts = self.processes.all_gather_object((own.returned(), self.experiment.executor.lanes))
        returned = ReturnedUpdates.merged([part for part, _ in parts])
        self._lanes = [lanes for _, lanes in parts]
        mean_loss = float(loss) / returned.samples if returned.samples else None
        self._reporter.trained(int(returned.good.sum()), returned.samples, lambda: mean_loss)
        return returned, mean_loss

    def _serve(self, previous: GlobalState, aggregator: Aggregator, assignment: Assignment, round: int) -> GlobalState:
        """The server optimizer's step towards the aggregated state."""
        mean = self.experiment.method.aggregate(aggregator, previous, round)
        columns = self.experiment.foundation.adapter_layout.columns(assignment.factors)
        return self.experiment.server.step(previous, mean, aggregator.trained(), aggregator.trained_exits(), columns)

    def evaluate(self, state: GlobalState) -> dict[str, float]:
        """Accuracy of the method's model by domain."""
        method, evaluator = self.experiment.method, self.experiment.evaluator
        self._reporter.evaluating(evaluator.samples)
        personal = method.personal_states(state)
        if personal is not None:
            return evaluator.personal_accuracy(personal, state, method.evaluated_model())
        return evaluator.accuracy(state, method.evaluated_model())

    def _reported_otherwise(self, state: GlobalState) -> str | None:
        """What has the accuracies of `evaluate`, in words, where that is more than the model in `adapters/`."""
        method = self.experiment.method
        if method.personal_states(state) is not None:
            return (
                "the clients' own models, each on its domain and with the factors that it keeps to itself "
                "(private.safetensors)"
            )
        exits = method.evaluated_model().exits
        if len(exits) > 1:
            blocks = ", ".join(str(exit + 1) for exit in exits)
            return f"the mean of the logits after blocks {blocks} (exits.safetensors)"
        return None

    def _evaluate_exported(self, state: GlobalState) -> dict[str, float]:
        """Accuracy by domain of the model in `adapters/`: the global one, by its last output."""
        evaluator = self.experiment.evaluator
        self._reporter.evaluating(evaluator.samples)
        return evaluator.accuracy(state, EvaluatedModel(self.experiment.method.evaluated_model().blocks))

    def resume(self) -> tuple[int, GlobalState, dict[str, float]]:
        """The first round to train, the state before it, and the last accuracies; the folder forgets later rounds."""
        with self.processes.together():
            found = self._go_back() if self.processes.is_main else None
        found = self.processes.broadcast_object(found)
        initial = self.experiment.initial_state
        if found is None:
            return 0, initial, {}
        execution, lanes = self._config.execution, found.state["lanes"]
        if execution.deterministic and execution.executor == "sweep" and len(lanes) == self.processes.count:
            # However much memory is free today.
            self.experiment.executor.lanes = lanes[self.processes.index]
            self._reporter.message(f"lanes: {', '.join(map(str, lanes))}, as before (execution.deterministic)")
        parts = _split(found.tensors)
        self.experiment.method.restore(parts.get("method", {}))
        self.experiment.server.restore(parts.get("server", {}))
        return found.round + 1, initial.restored(parts["state"]), found.state["accuracy"]

    def _find_start(self) -> tuple[Checkpoint | None, bytes]:
        """The checkpoint to go on after, if any, and the records up to it; changes nothing.

        Raises:
            InputError: the run began with something else, or is damaged.
        """
        found = latest_checkpoint(self._folder.path)
        if found is None:
            return None, self._folder.find_metrics(None)
        check_fingerprint(self._fingerprint, found.state["fingerprint"], self._folder.path)
        return found, self._folder.find_metrics(found.state["metrics"])

    def _go_back(self) -> Checkpoint | None:
        """Bring the folder back to the checkpoint to go on after, and say what was damaged."""
        found, records = self._find_start()
        if found is not None and found.passed_over:
            self._reporter.message(f"passed over a damaged checkpoint: {found.passed_over}")
        restored = self._folder.rewind(-1 if found is None else found.round, records)
        if restored:
            self._reporter.message(f"restored {self._folder.metrics_file} from {self._folder.kept_metrics_file}")
        return found

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

    def checkpoint(
        self, round: int, state: GlobalState, accuracy: dict[str, float], metrics: Sequence[RoundMetrics]
    ) -> None:
        """Save what `resume` needs to go on after `round`, with the last accuracies and the rounds since the last time.

        metrics.jsonl comes last: where it has a round there is a checkpoint.
        """
        experiment = self.experiment
        parts = {"state": state.tensors(), "method": experiment.method.tensors(), "server": experiment.server.tensors()}
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        records = [each.record() for each in metrics]
        mark = self._folder.keep_metrics(*records)
        remembered = {
            "accuracy": accuracy,
            "fingerprint": self._fingerprint,
            "lanes": self._lanes,
            "metrics": mark,
        }
        save_checkpoint(self._folder.path, round, tensors, remembered)
        self._folder.append_metrics(*records)

    def _finish(
        self,
        state: GlobalState,
        frozen: dict[str, float],
        tuned: dict[str, float],
        exported: dict[str, float],
        reported: str | None,
    ) -> None:
        config, experiment = self._config, self.experiment
        foundation, method = experiment.foundation, experiment.method
        blocks, average = method.evaluated_model().blocks.tolist(), mean(exported.values())
        with whole_files(self._folder.path / "adapters") as folder:
            save_adapter(
                folder, foundation, config, state, depth=len(blocks), loaded_base=experiment.initial_state.base
            )
            if method.personal_states(state) is not None:
                save_private(folder, method.tensors())
            write_card(folder, foundation, config, depth=len(blocks), accuracy=average, reported=reported)
        self._folder.write_summary(
            {
                "rounds": config.rounds,
                "frozen": frozen,
                "tuned": tuned,
                "average_frozen": mean(frozen.values()),
                "average_tuned": mean(tuned.values()),
                "exported_accuracy": exported,
                "average_exported": average,
                "tuned_is": reported,
                "evaluated_blocks": blocks,
                "caution": method.caution,
            }
        )
        self._reporter.finished(frozen, tuned)
        if reported is not None:
            self._reporter.message(
                f"note: tuned is the accuracy of {reported}; the adapter alone has {100 * average:.1f} % on average"
            )


def _split(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """`<part>.<name>` → tensor as part → name → tensor."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    return parts
