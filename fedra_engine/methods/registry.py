"""The methods by name."""

from __future__ import annotations

from fedra_engine.errors import InputError
from fedra_engine.methods.base import Federation, Method
from fedra_engine.methods.controls import AllLarge, AllSmall
from fedra_engine.methods.fedra import FedRA

METHODS: dict[str, type[Method]] = {"fedra": FedRA, "alllarge": AllLarge, "allsmall": AllSmall}


def make_method(federation: Federation) -> Method:
    """The method that `federation.config.name` names.

    Raises:
        InputError: there is none of that name.
    """
    name = federation.config.name
    if name not in METHODS:
        raise InputError(f"method.name: found {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name](federation)
