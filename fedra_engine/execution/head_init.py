"""The global classifier before the first round."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import ModelConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.task import HeadLayout
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator
from fedra_engine.runtime.stages import Stage

_LOG = logging.getLogger(__name__)

SAMPLES_PER_CLASS = 64
"""Enough for a mean; all samples would take as long as a round."""
_BATCH = 64


def initial_heads(
    config: ModelConfig, foundation: Foundation, model: SweepModel, train: Samples, *, seed: int
) -> Tensor:
    """Make the initial classifier, [1, head size], as `config.head_init` says.

    Raises:
        InputError: a causal language model is to get another output layer; or no sample has finite features.
    """
    loaded = foundation.initial_heads()
    if config.head_init == "loaded":
        return loaded
    if not foundation.task.trains_head:
        raise InputError(
            f"model.head_init: found {config.head_init} with a causal language model, whose output layer stays as it "
            "is, expected loaded"
        )
    if config.head_init == "zeros":
        return _with_norm(torch.zeros_like(loaded), loaded, foundation.head_layout)
    rows = _balanced_rows(train.labels.numpy(), foundation.head_layout.classes, seed)
    features, labels = frozen_features(foundation, model, train, rows)
    finite = features.isfinite().all(dim=1)
    if not finite.any():
        raise InputError(
            "model.head_init: found no sample with finite features, expected some (float32 is the widest model.dtype)"
        )
    if not finite.all():
        # One of them would make all logits NaN.
        _LOG.warning("model.head_init leaves out %d samples whose features are not finite", int((~finite).sum()))
    head = class_mean_head(foundation.head_layout, features[finite], labels[finite]).to(loaded)[None]
    return _with_norm(head, loaded, foundation.head_layout)


def _with_norm(head: Tensor, loaded: Tensor, layout: HeadLayout) -> Tensor:
    """Copy the norm of a `loaded` head into `head`."""
    for name, values in layout.norm_parameters(loaded).items():
        layout.norm_parameters(head)[name].copy_(values)
    return head


def class_mean_head(layout: HeadLayout, features: Tensor, labels: Tensor) -> Tensor:
    """The nearest-class-mean classifier of `features`, [head size].

    It is linear discriminant analysis with equal priors and a spherical covariance: logit_c = (m_c · x − ‖m_c‖² / 2) /
    σ², with the mean of the class means m_c as the origin. σ² is the mean squared distance of a sample from its class
    mean, summed over all directions, which keeps the first predictions soft. In a classifier without a bias, m_c loses
    its component along the mean of the means, which would act as a bias. `features` are float64 [samples, features],
    `labels` int64 [samples]; a class without samples gets zeros.
    """
    counts = torch.bincount(labels, minlength=layout.classes)
    sums = features.new_zeros(layout.classes, layout.features).index_add_(0, labels, features)
    present = counts > 0
    means = sums / counts.clamp(min=1)[:, None]
    spread = (features - means[labels]).square().sum(1).mean().clamp(min=torch.finfo(features.dtype).tiny)
    middle = means[present].mean(0)
    centred = means - middle
    if not layout.has_bias:
        centred -= (centred @ middle)[:, None] * middle / middle.square().sum()
    weight = (centred / spread) * present[:, None]
    bias = -(weight @ middle) - 0.5 * (weight * centred).sum(1)
    head = features.new_zeros(layout.size)
    layout.weight(head).copy_(weight)
    if layout.has_bias:
        layout.bias(head).copy_(bias)
    return head


def _balanced_rows(labels: NDArray[np.int64], classes: int, seed: int) -> NDArray[np.int64]:
    """Draw `SAMPLES_PER_CLASS` rows of every class, or all if it has fewer."""
    order = generator(seed, purpose="head initialisation").permutation(len(labels))
    of_class = [order[labels[order] == label][:SAMPLES_PER_CLASS] for label in range(classes)]
    return np.concatenate(of_class)


@torch.no_grad()
def frozen_features(
    foundation: Foundation, model: SweepModel, train: Samples, rows: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """The classifier's inputs in the frozen model, float64 [rows, features], and the labels [rows]."""
    device, dtype, depth = foundation.device, foundation.dtype, foundation.depth
    layout, norms = foundation.head_layout, foundation.head_layout.norm_parameters(foundation.initial_heads()[0])
    # With B = 0 the adapters do nothing.
    adapters = torch.zeros(depth, foundation.adapter_layout.size, dtype=dtype, device=device)
    features, chosen = [], torch.from_numpy(rows)
    with Stage("features of training samples", len(rows)) as stage:
        for batch in chosen.split(_BATCH):
            inputs = train.inputs(batch, device, dtype)
            found = model.features_of(inputs, adapters, np.arange(depth)[None]).double()
            features.append(layout.scaled(found, norms))
            stage.advance(len(batch))
    return torch.cat(features), train.labels[chosen].to(device)
