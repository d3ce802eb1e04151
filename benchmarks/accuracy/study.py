"""The accuracy study: how far each method gets within a time limit.

All methods take turns in slices of rounds, so that whatever ends the study, all have about equally many. Each slice is
in the output folder, evaluated, before the next begins, and a later call goes on from there to the bit.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.accuracy.inputs import StudyImages, model_folder, read_images
from benchmarks.accuracy.output import (
    LOG_FILE,
    RESULTS_FILE,
    TABLES_FILE,
    check_output,
    read_calls,
    restore_runs,
    save_runs,
)
from benchmarks.accuracy.runs import StudyRun, next_target
from benchmarks.accuracy.setting import StudySetting, precision
from benchmarks.accuracy.tables import REFERENCES, evaluations, markdown, short_table
from benchmarks.kernels.measure import device_name, name_and_message, versions
from fedra_engine.callbacks.run_folder import RunFolder, make_folder
from fedra_engine.data.domain_data import prepare_source
from fedra_engine.execution.evaluation import accuracies
from fedra_engine.experiment import Experiment
from fedra_engine.models.state import EvaluatedModel
from fedra_engine.runtime.errors import InputError, printable
from fedra_engine.runtime.files import content_hash, write_whole
from fedra_engine.studies.probe import ridge_probe


def run_study(
    images: Path,
    model: Path,
    output: Path,
    *,
    continue_from: Path | None = None,
    seconds: float,
    setting: StudySetting | None = None,
) -> bool:
    """Train the methods of `setting` on the GPU, or the CPU if there is none, for as many rounds as fit.

    Args:
        images: a folder <domain>/<class>/<image>, or a pack.
        model: a transformers folder, or a pack.
        output: gets the results; made if there is none.
        continue_from: output of an earlier study of the same images, model and setting to go on from.
        seconds: wall-clock time after which no round begins.
        setting: PACS and a ViT-S/14 if not given.

    Returns:
        Whether every method has at least one round, and none was stopped by an error.

    Raises:
        InputError: something that is given cannot be used.
    """
    return _Study(images, model, output, continue_from, seconds, setting or StudySetting()).run()


class _Study:
    """A call of `run_study`."""

    def __init__(
        self,
        images: Path,
        model: Path,
        output: Path,
        earlier: Path | None,
        seconds: float,
        setting: StudySetting,
    ) -> None:
        self._started = time.monotonic()
        self._deadline = self._started + seconds
        self._images, self._model, self._output, self._earlier = images, model, output, earlier
        self._setting = setting
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._device = self._accelerator.device
        self._trained = 0
        device = device_name(self._device)
        self._results: dict[str, Any] = {
            "command": f"python {shlex.join(sys.argv)}",
            "device": device,
            "versions": versions(),
            "setting": setting.described() | {"precision": precision(self._device)},
            "calls": [
                *_earlier_calls(earlier),
                {"device": device, "versions": versions(), "seconds": 0.0, "rounds": 0},
            ],
            "seeds": {},
        }

    def run(self) -> bool:
        check_output(self._output)
        self._say(f"reading {self._images} and {self._model}")
        with TemporaryDirectory(prefix="fedra_study_") as folder, model_folder(self._model) as model:
            work = Path(folder)
            images = read_images(self._images, model, self._setting.image_size)
            make_folder(self._output)
            known = {seed: self._restore(seed, work / str(seed)) for seed in self._setting.seeds}
            self._say(f"{len(images.data)} images of {len(images.data.domains)} domains on {self._results['device']}")
            for seed, of_seed in known.items():
                if time.monotonic() >= self._deadline:
                    break
                if not self._finished(seed):
                    self._train(seed, work / str(seed), images, model, of_seed)
        self._write()
        seeds = list(self._results["seeds"].values())
        if seeds:
            print(short_table(self._results), flush=True)
        stopped = any(run["stopped"] for found in seeds for run in found["methods"].values())
        if not (self._trained or stopped or all(map(self._finished, self._setting.seeds))):
            print(f"no round fitted into {self._deadline - self._started:g} s", flush=True)
        return not stopped and all(
            any(found["methods"][method]["records"] for found in seeds) for method in self._setting.methods
        )

    def _restore(self, seed: int, work: Path) -> dict[str, Any] | None:
        """Take over what an earlier study has of `seed`."""
        work.mkdir()
        known = None if self._earlier is None else restore_runs(self._earlier, seed, work)
        if known is not None:
            save_runs(self._output, seed, work, known)
            self._results["seeds"][seed] = self._found(work, known, {})
            self._write()
        return known

    def _finished(self, seed: int) -> bool:
        found = self._results["seeds"].get(seed)
        if found is None:
            return False
        rounds = [len(found["methods"].get(method, {"records": []})["records"]) for method in self._setting.methods]
        return min(rounds) >= self._setting.rounds

    def _train(self, seed: int, work: Path, images: StudyImages, model: Path, known: dict[str, Any] | None) -> None:
        """All methods with `seed`, until they have all rounds or time is over."""
        setting = self._setting
        config = setting.experiment(str(self._images), str(model), self._device, setting.methods[0], seed)
        data = prepare_source(images.data, config.data, seed, split=not images.is_split)
        identity = self._results["setting"] | {"images": images.digest()}
        self._check_identity(identity, known)
        runs: list[StudyRun] = []
        for method in setting.methods:
            config = setting.experiment(str(self._images), str(model), self._device, method, seed)
            runs.append(StudyRun(config, work / method, data, self._output / LOG_FILE, self._accelerator))
        self._say(f"seed {seed}  {len(runs)} methods are set up")
        experiment = runs[0].experiment
        identity |= {"model": _digest(experiment)}
        self._check_identity(identity, known)
        if known is None:
            known = _references(experiment) | {"identity": identity}
            self._keep(seed, work, known, runs)
        averages = (f"{name} {100 * mean(known[key].values()):.1f} %" for name, key in REFERENCES.items())
        self._say(f"seed {seed}  average of {', '.join(averages)}")
        for run in runs:
            run.pause_seconds = known["evaluation_seconds"]
        self._take_turns(seed, runs, partial(self._keep, seed, work, known, runs))

    def _check_identity(self, identity: dict[str, Any], known: dict[str, Any] | None) -> None:
        for name, value in identity.items():
            if known is not None and known["identity"].get(name) != value:
                raise InputError(
                    f"continue: found another {name} than in {self._earlier}, expected a study of the same images, "
                    "model and setting"
                )

    def _take_turns(self, seed: int, runs: Sequence[StudyRun], keep: Callable[[], None]) -> None:
        """Train slice by slice; `keep` writes the results of this seed."""
        setting = self._setting
        while True:
            target = next_target(
                runs, slice=setting.slice, rounds=setting.rounds, seconds=self._deadline - time.monotonic()
            )
            turn = [run for run in runs if run.rounds < target and not run.stopped]
            if not turn or time.monotonic() >= self._deadline:
                break
            # Single rounds that only show what a round takes are not worth a pause.
            is_slice = target % setting.slice == 0 or all(run.round_seconds is not None for run in turn)
            for run in turn:
                if time.monotonic() >= self._deadline:
                    break
                self._advance(run, target, save=is_slice)
                if is_slice or run.stopped:
                    keep()
                self._tell(seed, run)
        unsaved = [run for run in runs if run.unsaved]
        for run in unsaved:
            self._advance(run, run.rounds, save=True)
        if unsaved:
            keep()

    def _keep(self, seed: int, work: Path, known: dict[str, Any], runs: Sequence[StudyRun]) -> None:
        """Write what `seed` has so far."""
        self._results["seeds"][seed] = self._found(work, known, {run.method: run.stopped for run in runs})
        save_runs(self._output, seed, work, known)
        self._write()

    def _advance(self, run: StudyRun, target: int, *, save: bool) -> None:
        """Train up to `target` rounds and `save` them if asked to; an error stops this run alone."""
        before = run.rounds
        try:
            run.advance(target, self._deadline)
            if save:
                run.save()
        except Exception as error:
            # The other methods go on; what this one has is kept.
            run.stopped = name_and_message(error)
            run.forget_unsaved()
            with (self._output / LOG_FILE).open("a") as log:
                log.write(f"{run.method} stopped\n{traceback.format_exc()}\n")
        self._trained += run.rounds - before

    def _found(self, work: Path, known: dict[str, Any], stopped: dict[str, str]) -> dict[str, Any]:
        """The results of one seed: the frozen model's, and the records of every method."""
        methods = {}
        for method in self._setting.methods:
            records = RunFolder(work / method).read_metrics()
            for record in records:
                # Who held what stays in the archive of the runs.
                record.pop("allocation", None)
            methods[method] = {"records": records, "stopped": stopped.get(method, "")}
        return {name: value for name, value in known.items() if name != "identity"} | {"methods": methods}

    def _write(self) -> None:
        self._results["calls"][-1] |= {"seconds": time.monotonic() - self._started, "rounds": self._trained}
        write_whole(self._output / RESULTS_FILE, json.dumps(self._results, indent=1) + "\n")
        write_whole(self._output / TABLES_FILE, markdown(self._results))

    def _say(self, line: str) -> None:
        print(f"{printable(line)}  (after {time.monotonic() - self._started:.0f} s)", flush=True)

    def _tell(self, seed: int, run: StudyRun) -> None:
        known = evaluations(run.records)
        accuracy = f"average {100 * mean(known[max(known)].values()):5.1f} %" if known else ""
        pace = "" if run.round_seconds is None else f"{run.round_seconds:.2f} s a round, "
        left = max(self._deadline - time.monotonic(), 0)
        state = f"stopped: {run.stopped}" if run.stopped else f"{pace}{left:.0f} s left"
        print(f"seed {seed}  {run.method:<12}  {run.rounds:>4} rounds  {accuracy}  {state}", flush=True)


def _earlier_calls(earlier: Path | None) -> Sequence[dict[str, Any]]:
    if earlier is None:
        return []
    if not earlier.is_dir():
        raise InputError(f"continue: found no folder {earlier}, expected the output of an earlier study")
    return read_calls("continue", earlier)


def _references(experiment: Experiment) -> dict[str, Any]:
    """Accuracies of the frozen model and of the ridge probe, and the number of test samples of each domain."""
    probe = ridge_probe(experiment)
    started = time.monotonic()
    everything = EvaluatedModel(np.arange(experiment.foundation.depth))
    frozen = accuracies(experiment.evaluator.scores(experiment.initial_state, everything))
    seconds = time.monotonic() - started
    counts = experiment.test_samples.domains.bincount(minlength=len(experiment.domains)).tolist()
    return {
        "frozen": frozen,
        "probe": probe.accuracy,
        "alpha": probe.alpha,
        "evaluation_seconds": seconds,
        "tests": dict(zip(experiment.domains, counts, strict=True)),
    }


def _digest(experiment: Experiment) -> str:
    """A hash of the frozen weights in the precision in which they are used."""
    digest = content_hash()
    for name, tensor in sorted(experiment.foundation.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
