"""Look-up of methods by name; importing this module registers those of the package."""

from __future__ import annotations

import numpy as np

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
from fedra_engine.runtime.errors import InputError, first_few

_NAMED = 5
"""Most blocks that an error names."""


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
        InputError: no method has that name, it cannot work with this federation, or no block of the model that it
            tunes has adapters.
    """
    method = method_named(federation.config.name)(federation)
    blocks = method.evaluated_model().blocks
    if not federation.adapted[blocks].any():
        adapted = first_few([str(block) for block in np.flatnonzero(federation.adapted)], _NAMED)
        raise InputError(
            f"lora.layers_to_transform: found {adapted} with method.name {federation.config.name}, whose model has the "
            f"blocks 0 to {blocks.max()} alone, expected some of these"
        )
    return method
