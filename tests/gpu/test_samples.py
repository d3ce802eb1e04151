"""Batches on a GPU: the values of the CPU, and no copy that the host waits for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedra_engine.data import samples as samples_module
from fedra_engine.data.preprocessing import Augmentation, Preprocessing
from fedra_engine.data.samples import ImageSamples, Samples, StoredRows, TokenSamples
from fedra_engine.runtime.randomness import SampleDraws

CPU, GPU = torch.device("cpu"), torch.device("cuda")
COUNT = 50


def make_images(augmentation: Augmentation | None = None) -> ImageSamples:
    pixels = torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8)
    labels = torch.randint(0, 5, (COUNT,))
    preprocessing = Preprocessing(8, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    domains = torch.zeros(COUNT, dtype=torch.int64)
    rows = StoredRows([pixels[:20], pixels[20:]])
    return ImageSamples(rows, labels, domains, preprocessing, augmentation=augmentation)


def make_texts(*, learnt: bool) -> TokenSamples:
    lengths = torch.randint(2, 16, (COUNT,))
    ids = StoredRows([torch.randint(0, 99, (COUNT, 16), dtype=torch.int32)])
    labels = None if learnt else torch.randint(0, 5, (COUNT,))
    return TokenSamples(ids, torch.arange(COUNT), lengths, lengths // 2, torch.zeros(COUNT).long(), labels)


MAKE: dict[str, Callable[[], Samples]] = {
    "images": make_images,
    "flipped": lambda: make_images(Augmentation(None)),
    "cropped": lambda: make_images(Augmentation(0.3)),
    "texts": lambda: make_texts(learnt=False),
    "causal_lm": lambda: make_texts(learnt=True),
}


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", ["images", "flipped", "cropped", "texts", "causal_lm"])
def test_batches_are_those_of_the_cpu_and_nothing_waits(
    monkeypatch: pytest.MonkeyPatch, resident: bool, kind: str
) -> None:
    if not resident:
        monkeypatch.setattr(samples_module, "RESIDENT_SHARE", 0.0)
    samples: Samples = MAKE[kind]()
    rows, draws = torch.tensor([49, 0, 20, 20, 7]), SampleDraws(0, 0, [3, 1], [0, 2], [2, 3])
    # What stays on the device is copied there first.
    samples.batch(rows, GPU, torch.float32, draws)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = samples.batch(rows, GPU, torch.float32, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = samples.batch(rows, CPU, torch.float32, draws)
    assert found.inputs.keys() == expected.inputs.keys()
    for name, tensor in expected.inputs.items():
        torch.testing.assert_close(found.inputs[name].cpu(), tensor)
    assert torch.equal(found.labels.cpu(), expected.labels)
