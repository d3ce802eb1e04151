"""The group `method` of an experiment: the federated algorithm and the options of each method.

The options are not in the methods' own files because the command line must list and check them without importing
torch. Methods from outside the package add theirs with `register_method_options`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from fedra_engine.config import options as allowed
from fedra_engine.config.fields import TYPES, field_types
from fedra_engine.config.options import Choice, group, option, register_choice
from fedra_engine.runtime.errors import InputError

METHOD_NAMES = Choice(
    "method.name",
    *("fedra", "fedstandin", "alllarge", "allsmall", "exclusivefl", "inclusivefl", "depthfl", "fedhello", "fedit"),
    *("ffalora", "fedsalora", "rolora", "hetlora", "flora", "flexlora", "fedexlora", "lorafair"),
)
ALLOCATION_NAMES = Choice(
    "method.allocation",
    *("uniform", "reference", "covered", "prefix", "full", "first", "ends", "rotated", "growing", "importance"),
)
_STAND_INS = {"stand_in": ("linear",), "name": ("fedstandin",)}
"""Clients have stand-ins if one of these fields has one of these values."""


@dataclass
class InclusiveFLConfig:
    """Options of `inclusivefl`.

    Args:
        momentum: weight β of what deeper groups learnt in the change of a shallower group's last block; with 0, every
            block is the plain mean over its holders, as in FedRA's published comparison.
    """

    momentum: float = option(0.2, allowed.BELOW_ONE)


@dataclass
class DepthFLConfig:
    """Options of `depthfl`.

    Args:
        variant: which blocks clients hold and which classifiers they share: as DepthFL's own `paper` says, or as in
            FedRA's published comparison (`fedra_paper`); docs/methods.md has both.
        exit_every: blocks between exits.
        ramp_up_rounds: rounds over which the weight of the mutual distillation rises to 1.
        predict: by the mean of all exits' logits (`ensemble`), or by the `last` exit.
    """

    variant: Literal["paper", "fedra_paper"] = "paper"
    exit_every: int = option(3, allowed.COUNT)
    ramp_up_rounds: int = option(500, allowed.COUNT)
    predict: Literal["ensemble", "last"] = option("ensemble", needs=[{"variant": ("paper",)}])


@dataclass
class HetLoraConfig:
    """Options of `hetlora`.

    Args:
        keep_ratio: fraction γ of its ranks that a client keeps when it prunes itself; 1 for no pruning.
        penalty: weight λ of the term that pulls the other ranks towards zero.
    """

    keep_ratio: float = option(0.99, allowed.ABOVE_ZERO_TO_ONE)
    penalty: float = option(0.01, allowed.NON_NEGATIVE)


@dataclass
class FedHelloConfig:
    """Options of `fedhello`.

    Args:
        selection: how a client's trainable blocks are chosen: drawn with equal probability (`random`); the `first`,
            the `last`, half of them first and half last (`bottleneck`) or `spread` evenly; or drawn with
            probabilities that rise with each block's Fisher information (`fisher`).
        fisher_every: rounds between measurements of the Fisher information (and before the first).
        fisher_samples: training samples that it is measured on.
    """

    selection: Literal["random", "first", "last", "bottleneck", "spread", "fisher"] = "fisher"
    fisher_every: int = option(10, allowed.COUNT, needs=[{"selection": ("fisher",)}])
    fisher_samples: int = option(100, allowed.SAMPLES, needs=[{"selection": ("fisher",)}])


@dataclass
class LoraFairConfig:
    """Options of `lorafair`.

    Args:
        weight: weight λ of the term that keeps the correction of B small.
        steps: gradient steps that compute the correction.
        lr: their size, relative to the one at which the descent is stable.
    """

    weight: float = option(0.01, allowed.NON_NEGATIVE)
    steps: int = option(200, allowed.STEPS)
    lr: float = option(0.5, allowed.RATE)


@dataclass
class MethodConfig:
    """The federated algorithm; each group has the options of the method of its name.

    Args:
        name: one of the methods in docs/methods.md.
        allocation: which blocks a client holds, for methods that leave it open: `uniform` (each client draws
            independently; the default), `reference` (drawn as FedRA's published code draws, from one legacy NumPy
            stream over all rounds, but not its rows: there other draws move the stream on in between), `covered`
            (repaired so that every block has a holder if the capacities allow it), `prefix` (the first blocks), `full`
            (all blocks), `first` or `ends` (always the first block, or the first and the last, and drawn others),
            `rotated` (a window that moves on by one block every round), `growing` (drawn; from one block to the
            capacity over the first half of the rounds) or `importance` (drawn; blocks whose adapters move more have a
            better chance).
        ignore_capacities: allow full-depth methods even if no client can hold all blocks.
        weighting: weight of a client in the averages: `uniform`, or its number of `samples`.
        stand_in: what a client has in place of a block that it does not hold: nothing (`none`), or a frozen map of low
            rank that is fitted to the block (`linear`; docs/stand_ins.md). `fedstandin` has these maps in any case.
        stand_in_rank: rank of the maps; with 0 a map is a constant, what the block adds on average.
        stand_in_ridge: penalty of the fit, relative to the mean variance of a feature.
        stand_in_samples: samples that the maps are fitted to, or all if there are fewer; no labels are used.
        stand_in_data: where these samples come from: a domain of the training data, or a folder or file of the
            server's own; all training samples when null, which only a simulation can have.
        stand_in_refit: rounds between fits to the global model with its adapters; when null, the maps stay those of the
            frozen model.
    """

    name: str = option("fedra", METHOD_NAMES)
    allocation: str | None = option(None, ALLOCATION_NAMES)
    ignore_capacities: bool = option(False, needs=[{"name": ("alllarge",), "allocation": ("full",)}])
    weighting: Literal["uniform", "samples"] = "uniform"
    stand_in: Literal["none", "linear"] = "none"
    stand_in_rank: int = option(32, allowed.MAP_RANK, needs=[_STAND_INS])
    stand_in_ridge: float = option(0.01, allowed.POSITIVE, needs=[_STAND_INS])
    stand_in_samples: int = option(1000, allowed.SAMPLES, needs=[_STAND_INS])
    stand_in_data: str | None = option(None, allowed.PATH, needs=[_STAND_INS])
    stand_in_refit: int | None = option(None, allowed.COUNT, needs=[_STAND_INS])
    inclusivefl: InclusiveFLConfig = group(InclusiveFLConfig, needs=[{"name": ("inclusivefl",)}])
    depthfl: DepthFLConfig = group(DepthFLConfig, needs=[{"name": ("depthfl",)}])
    fedhello: FedHelloConfig = group(FedHelloConfig, needs=[{"name": ("fedhello",)}])
    hetlora: HetLoraConfig = group(HetLoraConfig, needs=[{"name": ("hetlora",)}])
    lorafair: LoraFairConfig = group(LoraFairConfig, needs=[{"name": ("lorafair",)}])

    @property
    def has_stand_ins(self) -> bool:
        """Whether clients have stand-ins for the blocks that they lack."""
        return any(getattr(self, field) in values for field, values in _STAND_INS.items())

    def __getattr__(self, name: str) -> Any:
        """Add the default options of a method that was registered after this object was made."""
        if name not in (kinds := field_types(type(self))):
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        setattr(self, name, kinds[name]())
        return getattr(self, name)


def register_method_options(name: str, options: type[Any] | None = None) -> None:
    """Let `method.name` be `name`, and add the method's `options` to `MethodConfig` as a group of that name.

    Args:
        name: of the method; a method of the package can only be given its own options.
        options: a dataclass whose fields all have defaults, declared with `option`; None if the method has none.

    Raises:
        InputError: `MethodConfig` has another field of that name.
    """
    kind = field_types(MethodConfig).get(name)
    if options is not None and kind not in (None, options):
        raise InputError(f"method.name: found {name!r} to be registered, expected a name that is free")
    register_choice("method.name", name)
    if options is None or kind is options:
        return
    # To apply the decorator again, what it made goes, and the fields that it replaced by defaults come back.
    for field in fields(MethodConfig):
        setattr(MethodConfig, field.name, field)
    for made in ("__init__", "__repr__", "__eq__", "__match_args__"):
        delattr(MethodConfig, made)
    MethodConfig.__annotations__[name] = options
    setattr(MethodConfig, name, group(options, needs=[{"name": (name,)}]))
    dataclass(MethodConfig)
    del TYPES[MethodConfig]
