"""The engine's own round, written down for the other contestants."""

from __future__ import annotations

from itertools import chain

import torch

from benchmarks.peers.work import State, Work
from fedra_engine.experiment import Experiment
from fedra_engine.models.loading import resolve_model_path
from fedra_engine.models.state import GlobalState, named_tensors


def export_work(experiment: Experiment) -> Work:
    """The first round of an experiment of float32, in which clients train all blocks that they hold.

    Samples are numbered anew in the order in which clients use them.
    """
    work, assignment, _ = experiment.round_work(0)
    foundation, training = experiment.foundation, work.training
    assert training.clip_norm is not None
    batches = [[torch.from_numpy(rows) for rows in work.batches(client)] for client in work.participants.tolist()]
    used = torch.cat(list(chain.from_iterable(batches)))
    data = experiment.train_samples.batch(used, foundation.device, torch.float32)
    numbers = iter(torch.arange(len(used)).split([len(rows) for rows in chain.from_iterable(batches)]))
    target = foundation.adapter_layout.targets[0]
    return Work(
        model=resolve_model_path(experiment.config.model.path),
        block_path=foundation.block_path,
        head_path=foundation.head_path,
        targets=[target.path for target in foundation.adapter_layout.targets],
        rank=target.rank,
        alpha=target.scale * target.rank,
        inputs=data.inputs,
        labels=data.labels,
        batches=[[next(numbers) for _ in rows] for rows in batches],
        held=[row.nonzero()[0].tolist() for row in assignment.held],
        state=named_state(experiment, experiment.initial_state),
        lr=work.lr,
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
    )


def named_state(experiment: Experiment, state: GlobalState) -> State:
    """The trainable tensors of a `state` by name."""
    foundation = experiment.foundation
    named = named_tensors(state, foundation.adapter_layout, foundation.head_layout)
    return {name: tensor.clone() for name, tensor in named.items()}
