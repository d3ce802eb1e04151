"""Metrics of one's own, measured in every evaluation: a mean over the predictions, and one that is no mean."""

import sys

import torch
from torch.nn.functional import one_hot

from fedra_engine import ExperimentConfig, Metric, register_metric, simulate


@register_metric("top_2", share=True)
def top_2(logits, labels):
    """A value of each prediction, [predictions]; the metric is their mean."""
    return (logits.topk(2).indices == labels[:, None]).any(1)


@register_metric("worst_class", language_models=False, share=True)
class WorstClass(Metric):
    """The share of correct predictions of the class that is recognised worst."""

    def sums(self, predictions):  # what some predictions add, [domains, …]
        true = one_hot(predictions.labels, predictions.logits.shape[1])
        right = (predictions.predicted == predictions.labels)[:, None]
        return predictions.sum_by_domain(torch.stack([true * right, true], dim=1))

    def value(self, sums):  # of one domain
        right, count = sums
        return float((right / count)[count > 0].min())


if __name__ == "__main__":
    config = ExperimentConfig(rounds=4, output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs")
    result = simulate(config)
    print("accuracy:   ", result.accuracy)
    print("top 2:      ", result.measures["top_2"])
    print("worst class:", result.measures["worst_class"])
