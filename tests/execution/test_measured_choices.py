"""What `auto` stands for: measured once by the main process, and written where a resumed run finds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedra_engine import ExperimentConfig, build, simulate
from fedra_engine.config import LoraConfig
from fedra_engine.config.parsing import read_config
from fedra_engine.execution import measured_choices
from fedra_engine.execution.measured_choices import choose_attention, choose_dtype, with_earlier_choices
from fedra_engine.runtime.processes import Processes
from tests.tiny import TARGETS, make_samples, make_tiny

CPU = torch.device("cpu")
ALONE = Processes.alone()


def config(**model: Any) -> ExperimentConfig:
    default = ExperimentConfig(rounds=1)
    return replace(default, model=replace(default.model, **model))


def durations(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Let the measurements take these seconds, in turn."""
    left = iter(seconds)
    monkeypatch.setattr(measured_choices, "_shortest", lambda *runs: [(run(), next(left))[1] for run in runs])


def test_calls_that_are_compared_take_turns() -> None:
    called = []
    seconds = measured_choices._shortest(lambda: called.append("a"), lambda: called.append("b"))
    assert called[:4] == ["a", "b"] * 2
    assert len(called) == 2 * (1 + measured_choices._REPEATS)
    assert len(seconds) == 2


@pytest.mark.parametrize(("of_float32", "chosen"), [(1.6, "bfloat16"), (1.4, "float32"), (0.2, "float32")])
def test_bfloat16_must_be_clearly_faster(of_float32: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    durations(monkeypatch, of_float32, 1.0)
    found, reason = choose_dtype(config(dtype="auto"), CPU, ALONE)
    assert found.model.dtype == chosen
    assert reason == f"{chosen} (auto, a product of bfloat16 is {of_float32} times as fast as one of float32)"


@pytest.mark.parametrize(
    ("of_sdpa", "chosen", "reason"),
    [
        (1.3, "eager", "1.3 times as fast as sdpa"),
        (1.2, "sdpa", "eager is not 1.25 times as fast"),
        (0.8, "sdpa", "1.2 times as fast as eager"),
    ],
)
@pytest.mark.parametrize("family", ["vit", "bert", "llama", "clip_vision"])
def test_the_faster_attention_is_used(
    family: str, of_sdpa: float, chosen: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    foundation = make_tiny(family, LoraConfig(rank=3, target_modules=TARGETS[family]), torch.float32)
    durations(monkeypatch, of_sdpa, 1.0)
    found, text = choose_attention(config(), foundation, make_samples(family, 4), ALONE)
    assert found.model.attention == chosen == foundation.model.config._attn_implementation  # type: ignore[union-attr]
    assert text == f"{chosen} (auto, {reason} for a block of the model)"


def test_what_is_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    durations(monkeypatch)
    foundation = make_tiny("vit", LoraConfig(rank=3, target_modules=TARGETS["vit"]))
    asked = config(dtype="bfloat16", attention="sdpa")
    assert choose_dtype(asked, CPU, ALONE) == (asked, "bfloat16")
    assert choose_attention(asked, foundation, make_samples("vit", 4), ALONE) == (asked, "sdpa")


@pytest.mark.parametrize("family", ["vit", "clip_vision"])
def test_a_model_that_the_caller_has_made_gets_the_attention_that_is_asked_for(family: str) -> None:
    foundation = make_tiny(family, LoraConfig(rank=3, target_modules=TARGETS[family]))
    settings: Any = foundation.model.config
    for attention in ("eager", "sdpa"):
        choose_attention(config(attention=attention), foundation, make_samples(family, 4), ALONE)
        assert settings._attn_implementation == attention


def test_a_run_that_must_be_repeatable_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    durations(monkeypatch)
    default = config(dtype="auto")
    repeatable = replace(default, execution=replace(default.execution, deterministic=True))
    chosen = build(repeatable).config.model
    assert (chosen.dtype, chosen.attention) == ("float32", "sdpa")


def test_a_run_writes_what_was_chosen_and_uses_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durations(monkeypatch, 2.0, 1.0, 3.0, 1.0)
    result = simulate(replace(config(dtype="auto"), output_dir=str(tmp_path), name="run"))
    written = read_config(tmp_path / "run" / "config.yaml")
    assert (written.model.dtype, written.model.attention) == ("bfloat16", "eager")
    assert result.config.model == written.model
    log = (tmp_path / "run" / "run.log").read_text()
    assert "bfloat16 (auto, a product of bfloat16 is 2.0 times as fast as one of float32)" in log
    assert "eager (auto, 3.0 times as fast as sdpa for a block of the model)" in log
    # Nothing is left to be measured.
    assert build(written).config.model == written.model
    assert with_earlier_choices(config(dtype="auto"), written).model == written.model
    assert with_earlier_choices(config(attention="sdpa"), written).model.attention == "sdpa"
