"""All methods of the package, and how a configuration's method is made."""

from __future__ import annotations

from fedra_engine.methods import (  # noqa: F401 (each registers its methods)
    controls,
    depthfl,
    factors,
    fedhello,
    fedra,
    fedsalora,
    hetlora,
    inclusivefl,
    lorafair,
    products,
)
from fedra_engine.methods.base import METHODS, Federation, Method
from fedra_engine.runtime.errors import InputError


def method_named(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        InputError: there is none of that name.
    """
    if name not in METHODS:
        raise InputError(f"method.name: found {name!r}, expected one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def make_method(federation: Federation) -> Method:
    """The method that `federation.config.name` names.

    Raises:
        InputError: there is none of that name, or it cannot work with this federation.
    """
    return method_named(federation.config.name)(federation)
