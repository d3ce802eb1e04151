"""`export`: write the model of an earlier run, its adapters merged, as a model of transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedra_engine.config.options import NATURAL
from fedra_engine.config.parsing import (
    CommandOption,
    NoFields,
    Parser,
    parse_option,
    quiet_libraries,
    split_options,
    split_positional,
    switch,
)
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.quick_imports import quick_imports

DESCRIPTION = """Write the tuned model of a finished run, its adapters merged, as a model of transformers.

  fedra export runs/NAME
  fedra export runs/NAME --output FOLDER --client 3
  fedra export runs/NAME --best

The folder has the model, its classifier, the names of its classes, the image processor or tokenizer, and a model card;
`from_pretrained` loads it. In float32 it has the run's exported accuracy, as fedra evaluate runs/NAME --model FOLDER
measures. --client writes the sub-model of the blocks that a client held in its last round, with the weights after the
run's last round. --best writes the model after the round that keep_best has kept, not after the last one. The run's
data must still be there.
"""
_OPTIONS = (
    CommandOption(
        "output", "FOLDER", "A new folder; by default model, best_model or model_client_N in that of the run"
    ),
    CommandOption("client", "N", "The number of a client, from 0, whose sub-model is written"),
    switch("best", "Export the best round, where keep_best kept it"),
)
PARSER = Parser(NoFields, DESCRIPTION, _OPTIONS, reads_files=False)


def main(arguments: Sequence[str]) -> None:
    """Export the run named by `arguments`, and print where its model is."""
    options, rest = split_options(arguments, _OPTIONS)
    folders, others = split_positional(rest)
    # Answers --help, too.
    PARSER.parse(others)
    if len(folders) != 1:
        found = ", ".join(folders) or "no run"
        raise InputError(f"export: found {found}, expected the folder of one run: fedra export <folder>")
    client = None if options.client is None else parse_option("client", options.client, int, NATURAL)
    run, best = Path(os.path.expanduser(folders[0])), options.best == "true"
    default = run / ("best_" * best + ("model" if client is None else f"model_client_{client}"))
    output = default if options.output is None else Path(os.path.expanduser(options.output))
    if output.exists():
        raise InputError(f"output: found {output}, expected a new folder")
    quiet_libraries()
    with quick_imports():
        from fedra_engine.run import load_run
        from fedra_engine.runtime.tables import PlainConsole

    load_run(run).save_model(output, client=client, best=best)
    PlainConsole().print(f"model: {output}", soft_wrap=True)
