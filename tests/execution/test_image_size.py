"""The size of images is tried before any is decoded."""

from __future__ import annotations

import pytest
import torch

from fedra_engine.config import DataConfig, ExperimentConfig
from fedra_engine.execution import image_size
from fedra_engine.experiment import build_experiment


@pytest.mark.parametrize(("size", "few"), [(None, 4), (8, 4), (None, 5)])
def test_the_models_own_size_is_warned_of_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int | None, few: int
) -> None:
    """But for models whose images have few tokens anyway."""
    monkeypatch.setattr(image_size, "_LONG", 0.0)
    monkeypatch.setattr(image_size, "_FEW_TOKENS", few)
    build_experiment(ExperimentConfig(data=DataConfig(image_size=size)), torch.device("cpu"))
    found = [record.getMessage() for record in caplog.records if "data.image_size" in record.getMessage()]
    assert len(found) == (size is None and few == 4)
    assert all(text.startswith("data.image_size: at the model's own 8 pixels an image has 5 tokens") for text in found)


def test_a_long_time_is_told_in_minutes() -> None:
    assert image_size._slow_images_text(518, 1370, 2.0, 3000) == (
        "data.image_size: at the model's own 518 pixels an image has 1,370 tokens and takes about 2 s here, so the "
        "3,000 samples before the first round take about 100 min; a smaller data.image_size is faster"
    )
