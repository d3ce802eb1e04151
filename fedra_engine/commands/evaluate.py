"""`evaluate`: accuracy and loss of an earlier run's newest state, on its own or other test samples."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import DataConfig, ExecutionConfig, ExperimentConfig
from fedra_engine.config.fields import type_of_field
from fedra_engine.config.options import group
from fedra_engine.config.parsing import (
    CommandOption,
    Parser,
    given_options,
    quiet_libraries,
    read_config,
    split_options,
    split_positional,
)
from fedra_engine.config.validation import validate
from fedra_engine.runtime.errors import InputError, count_of

if TYPE_CHECKING:
    from fedra_engine.experiment import Experiment

DESCRIPTION = """Accuracy and loss of an earlier run by domain, and the perplexity of a causal language model.

  fedra evaluate runs/NAME
  fedra evaluate runs/NAME --data.root OTHER --data.domains photo,sketch

The run's newest state is evaluated as the run itself does it. With options of data, these are the test samples of other
data, of the same classes; the run's own must still be there, as the method's clients are made of them.
"""
_OPTIONS = (CommandOption("json", "[true|false]", "Print JSON, in full precision", "false", ("true", "false")),)


@dataclass
class _Changeable:
    """Options that replace those of the run."""

    data: DataConfig = group(DataConfig)
    execution: ExecutionConfig = group(ExecutionConfig)


def main(arguments: Sequence[str]) -> None:
    """Evaluate the run named by `arguments`, and print its accuracy and loss."""
    options, rest = split_options(arguments, _OPTIONS)
    folders, others = split_positional(rest)
    asked = [option for option in given_options(others) if option.split(".")[0] not in ("data", "execution")]
    if {"help", "help_all"} & set(asked):
        Parser(_Changeable, DESCRIPTION, _OPTIONS, reads_files=False).parse(others)
    for name in asked:
        if name in ("config", "print_config") or type_of_field(name, ExperimentConfig) is not None:
            raise InputError(f"evaluate: found --{name}, expected options of data and execution alone")
    # Also refuses options that there are not.
    Parser(_Changeable).parse(others)
    if len(folders) != 1:
        found = ", ".join(folders) or "no run"
        raise InputError(f"evaluate: found {found}, expected the folder of one run: fedra evaluate <folder>")
    folder = RunFolder.open(os.path.expanduser(folders[0]))
    config, own = read_config(folder.config_file, *others), read_config(folder.config_file)
    for each in (config, own):
        validate(each)
    quiet_libraries()
    from fedra_engine.callbacks.checkpoint import restore_newest
    from fedra_engine.run import build
    from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text
    from fedra_engine.simulation import score

    experiment = build(replace(config, data=own.data))
    start = restore_newest(experiment, folder)
    if config.data != own.data:
        experiment = on_other_data(experiment, config)
    scores = score(experiment, start.state)
    if not experiment.processes.is_main:
        return
    measures = {
        "accuracy": {domain: score.accuracy for domain, score in scores.items()},
        "loss": {domain: score.loss for domain, score in scores.items()},
    }
    if not experiment.foundation.task.trains_head:
        measures["perplexity"] = {domain: _perplexity(loss) for domain, loss in measures["loss"].items()}
    if options.json == "true":
        # JSON has neither infinity nor NaN.
        finite = {
            name: {domain: value if math.isfinite(value) else None for domain, value in values.items()}
            for name, values in measures.items()
        }
        print(json.dumps({"rounds": start.round, **finite}, indent=2, allow_nan=False))
        return
    rows = [["", *scores, "average"]]
    for measure, values in measures.items():
        name, scale, digits = ("accuracy (%)", 100, 1) if measure == "accuracy" else (measure, 1, 4)
        rows.append([name, *(f"{scale * value:.{digits}f}" for value in (*values.values(), mean(values.values())))])
    table = table_text(rich_table(rows))
    PlainConsole().print(f"after {count_of(start.round, 'round')}", table, sep="\n\n", soft_wrap=True)


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


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
