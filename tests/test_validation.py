"""Every value that cannot be used is reported by its field."""

import math
from dataclasses import fields, is_dataclass
from functools import reduce
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from fedra_engine.config import ExperimentConfig
from fedra_engine.errors import InputError
from fedra_engine.validation import COUNT, NATURAL, RANGES, check_method, validate


def changed(field: str, value: object) -> ExperimentConfig:
    config = ExperimentConfig()
    *groups, name = field.split(".")
    setattr(reduce(getattr, groups, config), name, value)
    return config


def numeric_fields(kind: Any, prefix: str = "") -> set[str]:
    found = set()
    for field, of_field in ((field.name, get_type_hints(kind)[field.name]) for field in fields(kind)):
        if is_dataclass(of_field):
            found |= numeric_fields(of_field, f"{prefix}{field}.")
        else:
            optional = get_origin(of_field) in (Union, UnionType)
            kinds = set(get_args(of_field)) - {NoneType} if optional else {of_field}
            # A number, or one of a few words.
            kinds = {kind for kind in kinds if get_origin(kind) is not Literal}
            if kinds and kinds <= {int, float, list[int], tuple[float, float]}:
                found.add(f"{prefix}{field}")
    return found


def test_the_defaults_are_valid() -> None:
    validate(ExperimentConfig())


def test_every_numeric_field_has_a_range() -> None:
    assert set(RANGES) == numeric_fields(ExperimentConfig)


WHOLE = {field for field, allowed in RANGES.items() if allowed in (COUNT, NATURAL)}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, -1) for field in RANGES]
    # The parser lets these into no whole number.
    + [(field, value) for field in RANGES if field not in WHOLE for value in (math.nan, math.inf)],
)
def test_numbers_outside_their_range_are_reported(field: str, value: float) -> None:
    entries = {"clients.capacities": [4, value], "training.betas": (0.9, value)}
    with pytest.raises(InputError, match=rf"^{field}: found {value}, expected a .*number"):
        validate(changed(field, entries.get(field, value)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clients.capacities", [0], r"clients\.capacities: found 0, expected a whole number from 1 up"),
        ("clients.capacities", [], r"clients\.capacities: found an empty list"),
        ("data.test_fraction", 1.0, r"data\.test_fraction: found 1\.0, expected a number between 0 and 1"),
        ("lora.dropout", 1.0, r"lora\.dropout: found 1\.0, expected a number from 0 to below 1"),
        ("data.root", "images", r"data\.root: found 'images' with data\.source digits"),
        ("data.source", "image_folder", r"data\.root: found none with data\.source image_folder"),
        ("data.domains", ["a", "b", "a"], r"data\.domains: found 'a' more than once"),
        ("lora.target_modules", [], r"lora\.target_modules: found nothing"),
        ("lora.target_modules", "(", r"lora\.target_modules: found '\(' .*expected a regular expression"),
        ("name", "a/b", r"name: found 'a/b', expected the name of one folder"),
        ("name", "..", r"name: found '\.\.', expected the name of one folder"),
        ("output_dir", "", r"output_dir: found an empty text"),
        ("model.path", "", r"model\.path: found an empty text"),
    ],
)
def test_what_cannot_be_used_is_reported(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(changed(field, value))


def test_only_the_reference_draws_bound_the_seed() -> None:
    config = changed("seed", 2**32)
    validate(config)
    config.method.allocation = "reference"
    with pytest.raises(InputError, match=r"seed: found 4294967296 with .* reference.* from 0 to 4294967295"):
        validate(config)
    config.seed -= 1
    validate(config)


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
    check_method(config)
    config.server.lr = 0.5
    with pytest.raises(InputError, match=rf"server: found optimizer fedavg with lr 0\.5 and method\.name {name}"):
        check_method(config)
    config.server.lr, config.server.optimizer = None, "fedadam"
    with pytest.raises(InputError, match=rf"server: found optimizer fedadam .* method\.name {name}"):
        check_method(config)
