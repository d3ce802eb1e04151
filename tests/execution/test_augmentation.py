"""With augmented images, too, the sweep gives every client its own sub-model's update, whoever shares the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedra_engine.data.preprocessing import Augmentation, Preprocessing
from fedra_engine.data.samples import ImageSamples, StoredRows
from tests import tiny_federation
from tests.execution.test_assignments import EXITS, early_exits
from tests.execution.test_exactness import assert_same_change, assert_same_rounds
from tests.tiny import CLASSES
from tests.tiny_federation import ADAMW, SGD, make_setting


def make_images(augmentation: Augmentation | None, count: int) -> ImageSamples:
    rng = np.random.default_rng(1)
    return ImageSamples(
        pixels=StoredRows([torch.from_numpy(rng.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8))]),
        labels=torch.from_numpy(rng.integers(0, CLASSES, count)),
        domains=torch.zeros(count, dtype=torch.int64),
        preprocessing=Preprocessing(8, 1, (0.5,), (0.3,)),
        augmentation=augmentation,
    )


@pytest.fixture(params=[None, 0.3], ids=["flip", "crop_flip"])
def augmented(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    augmentation = Augmentation(request.param)
    monkeypatch.setattr(tiny_federation, "make_samples", lambda family, count: make_images(augmentation, count))


@pytest.mark.usefixtures("augmented")
@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_sweep_equals_sequential_in_float64(family: str) -> None:
    assert_same_rounds(make_setting(family, ADAMW, dropout=0.3), lanes=3, count=2, tolerance=1e-8)


@pytest.mark.usefixtures("augmented")
@pytest.mark.parametrize("lanes", [1, 2, 6, 50])
def test_lane_count_does_not_change_updates(lanes: int) -> None:
    assert_same_rounds(make_setting("vit", SGD), lanes=lanes, count=1, tolerance=1e-8)


@pytest.mark.usefixtures("augmented")
def test_all_exits_of_a_client_see_the_same_images() -> None:
    setting = replace(make_setting("vit", SGD), assignment=early_exits, exits=len(EXITS))
    assert_same_rounds(setting, lanes=3, count=2, tolerance=1e-8)


def test_what_clients_learn_depends_on_the_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_federation, "make_samples", lambda family, count: make_images(None, count))
    (plain,) = make_setting("vit", SGD).rounds(3)
    monkeypatch.setattr(tiny_federation, "make_samples", lambda family, count: make_images(Augmentation(0.3), count))
    (changed,) = make_setting("vit", SGD).rounds(3)
    with pytest.raises(AssertionError):
        assert_same_change(changed.after, plain.after, plain.before, tolerance=1e-2)
