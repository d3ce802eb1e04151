"""The executor that all others are compared with, against PyTorch by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedra_engine.execution.sequential import SequentialExecutor, Submodel
from tests.tiny import make_samples
from tests.tiny_federation import SAMPLE_COUNTS, SGD, make_setting

ONE_STEP = replace(SGD, momentum=0.0, weight_decay=0.0, clip_norm=None, max_local_steps=1)


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_a_step_follows_the_gradient_of_the_mean_loss(clip_norm: float | None) -> None:
    setting = make_setting("vit", replace(ONE_STEP, clip_norm=clip_norm))
    samples, state = make_samples("vit", sum(SAMPLE_COUNTS)), setting.state()
    work, assignment = setting.work(0, np.array([0, 2]))
    executor = SequentialExecutor(setting.foundation, samples, setting.lora)
    for row, updates in enumerate(executor.train(work, assignment, state)):
        (client,) = updates.clients.tolist()
        submodel = Submodel(setting.foundation, setting.lora, assignment, row, client, state)
        (batch,) = work.batches(client)
        rows = torch.from_numpy(batch)
        (logits,) = submodel.logits(samples.inputs(rows, torch.device("cpu"), torch.float64))
        loss = torch.nn.functional.cross_entropy(logits, samples.labels[rows])
        gradients = torch.autograd.grad(loss, submodel.parameters())
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        # As torch.nn.utils.clip_grad_norm_ has it.
        factor = 1.0 if clip_norm is None else clip_norm / (float(norm) + 1e-6)
        assert clip_norm is None or factor < 1
        with torch.no_grad():
            for parameter, gradient in zip(submodel.parameters(), gradients, strict=True):
                parameter -= SGD.lr * factor * gradient
        expected, found = submodel.update(), updates.of_client(0)
        assert found.blocks.tolist() == np.flatnonzero(assignment.held[row]).tolist()
        torch.testing.assert_close(found.adapters, expected.adapters, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.heads, expected.heads, rtol=1e-9, atol=1e-12)
        assert updates.processed.tolist() == [len(batch)]
        assert float(updates.losses) == pytest.approx(len(batch) * float(loss.detach()), rel=1e-12)


def test_the_loss_scale_of_low_precision_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting("vit", replace(SGD, proximal_mu=0.1))
    (plain,) = setting.rounds(None)
    monkeypatch.setattr("fedra_engine.execution.sequential.loss_scale", lambda dtype: 2.0**10)
    (scaled,) = setting.rounds(None)
    for name, tensor in plain.after.items():
        torch.testing.assert_close(scaled.after[name], tensor, rtol=1e-12, atol=1e-14)
