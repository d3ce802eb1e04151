"""Model cards of what a run exports, as the Hugging Face hub reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from fedra_engine.callback import Outcome
from fedra_engine.config.options import IN_MEMORY
from fedra_engine.config.values import dump_yaml
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.experiment import Experiment
from fedra_engine.exports.loading_lines import (
    base_model,
    has_own_head,
    loading_lines,
    merged_loading_lines,
    peft_class,
)
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.loading import HEAD_FILE
from fedra_engine.runtime.errors import count_of, first_few, printable, span_of
from fedra_engine.runtime.measure_text import measure_number, percent

_PIPELINES = {
    "image_classification": "image-classification",
    "text_classification": "text-classification",
    "causal_lm": "text-generation",
}
"""The hub's names of the tasks."""
_NAMES = 20
"""Most domains and layers that are named."""


def adapter_card(experiment: Experiment, outcome: Outcome, best_by: str | None = None) -> str:
    """The `README.md` of an adapter: what it is, Python that loads and merges it, and the accuracy to expect.

    With `best_by`, it is the adapter of the best round by this measure, and `outcome` is that after this round.
    """
    config, foundation = experiment.config, experiment.foundation
    depth = len(experiment.method.evaluated_model().blocks)
    load_it = "load it" if base_model(config) else "put it on the model that the run was given, here `my_model`,"
    parts = [
        f"A LoRA adapter, tuned by fedra-engine in {count_of(outcome.rounds, 'round')} of `{config.method.name}`. "
        f"These lines {load_it} and {_example_use(experiment)}:",
        _code(loading_lines(foundation, config, depth, experiment.processing)),
        *_base_model_note(experiment),
        _expected_after(experiment, outcome, best_by),
    ]
    if depth < foundation.depth:
        parts.append(f"The tuned model is only the first {depth} of the pretrained model's {foundation.depth} blocks.")
    parts += [
        *_precision(experiment),
        *_quantization(experiment),
        *_auto_class(experiment, depth),
        "`model.merge_and_unload()` adds the adapter to the weights. `fedra export <run>` saves such a model with the "
        "names of its classes and all that belongs to it.",
        *_pipeline(experiment, "model.merge_and_unload()"),
        _facts(experiment, outcome),
        *([_figures(experiment, outcome)] if outcome.exported else []),
    ]
    return _front_matter(experiment, "peft") + "\n\n".join(parts) + "\n"


def merged_card(
    experiment: Experiment, outcome: Outcome, blocks: Sequence[int], client: int | None, best_by: str | None = None
) -> str:
    """The `README.md` of a merged model of `blocks`: the run's, or the sub-model of a `client`.

    With `best_by`, it is the model after the best round by this measure, and `outcome` is that after this round.
    """
    foundation, rounds = experiment.foundation, count_of(outcome.rounds, "round")
    what = "The model" if client is None else f"The sub-model of client {client}"
    parts = [
        f"{what} that fedra-engine tuned in {rounds} of `{experiment.config.method.name}`, with its adapters merged "
        f"into the weights. These lines load it and {_example_use(experiment)}:",
        _code(merged_loading_lines(foundation, experiment.processing)),
    ]
    if len(blocks) < foundation.depth:
        numbers = first_few([str(block + 1) for block in blocks], foundation.depth)
        parts.append(f"Of the pretrained model's {foundation.depth} blocks it has these, counted from 1: {numbers}.")
    if client is None:
        parts.append(_expected_after(experiment, outcome, best_by))
    else:
        after = "the run's last round" if best_by is None else f"round {outcome.rounds}, the best by `{best_by}`"
        parts.append(
            f"Its blocks are those of the client's last round by then, its weights those after {after}. Its "
            "accuracy was not measured: `fedra evaluate <run> --model <this folder>` does so."
        )
    parts += [*_precision(experiment), *_quantization(experiment)]
    parts += [*_pipeline(experiment, "folder"), _facts(experiment, outcome)]
    if client is None and outcome.exported:
        parts.append(_figures(experiment, outcome))
    return _front_matter(experiment, "transformers") + "\n\n".join(parts) + "\n"


def _front_matter(experiment: Experiment, library: str) -> str:
    config, base = experiment.config, base_model(experiment.config)
    facts: dict[str, object] = {"library_name": library, "pipeline_tag": _PIPELINES[experiment.train_data.task]}
    # The hub takes names of its own models and data sets only.
    if base is not None and not Path(base).is_dir():
        facts["base_model"] = base
    root = config.data.root
    if root is not None and root != IN_MEMORY and not Path(root).exists():
        facts["datasets"] = [root]
    facts["tags"] = ["lora", "federated-learning", "fedra-engine", config.method.name]
    return f"---\n{dump_yaml(facts)}---\n\n"


def _expected_after(experiment: Experiment, outcome: Outcome, best_by: str | None) -> str:
    if best_by is None:
        return _expected(experiment, outcome)
    return _expected_of_best(experiment, outcome, best_by)


def _expected(experiment: Experiment, outcome: Outcome) -> str:
    """The accuracy that the lines give."""
    inputs, average = experiment.foundation.model.main_input_name, percent(mean(outcome.exported.values()))
    text = (
        f"With the run's `{inputs}`, as the settings in `config.yaml` make them, `logits` has the `exported_accuracy` "
        f"of `summary.json`: {average} on average over the domains."
    )
    if outcome.tuned_is is not None:
        text += f" It cannot reproduce `tuned` in `summary.json`, which is the accuracy of {outcome.tuned_is}."
    return text


def _expected_of_best(experiment: Experiment, outcome: Outcome, measure: str) -> str:
    """The same for the best round, whose adapter is exported while the run goes on."""
    text = f"Of the rounds that the run evaluated until then, this one, {outcome.rounds}, was the best by `{measure}`."
    if not outcome.exported:
        return f"{text} The accuracy of the adapter alone was not measured, but that of {outcome.tuned_is}."
    inputs, average = experiment.foundation.model.main_input_name, percent(mean(outcome.exported.values()))
    return (
        f"{text} With the run's `{inputs}`, as the settings in `config.yaml` make them, `logits` has an accuracy of "
        f"{average} on average over the domains."
    )


def _example_use(experiment: Experiment) -> str:
    return "classify an image" if isinstance(experiment.processing, Preprocessing) else "run it on a text"


def _base_model_note(experiment: Experiment) -> list[str]:
    """What one must know of the base model that the lines load."""
    if base_model(experiment.config) is None:
        return []
    parts = ["`base` is where the base model was in the run: if it has moved, set `base` to where it is now."]
    if has_own_head(experiment.foundation):
        parts.append(
            "transformers may report weights of the classifier as MISSING or MISMATCH. That is expected where the base "
            "model has no classifier, or one for other classes: it begins with random weights, in whose place the "
            "adapter then puts the tuned ones."
        )
    return [" ".join(parts)]


def _quantization(experiment: Experiment) -> list[str]:
    load_in = experiment.config.model.load_in
    if load_in is None:
        return []
    bits = load_in.removesuffix("bit")
    return [
        f"In the run, bitsandbytes held the weights of the blocks' Linear layers in {bits} bits. On a CPU, "
        "bitsandbytes rounds inputs in inference mode alone, and a merged model has no such layers, so a few "
        "predictions may differ."
    ]


def _precision(experiment: Experiment) -> list[str]:
    dtype = experiment.config.model.dtype
    if dtype not in ("bfloat16", "float16"):
        return []
    return [
        f"The run kept adapters and classifier in float32 beside {dtype} weights. PEFT and transformers round in other "
        "places, so a few predictions may differ."
    ]


def _auto_class(experiment: Experiment, depth: int) -> list[str]:
    """How PEFT's auto class loads the adapter, or why it cannot."""
    foundation = experiment.foundation
    if base_model(experiment.config) is None:
        return []
    name = peft_class(foundation)
    if depth < foundation.depth:
        return [f"PEFT's `{name}` cannot load it, as it leaves no block of the pretrained model out."]
    if has_own_head(foundation):
        return [f"PEFT's `{name}.from_pretrained(folder, …)` with the arguments that follow `base` loads it, too."]
    argument = "" if experiment.config.model.load_in is None else ", quantization_config=quantization"
    loads = f"PEFT's `{name}.from_pretrained(folder{argument})` loads it, too"
    return [f"{loads}, but for the classifier in `{HEAD_FILE}`." if foundation.task.trains_head else f"{loads}."]


def _pipeline(experiment: Experiment, model: str) -> list[str]:
    """Python that makes a pipeline of transformers, where there is one for this model."""
    foundation, processing = experiment.foundation, experiment.processing
    is_image = isinstance(processing, Preprocessing)
    if base_model(experiment.config) is None or (foundation.task.trains_head and not has_own_head(foundation)):
        return []
    if isinstance(processing, Preprocessing) and processing.channels != 3:
        # Pipelines turn every image into one of three channels.
        return []
    part = "image_processor" if is_image else "tokenizer"
    task = _PIPELINES[experiment.train_data.task]
    call = f'pipeline("{task}", model={model}, {part}=folder)'
    return ["In a pipeline of transformers:", _code(f"from transformers import pipeline\n\npredict = {call}\n")]


def _facts(experiment: Experiment, outcome: Outcome) -> str:
    """A table of data, method and training."""
    config, data = experiment.config, experiment.train_data
    base, training, root = base_model(config), config.training, config.data.root
    source = f"`{config.data.source}`" + ("" if root is None or root == IN_MEMORY else f", `{_name(root)}`")
    classes = f"{len(data.classes):,} classes, " if data.classes else ""
    blocks = span_of(experiment.clients.capacities.tolist(), "block")
    rows = {
        "base model": f"`{_name(base) if base else type(experiment.foundation.model).__name__}`",
        "data": f"{source}: {classes}{count_of(len(data), 'training sample')}",
        "domains": first_few([_cell(domain) for domain in experiment.domains], _NAMES),
        "clients": f"{len(experiment.clients):,}, which hold {blocks}",
        "method": f"`{config.method.name}`, {count_of(outcome.rounds, 'round')}",
        "adapters": _adapters(experiment.foundation),
        "local training": f"{training.optimizer}, learning rate {training.lr:g}, batches of {training.batch_size}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in rows.items())])


def _adapters(foundation: Foundation) -> str:
    """Ranks, scales and places of the adapters that clients train."""
    targets, adapted = foundation.adapter_layout.targets, np.flatnonzero(foundation.adapted)
    kinds = {f"rank {target.rank}, scaled by {target.scale:.4g}": None for target in targets}
    where = "every block"
    if len(adapted) < foundation.depth:
        where = f"these blocks, counted from 1: {first_few([str(block + 1) for block in adapted], foundation.depth)}"
    if len(kinds) == 1:
        return f"LoRA of {next(iter(kinds))}, on {first_few([target.path for target in targets], _NAMES)} of {where}"
    each = [f"{target.path} (rank {target.rank}, scaled by {target.scale:.4g})" for target in targets]
    return f"LoRA on {first_few(each, _NAMES)} of {where}"


def _figures(experiment: Experiment, outcome: Outcome) -> str:
    """A table of accuracies, as `summary.json` has them, in percent."""
    held_out = experiment.config.data.held_out
    right = "correctly predicted samples" if experiment.foundation.task.trains_head else "correctly predicted tokens"
    columns: dict[str, Mapping[str, float]] = {"before tuning": outcome.frozen, "after": outcome.exported}
    names = [*map(_cell, outcome.exported), "average"]
    lines = [f"| accuracy (%) | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, accuracy in columns.items():
        values = [measure_number("accuracy", of) for of in (*accuracy.values(), mean(accuracy.values()))]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return f"Share of {right} in the {held_out} set of each domain:\n\n" + "\n".join(lines)


def _name(root: str) -> str:
    """The last part of a folder's path, whose other parts are nobody's business; a hub name as it is."""
    return _cell(Path(root).name if Path(root).exists() else root)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def _code(lines: str) -> str:
    return f"```python\n{lines}```"
