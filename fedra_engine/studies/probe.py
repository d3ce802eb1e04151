"""What the frozen model's features are worth without any tuning: a ridge classifier on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedra_engine.execution.head_init import frozen_features
from fedra_engine.experiment import Experiment
from fedra_engine.runtime.errors import InputError

_ALPHAS = np.logspace(-1, 5, 13)


@dataclass(frozen=True)
class RidgeProbe:
    """A linear classifier on the features of the frozen model, trained on all clients' samples together.

    Attributes:
        accuracy: share of the test samples that it predicts correctly, by domain.
        alpha: its penalty, chosen on the training samples alone.
    """

    accuracy: dict[str, float]
    alpha: float


def ridge_probe(experiment: Experiment) -> RidgeProbe:
    """Fit it to what the frozen model hands to its classifier; leave-one-out errors choose the penalty.

    Raises:
        InputError: features are not finite.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (train, train_labels), (test, test_labels) = (
        frozen_features(experiment.foundation, experiment.sweep_model, samples, np.arange(len(samples.domains)))
        for samples in (experiment.train_samples, experiment.test_samples)
    )
    if not (train.isfinite().all() and test.isfinite().all()):
        dtype = experiment.config.model.dtype
        raise InputError(f"model.dtype: found features of the frozen model with {dtype} that are not finite")
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=_ALPHAS))
    model.fit(train.cpu().numpy(), train_labels.cpu().numpy())
    correct = model.predict(test.cpu().numpy()) == test_labels.cpu().numpy()
    domain_of = experiment.test_samples.domains.numpy()
    accuracy = {name: float(correct[domain_of == index].mean()) for index, name in enumerate(experiment.domains)}
    return RidgeProbe(accuracy, float(model[-1].alpha_))
