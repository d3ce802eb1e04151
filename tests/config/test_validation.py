"""Every value that cannot be used, or does nothing, is reported by its field."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from fedra_engine.config import DeviceConfig, ExperimentConfig
from fedra_engine.config.fields import field_types, union_members
from fedra_engine.config.options import Allowed
from fedra_engine.config.validation import check_values, validate, validate_together, without_effect
from fedra_engine.experiment import build_experiment
from fedra_engine.runtime.errors import InputError


def changed(field: str, value: object, **others: Any) -> ExperimentConfig:
    config = ExperimentConfig()
    for name, new in {field: value, **others}.items():
        *groups, last = name.split(".")
        setattr(reduce(getattr, groups, config), last, new)
    return config


def entry_types(kind: Any) -> set[Any]:
    """Of what types a value, or an entry of it, can be; literals stand for themselves."""
    found = set[Any]()
    for option in union_members(kind):
        found |= set(get_args(option)) if get_origin(option) in (list, tuple, Literal) else {option}
    return found


def leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any, Allowed | None]]:
    """Name, type and declared values of every field, those of an entry of `clients.devices` included."""
    for item in fields(kind):
        name, of_field = f"{prefix}{item.name}", field_types(kind)[item.name]
        (group,) = [inner for inner in entry_types(of_field) if is_dataclass(inner)] or [None]
        if group is not None:
            yield from leaves(group, f"{name}.")
        else:
            yield name, of_field, item.metadata.get("allowed")


NUMBERS = [name for name, kind, _ in leaves(ExperimentConfig) if {int, float} & entry_types(kind)]
TEXTS = [name for name, kind, _ in leaves(ExperimentConfig) if str in entry_types(kind)]


def config_with(field: str, value: object) -> ExperimentConfig:
    """The default but for a field, or an entry of a list."""
    _, dot, of_device = field.partition("clients.devices.")
    if dot:
        return changed("clients.devices", [DeviceConfig(**{of_device: value})])
    whole: Any = reduce(getattr, field.split("."), ExperimentConfig())
    if isinstance(whole, tuple):
        return changed(field, (0.5, value))
    return changed(field, [value] if isinstance(whole, list) else value)


def test_the_defaults_are_valid() -> None:
    validate(ExperimentConfig())


def test_every_number_and_every_text_declares_what_it_may_be() -> None:
    allowed = {name: allowed for name, _, allowed in leaves(ExperimentConfig)}
    assert len(NUMBERS) > 50
    assert [name for name in [*NUMBERS, *TEXTS] if allowed[name] is None] == []


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [-1, 10**31, math.nan, math.inf, True, "7"])
def test_numbers_outside_their_range_are_reported(field: str, value: Any) -> None:
    pattern = field.replace("devices.", r"devices\[0\].").replace("_", ".")
    with pytest.raises(InputError, match=rf"^{pattern}: found .*, expected a (whole )?number"):
        check_values(config_with(field, value))


@pytest.mark.parametrize("field", TEXTS)
@pytest.mark.parametrize("value", ["a\0b", "a\x1b[31mb", "a\rb", "\u202e", "x" * 100_001, 7])
def test_texts_that_no_line_can_show_are_reported(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{field}: found .*, expected") as caught:
        check_values(config_with(field, value))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 10**6),
        ("data.clients", 10**6),
        ("seed", 2**63 - 1),
        ("training.clip_norm", 1e10),
        ("training.weight_decay", 0.0),
        ("training.max_local_steps", None),
        ("lora.rank", 128),
        ("execution.lanes", "auto"),
        ("output_dir", "a folder/über"),
        ("name", "fedra-covered=1 (α)"),
    ],
)
def test_sensible_extremes_are_taken(field: str, value: object) -> None:
    validate(changed(field, value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.source", "images"),
        ("trace", "yes"),
        ("trace", 1),
        ("clients.capacities", "all"),
        ("training.betas", [0.9]),
    ],
)
def test_what_the_parser_would_refuse_is_refused_of_python_too(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^{field}: found .*, expected"):
        validate(changed(field, value))


def test_an_experiment_made_in_python_is_checked_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match=r"^training\.momentum: found 0\.5 with training\.optimizer adamw"):
        build_experiment(changed("training.momentum", 0.5), torch.device("cpu"))


def test_a_dict_for_a_group_is_refused_with_the_class_that_is_wanted() -> None:
    with pytest.raises(InputError, match=r"^model: found .*, expected fields path, dtype, .* in a ModelConfig$"):
        validate(changed("model", {"dtype": "bfloat16"}))


def test_entries_of_a_tuple_are_checked_like_those_of_a_list() -> None:
    for devices in ([DeviceConfig(availability=7.0)], (DeviceConfig(availability=7.0),)):
        with pytest.raises(InputError, match=r"clients\.devices\[0\]\.availability: found 7"):
            validate(changed("clients.devices", devices))


def test_what_evaluates_may_be_fused_whoever_trains() -> None:
    validate(changed("execution.fused_blocks", "on", **{"execution.executor": "sequential"}))
    recomputing = {"execution.executor": "sequential", "method.name": "fedhello"}
    validate(changed("execution.checkpoint_blocks", True, **recomputing))
    recomputing["method.name"] = "fedra"
    with pytest.raises(InputError, match=r"checkpoint_blocks: found true with execution\.executor sequential"):
        validate(changed("execution.checkpoint_blocks", True, **recomputing))


def test_an_option_that_does_nothing_is_refused_and_its_default_is_not() -> None:
    config = changed("data.dirichlet_alpha", 0.1, **{"data.partition": "iid"})
    with pytest.raises(
        InputError, match=r"dirichlet_alpha: found 0\.1 with data\.partition iid.* dirichlet, or .* 0\.5$"
    ):
        validate(config)
    config.data.dirichlet_alpha = 0.5
    validate(config)
    config.data.partition, config.data.dirichlet_alpha = "dirichlet", 0.1
    validate(config)


def test_what_one_of_several_needs_is_enough_for_is_taken() -> None:
    for method in ({"method.name": "alllarge"}, {"method.allocation": "full"}):
        validate(changed("method.ignore_capacities", True, **method))
    assert list(without_effect(changed("method.ignore_capacities", True))) == ["method.ignore_capacities"]


def test_needs_are_met_in_a_chain() -> None:
    config = changed("method.fedhello.fisher_every", 3, **{"method.name": "fedhello"})
    validate(config)
    config.method.fedhello.selection = "first"
    assert list(without_effect(config)) == ["method.fedhello.fisher_every"]


def test_variants_may_have_an_option_of_one_of_them_and_the_others_get_its_default() -> None:
    def variant(method: str) -> ExperimentConfig:
        return changed("method.name", method, **{"method.hetlora.penalty": 0.5})

    fedra, hetlora = validate_together([variant("fedra"), variant("hetlora")])
    assert (fedra.method.hetlora.penalty, hetlora.method.hetlora.penalty) == (0.01, 0.5)
    with pytest.raises(InputError, match=r"^method\.hetlora\.penalty: found 0\.5 with method\.name fedra"):
        validate_together([variant("fedra"), variant("fedit"), changed("method.name", "hetlora")])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clients.capacities", [0], r"clients\.capacities: found 0, expected a whole number from 1 to 1,000,000"),
        ("clients.capacities", [], r"clients\.capacities: found an empty list"),
        ("data.test_fraction", 1.0, r"data\.test_fraction: found 1\.0, expected a number above 0 and below 1"),
        ("lora.dropout", 1.0, r"lora\.dropout: found 1\.0, expected a number from 0 to below 1"),
        ("data.root", "images", r"data\.root: found 'images' with data\.source digits"),
        ("data.source", "image_folder", r"data\.root: found none with data\.source image_folder"),
        ("data.domains", ["a", "b", "a"], r"data\.domains: found 'a' more than once"),
        ("lora.target_modules", [], r"lora\.target_modules: found nothing"),
        ("lora.target_modules", "(", r"lora\.target_modules: found '\(' .*expected a regular expression"),
        ("name", "a/b", r"name: found 'a/b', expected the name of one folder"),
        ("name", "..", r"name: found '\.\.', expected the name of one folder"),
        ("output_dir", "", r"output_dir: found '', expected a path"),
        ("model.path", "", r"model\.path: found '', expected a path"),
        ("keep_best", "acuracy", r"keep_best: found 'acuracy', expected one of .*did you mean accuracy"),
        (
            "keep_best",
            "accuracy",
            r"keep_best: found accuracy with data\.validation_fraction 0, expected",
        ),
        (
            "early_stopping.patience",
            3,
            r"early_stopping\.patience: found 3 with data\.validation_fraction 0, exp",
        ),
        ("early_stopping.patience", 0, r"early_stopping\.patience: found 0, expected a whole number from 1 to "),
        (
            "early_stopping.measure",
            "test_loss",
            r"early_stopping\.measure: found 'test_loss' with early_stopping\.patience null, where it does nothing",
        ),
        (
            "early_stopping.min_improvement",
            0.1,
            r"early_stopping\.min_improvement: found 0\.1 with early_stopping\.p",
        ),
    ],
)
def test_what_cannot_be_used_is_reported(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(changed(field, value))


def test_rounds_are_chosen_on_validation_samples() -> None:
    chosen = {"early_stopping.patience": 2, "early_stopping.measure": "test_loss", "keep_best": "macro_f1"}
    validate(changed("data.validation_fraction", 0.1, **chosen))


@pytest.mark.parametrize(
    ("rounds", "evaluate_every", "most"), [(80, 20, 2), (81, 20, 3), (3, 1, 1), (2, 1, 0), (20, 20, 0), (5, 20, 0)]
)
def test_patience_that_can_save_no_round_is_refused(rounds: int, evaluate_every: int, most: int) -> None:
    def patient(patience: int) -> ExperimentConfig:
        others = {"rounds": rounds, "evaluate_every": evaluate_every, "data.validation_fraction": 0.1}
        return changed("early_stopping.patience", patience, **others)

    if most:
        validate(patient(most))
    expected = rf"expected {f'at most {most}, ' if most else ''}a smaller evaluate_every or more rounds$"
    found = rf"^early_stopping\.patience: found {most + 1} with rounds {rounds} and evaluate_every {evaluate_every}, "
    with pytest.raises(InputError, match=found + r"where it saves no round; " + expected):
        validate(patient(most + 1))


def test_only_the_reference_draws_bound_the_seed() -> None:
    config = changed("seed", 2**32)
    validate(config)
    config.method.allocation = "reference"
    with pytest.raises(InputError, match=r"seed: found 4294967296 with .* reference.* from 0 to 4294967295"):
        validate(config)
    config.seed -= 1
    validate(config)


def test_quantized_blocks_are_not_fused_or_captured_and_have_no_products_in_float64_of_four_bits() -> None:
    validate(changed("model.load_in", "8bit", **{"model.dtype": "float64", "execution.fused_blocks": "off"}))
    with pytest.raises(InputError, match=r"model\.load_in: found 4bit with model\.dtype float64"):
        validate(changed("model.load_in", "4bit", **{"model.dtype": "float64"}))
    with pytest.raises(InputError, match=r"execution\.fused_blocks: found on with model\.load_in 4bit, expected auto"):
        validate(changed("model.load_in", "4bit", **{"execution.fused_blocks": "on"}))
    with pytest.raises(InputError, match=r"execution\.cuda_graphs: found on with model\.load_in 4bit, expected off"):
        validate(changed("model.load_in", "4bit", **{"execution.cuda_graphs": "on"}))


def test_a_trace_has_no_place_for_what_is_drawn_while_training() -> None:
    config = changed("trace", True)
    config.lora.dropout = 0.1
    with pytest.raises(InputError, match=r"trace: found true with lora\.dropout 0\.1, expected lora\.dropout 0"):
        validate(config)
    config.lora.dropout = 0.0
    validate(config)
    config.data.augmentation = "crop_flip"
    with pytest.raises(InputError, match=r"trace: found true with data\.augmentation crop_flip, expected none"):
        validate(config)


@pytest.mark.parametrize("name", ["flora", "fedexlora", "flexlora"])
def test_methods_without_a_way_between_two_states_take_the_mean_as_it_is(name: str) -> None:
    config = ExperimentConfig()
    config.method.name = name
    validate(config)
    config.server.lr = 0.5
    with pytest.raises(InputError, match=rf"server: found optimizer fedavg with lr 0\.5 and method\.name {name}"):
        validate(config)
    config.server.lr, config.server.optimizer = None, "fedadam"
    with pytest.raises(InputError, match=rf"server: found optimizer fedadam .* method\.name {name}"):
        validate(config)
