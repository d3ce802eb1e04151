"""Look-up of methods by name; importing this module registers those of the package."""

from __future__ import annotations

from fedra_engine.methods import (  # noqa: F401 (each registers its methods)
    controls,
    depthfl,
    factors,
    fedhello,
    fedra,
    fedsalora,
    fedstandin,
    hetlora,
    inclusivefl,
    lorafair,
    products,
)
from fedra_engine.methods.base import METHODS, Federation, Method
from fedra_engine.runtime.errors import InputError


def method_named(name: str) -> type[Method]:
    """The class of the method `name`.

    Raises:
        InputError: no method has that name.
    """
    if name not in METHODS:
        raise InputError(f"method.name: found {name!r}, expected one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def make_method(federation: Federation) -> Method:
    """Make the method that `federation.config` names.

    Raises:
        InputError: no method has that name, or it cannot work with this federation.
    """
    return method_named(federation.config.name)(federation)
