"""Runs with stand-ins: where their samples come from, and that an interrupted run goes on to the bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedra_engine.callbacks.fingerprint import Fingerprint, check_fingerprint, fingerprint
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.saved_rounds import load_newest_intact
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.runtime.errors import InputError
from tests.running import continue_run, run_experiment, small_config

LINEAR = {"stand_in": "linear", "stand_in_samples": 50}


def built(folder: Path, **changes: Any) -> Experiment:
    return build_experiment(small_config(folder, **changes), torch.device("cpu"))


def test_samples_are_drawn_from_all_clients_or_from_one_domain(tmp_path: Path) -> None:
    everywhere, somewhere = (
        built(tmp_path, method={**LINEAR, "stand_in_data": domain}).stand_in_fit for domain in (None, "noisy")
    )
    assert everywhere is not None
    assert somewhere is not None
    domains = everywhere.samples.domains.numpy()
    assert everywhere.rows.tolist() == list(range(len(domains)))
    assert 0 < len(somewhere.rows) < len(domains)
    assert len(set(domains[somewhere.rows])) == 1
    assert set(np.flatnonzero(domains == domains[somewhere.rows[0]])) == set(somewhere.rows)


def test_samples_can_be_any_images_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images" / "below").mkdir(parents=True)
    levels = np.random.default_rng(0).integers(0, 256, size=(3, 8, 8), dtype=np.uint8)
    for number, pixels in enumerate(levels):
        Image.fromarray(pixels).save(tmp_path / "images" / ("below" if number else ".") / f"{number}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    fit = built(tmp_path, method={**LINEAR, "stand_in_data": str(tmp_path / "images")}).stand_in_fit
    assert fit is not None
    assert fit.rows.tolist() == [0, 1, 2]


def test_neither_a_domain_nor_a_folder_with_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stand_in_data: found no images below 'nowhere', expected one of"):
        built(tmp_path, method={**LINEAR, "stand_in_data": "nowhere"})


@pytest.mark.slow
@pytest.mark.parametrize("refit", [None, 2])
def test_an_interrupted_run_goes_on_to_the_bit(tmp_path: Path, refit: int | None) -> None:
    method = {**LINEAR, "stand_in_refit": refit}
    training = {"batch_size": 6, "max_local_steps": 2, "lr_schedule": "constant"}
    whole = run_experiment(tmp_path / "whole", rounds=4, method=method, training=training)
    halves = run_experiment(tmp_path / "halves", rounds=3, method=method, training=training)
    shutil.rmtree(halves / "adapters")
    longer = small_config(tmp_path / "halves", rounds=4, method=method, training=training)
    continue_run(longer, RunFolder(halves))
    expected, found = load_newest_intact(whole), load_newest_intact(halves)
    assert expected is not None
    assert found is not None
    assert expected.round == found.round == 3
    assert {"state.stand_ins.mean", "state.stand_ins.down", "state.stand_ins.up"} <= expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def test_maps_follow_the_global_model_when_they_are_fitted_again(tmp_path: Path) -> None:
    experiment = built(tmp_path, method={**LINEAR, "stand_in_refit": 3})
    _, assignment = experiment.assigned_work(0)
    assert experiment.initial_state.stand_ins is None
    state = experiment.with_fresh_stand_ins(experiment.initial_state, 0, assignment)
    assert experiment.with_fresh_stand_ins(state, 2, assignment) is state
    state.adapters.normal_(std=0.1)
    fresh = experiment.with_fresh_stand_ins(state, 3, assignment)
    assert fresh.stand_ins is not None
    assert state.stand_ins is not None
    change = fresh.stand_ins.down @ fresh.stand_ins.up - state.stand_ins.down @ state.stand_ins.up
    assert change.abs().max() > 0.01


def test_the_first_maps_are_those_of_the_frozen_model_whenever_they_are_needed(tmp_path: Path) -> None:
    experiment = built(tmp_path, method=LINEAR)
    _, assignment = experiment.assigned_work(0)
    frozen = experiment.initial_state
    trained = replace(frozen, adapters=frozen.adapters + 0.1)
    expected, found = (experiment.with_fresh_stand_ins(state, 2, assignment) for state in (frozen, trained))
    assert found.adapters is trained.adapters
    assert expected.stand_ins is not None
    assert found.stand_ins is not None
    for one, other in zip(expected.stand_ins, found.stand_ins, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_nothing_is_fitted_where_nothing_is_replaced(tmp_path: Path) -> None:
    experiment = built(tmp_path, method={**LINEAR, "name": "alllarge"})
    _, assignment = experiment.assigned_work(0)
    assert experiment.with_fresh_stand_ins(experiment.initial_state, 0, assignment).stand_ins is None


def test_a_run_does_not_go_on_with_other_samples_of_the_server(tmp_path: Path) -> None:
    def fingerprint_with(level: int, folder: str) -> Fingerprint:
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((8, 8), level, dtype=np.uint8)).save(tmp_path / folder / "image.png")
        return fingerprint(built(tmp_path, method={**LINEAR, "stand_in_data": str(tmp_path / folder)}))

    begun = fingerprint_with(10, "here")
    # Equal samples may be elsewhere.
    check_fingerprint(fingerprint_with(10, "there"), begun, "the run")
    with pytest.raises(InputError, match=r"method.stand_in_data: found other samples for stand-ins than the run began"):
        check_fingerprint(fingerprint_with(11, "others"), begun, "the run")


def test_only_samples_that_may_be_drawn_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(9):
        Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(tmp_path / "images" / f"{number}.png")
    method = {**LINEAR, "stand_in_data": str(tmp_path / "images"), "stand_in_samples": 4}
    fit = built(tmp_path, method=method).stand_in_fit
    assert fit is not None
    assert len(fit.samples.domains) == 4
