"""A callback that ends the run as soon as three evaluations in a row bring no better accuracy."""

import sys
from statistics import mean

from fedra_engine import Callback, ExperimentConfig, Stop, simulate


class StopEarly(Callback):
    """Ends the run after `patience` evaluations that gain less than `least` on the best average so far."""

    def __init__(self, patience=3, least=0.01):
        self.patience, self.least = patience, least
        self.best, self.waited = 0.0, 0

    def on_evaluate(self, experiment, state, evaluation):
        average = mean(evaluation.accuracy.values())
        self.waited = 0 if average >= self.best + self.least else self.waited + 1
        self.best = max(self.best, average)
        if self.waited == self.patience:
            return Stop(f"{100 * self.best:.1f} % is as good as it gets")
        return None


config = ExperimentConfig(rounds=40, evaluate_every=1, output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs")
config.data.domains = ["clean", "inverted"]
config.data.validation_fraction = 0.25  # test samples that decide when to stop would be no test any more
config.clients.capacities = [12, 6]
result = simulate(config, callbacks=[StopEarly()])
print(f"{len(result.history)} of {config.rounds} rounds were enough")
