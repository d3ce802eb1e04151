"""The methods by name."""

from __future__ import annotations

from fedra_engine.methods.base import Federation, Method
from fedra_engine.methods.controls import AllLarge, AllSmall
from fedra_engine.methods.depthfl import DepthFL
from fedra_engine.methods.exclusivefl import ExclusiveFL
from fedra_engine.methods.fedexlora import FedExLora
from fedra_engine.methods.fedhello import FedHello
from fedra_engine.methods.fedit import FedIT
from fedra_engine.methods.fedra import FedRA
from fedra_engine.methods.fedsalora import FedSALora
from fedra_engine.methods.ffalora import FFALora
from fedra_engine.methods.flexlora import FlexLora
from fedra_engine.methods.flora import FLoRA
from fedra_engine.methods.hetlora import HetLoRA
from fedra_engine.methods.inclusivefl import InclusiveFL
from fedra_engine.methods.lorafair import LoRAFair
from fedra_engine.methods.rolora import RoLoRA
from fedra_engine.runtime.errors import InputError

METHODS: dict[str, type[Method]] = {
    "fedra": FedRA,
    "alllarge": AllLarge,
    "allsmall": AllSmall,
    "exclusivefl": ExclusiveFL,
    "inclusivefl": InclusiveFL,
    "depthfl": DepthFL,
    "fedhello": FedHello,
    "fedit": FedIT,
    "ffalora": FFALora,
    "fedsalora": FedSALora,
    "rolora": RoLoRA,
    "hetlora": HetLoRA,
    "flora": FLoRA,
    "flexlora": FlexLora,
    "fedexlora": FedExLora,
    "lorafair": LoRAFair,
}


def method_named(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        InputError: there is none of that name.
    """
    if name not in METHODS:
        raise InputError(f"method.name: found {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


def make_method(federation: Federation) -> Method:
    """The method that `federation.config.name` names.

    Raises:
        InputError: there is none of that name, or it cannot work with this federation.
    """
    return method_named(federation.config.name)(federation)
