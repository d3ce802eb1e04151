"""`evaluate`: all measures of an earlier run's newest or best state or exported model, on its own or other samples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import ClientsConfig, DataConfig, EarlyStoppingConfig, ExecutionConfig, ExperimentConfig
from fedra_engine.config.data import HeldOut
from fedra_engine.config.fields import type_of_field
from fedra_engine.config.options import group
from fedra_engine.config.parsing import (
    CommandOption,
    Parser,
    asks_for_help,
    given_options,
    quiet_libraries,
    read_config,
    split_options,
    split_positional,
    switch,
)
from fedra_engine.config.validation import validate
from fedra_engine.runtime.errors import InputError, count_of
from fedra_engine.runtime.quick_imports import quick_imports

if TYPE_CHECKING:
    from fedra_engine.execution.evaluation import Score
    from fedra_engine.experiment import Experiment
    from fedra_engine.models.state import GlobalState

DESCRIPTION = """Accuracy, loss and the other measures of an earlier run by domain (docs/measures.md).

  fedra evaluate runs/NAME
  fedra evaluate runs/NAME --data.root OTHER --data.domains photo,sketch
  fedra evaluate runs/NAME --best --data.validation_fraction 0
  fedra evaluate runs/NAME --model FOLDER

The run's newest state is evaluated as the run itself does it; with --best, that of the round which keep_best has kept.
With options of data, these are the test samples of other data, of the same classes, at the run's image size; the run's
own must still be there, as the method's clients are made of them. --data.validation_fraction 0 gives the test samples
of the run's own data, where it was measured on validation samples. With --model, a model that fedra export has written
is evaluated as it is.
"""
_OPTIONS = (
    switch("json", "Print JSON, in full precision"),
    switch("best", "Evaluate the best round, where keep_best kept it"),
    CommandOption("model", "FOLDER", "An exported model to evaluate in place of the run's state"),
)


@dataclass
class _Changeable:
    """Options that replace those of the run."""

    data: DataConfig = group(DataConfig)
    execution: ExecutionConfig = group(ExecutionConfig)


_OF_TRAINING = (
    *("augmentation", "crop_scale", "partition", "clients_per_domain", "clients", "dirichlet_alpha", "balanced"),
    *("shards_per_client", "quantity_sigma", "samples_per_client", "min_samples"),
)
_REFUSED = {f"data.{name}": "none: it changes training samples alone" for name in _OF_TRAINING}
_REFUSED["execution.cuda_graphs"] = "none: it changes training alone"
_REFUSED["data.image_size"] = "none: it is the run's"
PARSER = Parser(_Changeable, DESCRIPTION, _OPTIONS, reads_files=False, refused=_REFUSED, replaces_run=True)


def main(arguments: Sequence[str]) -> None:
    """Evaluate the run named by `arguments`, and print its accuracy and loss."""
    options, rest = split_options(arguments, _OPTIONS)
    folders, others = split_positional(rest)
    if asks_for_help(others):
        PARSER.parse(others)
    for name in (option for option in given_options(others) if option.split(".")[0] not in ("data", "execution")):
        if name in ("config", "print_config") or type_of_field(name, ExperimentConfig) is not None:
            raise InputError(f"evaluate: found --{name}, expected options of data and execution alone")
    # Also refuses options that there are not.
    PARSER.parse(others)
    if len(folders) != 1:
        found = ", ".join(folders) or "no run"
        raise InputError(f"evaluate: found {found}, expected the folder of one run: fedra evaluate <folder>")
    best = options.best == "true"
    if best and options.model is not None:
        raise InputError(f"best: found true with --model {options.model}, expected one of the two")
    folder = RunFolder.open(os.path.expanduser(folders[0]))
    config, own = read_config(folder.config_file, *others), read_config(folder.config_file)
    # Nothing is chosen here, so test samples may be evaluated.
    config = replace(config, early_stopping=EarlyStoppingConfig(), keep_best=None)
    for each in (config, own):
        validate(each)
    quiet_libraries()
    with quick_imports():
        from fedra_engine.simulation import score

    if options.model is None:
        experiment, state, rounds = _of_run(folder, replace(config, data=own.data), best=best)
        what: dict[str, object] = {"rounds": rounds}
        title = f"after {count_of(rounds, 'round')}"
    else:
        experiment = _of_model(replace(config, data=own.data), os.path.expanduser(options.model))
        state, what, title = experiment.initial_state, {"model": options.model}, f"model: {options.model}"
    if config.data != own.data:
        experiment = on_other_data(experiment, replace(experiment.config, data=config.data))
    held_out = config.data.held_out
    title += f", on {len(experiment.evaluator.test.domains):,} {held_out} samples"
    scores = score(experiment, state)
    if not experiment.processes.is_main:
        return
    _print(scores, what, title, held_out, as_json=options.json == "true")


def _of_run(folder: RunFolder, config: ExperimentConfig, *, best: bool) -> tuple[Experiment, GlobalState, int]:
    """The run's experiment, its newest state or that of the `best` round, and how many rounds were trained by then."""
    from fedra_engine.callbacks.checkpoint import restore_best, restore_newest
    from fedra_engine.run import build

    experiment = build(config)
    start = restore_best(experiment, folder) if best else restore_newest(experiment, folder)
    return experiment, start.state, start.round


def _of_model(config: ExperimentConfig, folder: str) -> Experiment:
    """An experiment on the run's data whose initial state is the model in `folder`; InputError for other classes."""
    from fedra_engine.data.domain_data import listed
    from fedra_engine.run import build

    model = replace(config.model, path=folder, pooling="auto", head_init="loaded", load_in=None)
    # The adapters are merged. What is added are new ones, whose B is zero, and an export may have fewer blocks.
    lora = replace(config.lora, layers_to_transform=[])
    experiment = build(
        ExperimentConfig(
            seed=config.seed,
            data=config.data,
            model=model,
            lora=lora,
            clients=ClientsConfig(capacities=[1]),
            execution=config.execution,
        )
    )
    settings: Any = experiment.foundation.model.config
    found, expected = list((settings.id2label or {}).values()), experiment.train_data.classes
    if experiment.foundation.task.trains_head and found != expected:
        raise InputError(f"model: found the classes {listed(found)}, expected those of the run: {listed(expected)}")
    return experiment


def _print(
    scores: Mapping[str, Score], what: dict[str, object], title: str, held_out: HeldOut, *, as_json: bool
) -> None:
    """Print the scores by domain, as JSON after the fields of `what`, or as a table under the `title`."""
    from fedra_engine.execution.evaluation import measures
    from fedra_engine.federation.averages import finite_values
    from fedra_engine.runtime.measure_text import measure_number, measure_title
    from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text

    found = measures(scores)
    if as_json:
        finite = {name: finite_values(values) for name, values in found.items()}
        print(json.dumps({**what, **finite}, indent=2, allow_nan=False))
        return
    rows = [["", *scores, "average"]]
    for measure, values in found.items():
        each = (*values.values(), mean(values.values()))
        rows.append([measure_title(measure, held_out), *(measure_number(measure, value) for value in each)])
    table = table_text(rich_table(rows))
    PlainConsole().print(title, table, sep="\n\n", soft_wrap=True)


def on_other_data(experiment: Experiment, config: ExperimentConfig) -> Experiment:
    """Replace the test samples by those of `config.data`, which must have the run's task, classes and image size."""
    from fedra_engine.data.domain_data import listed
    from fedra_engine.data.samples import prepare
    from fedra_engine.inputs import Inputs

    own = experiment.train_data
    if config.data.image_size != experiment.config.data.image_size:
        raise InputError(f"data.image_size: found {config.data.image_size}, expected that of the run")
    with experiment.processes.raise_on_all():
        data = Inputs().load_data(config)
        if (data.task, data.classes) != (own.task, own.classes):
            raise InputError(
                f"data: found the classes {listed(data.classes)} for {data.task}, expected those of the run for "
                f"{own.task}: {listed(own.classes)}"
            )
        path, settings = Inputs().model_path(config), experiment.foundation.model.config
        test = prepare(data, config.data, path, settings, cut_texts=config.lora.dropout == 0 and not config.trace).test
    evaluator = replace(experiment.evaluator, test=test, domains=data.domains)
    return replace(experiment, evaluator=evaluator, test_samples=test)
