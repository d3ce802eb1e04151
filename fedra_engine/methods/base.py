"""The interface of federated algorithms, and their registry by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import MethodConfig, register_method_options
from fedra_engine.config.options import registering
from fedra_engine.federation.aggregation import Aggregator, Averaging
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.models.adapters import AdapterLayout, Factor
from fedra_engine.models.state import EvaluatedModel, GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.randomness import generator


@dataclass(frozen=True)
class Federation:
    """What the server knows.

    Attributes:
        config: `method` of the configuration.
        depth: number of blocks of the foundation model.
        layout: where the factors lie in a slot.
        fisher: function of a state, a number of training samples and a round, which draws the samples; gives the
            Fisher information of each block, float64 [blocks].
        adapted: bool [blocks], the blocks that have adapters.
        deterministic: aggregate so that not even the last bit depends on the order of updates.
        capacities_drawn: whether clients draw a capacity every round instead of keeping their own.
        trains_classifier: whether the model is a classifier, and not a causal language model.
        rounds: number of rounds of the run.
        movement: float64 [blocks], norm of the change of each block's adapters in a round, averaged exponentially over
            the rounds; NaN for blocks that nobody has trained yet. Allocators that use it get it from their method.
    """

    config: MethodConfig = field(repr=False)
    clients: Clients
    depth: int
    layout: AdapterLayout = field(repr=False)
    seed: int
    fisher: Callable[[GlobalState, int, int], NDArray[np.float64]] = field(repr=False)
    adapted: NDArray[np.bool_] = field(repr=False)
    deterministic: bool = field(default=False, repr=False)
    capacities_drawn: bool = False
    trains_classifier: bool = True
    rounds: int = 1
    movement: NDArray[np.float64] | None = field(default=None, repr=False)

    def capacities(self, round: int) -> NDArray[np.int64]:
        """Number of blocks each client can hold in `round`, int64 [clients]."""
        fixed = self.clients.capacities
        if not self.capacities_drawn:
            return fixed
        # Drawing among clients keeps the frequencies of the configured capacities.
        return fixed[generator(self.seed, round=round, purpose="capacities").integers(len(fixed), size=len(fixed))]


class Method(ABC):
    """A federated algorithm: what participants train, and how the server aggregates it."""

    aggregates: type[Aggregator] = Aggregator
    """Class of the aggregator."""
    ranks: NDArray[np.int64] | None = None
    """int64 [clients], LoRA rank of every client, if each rank is averaged over the clients that have it; else None."""
    writes_base = False
    """Whether the method changes the frozen weights, which participants must then download."""
    caution: str | None = None
    """A warning to the user before the first round."""
    order_matters: str | None = None
    """Why the order of updates changes the last bits even with `execution.deterministic`; None if it does not."""
    hides_movement: str | None = None
    """Why the change of the global adapters does not say how much a block learnt in a round; None if it does."""

    def __init__(self, federation: Federation) -> None:
        """Raise InputError when the method cannot work with this federation."""
        self.federation = federation
        if federation.deterministic and self.order_matters is not None:
            raise InputError(
                f"execution.deterministic: found true with method.name {federation.config.name}, expected false "
                f"({self.order_matters})"
            )

    @property
    def options(self) -> Any:
        """The method's own options, `method.<name>` of the configuration."""
        return getattr(self.federation.config, self.federation.config.name)

    @property
    def averaging(self) -> Averaging:
        """How the method's aggregator averages."""
        federation = self.federation
        return Averaging(federation.config.weighting, federation.deterministic, federation.layout, self.ranks)

    @abstractmethod
    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """Decide what each participant holds and trains in `round`; one without blocks sits the round out."""

    def initial_state(self, state: GlobalState, base: Callable[[], tuple[Tensor, ...]]) -> GlobalState:
        """Make the global state before the first round.

        Args:
            state: the usual one.
            base: gives the frozen weights of the adapter targets, for methods that change them.
        """
        return state

    def aggregator(self, previous: GlobalState, round: int) -> Aggregator:
        """Make the aggregator of `round`, which starts from `previous`."""
        return self.aggregates(previous, self.averaging)

    def receive(self, updates: ClientUpdates) -> None:  # noqa: B027 (most methods keep nothing)
        """See the updates of a few clients before they are aggregated; to keep something of them, or to change them.

        Those that `ClientUpdates.good` excludes must be ignored.
        """

    def synchronize(self, processes: Processes) -> None:  # noqa: B027 (most methods keep nothing)
        """Share what `receive` has kept with all processes, after the last update of a round."""

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        """Make the new global state of a round that started from `previous`; `aggregator` has all its updates."""
        return aggregator.result()

    def after_round(self, state: GlobalState, round: int) -> None:  # noqa: B027 (most methods learn nothing of it)
        """See the `state` after `round`: what the server's optimizer made of the result of `aggregate`."""

    def evaluated_model(self) -> EvaluatedModel:
        """The blocks and exits that predict; by default all blocks."""
        return EvaluatedModel(np.arange(self.federation.depth))

    def personal_states(self, state: GlobalState) -> Mapping[int, Iterable[GlobalState]] | None:
        """The models of the clients of each domain that has some, if these are what is evaluated; else None."""
        return None

    def uploaded_factors(self, assignment: Assignment) -> Factor:
        """The LoRA factors that participants send to the server."""
        return assignment.factors

    def downloaded_factors(self) -> Factor:
        """The LoRA factors that the server sends to participants."""
        return "both"

    def tensors(self) -> dict[str, Tensor]:
        """The method's own state, for a checkpoint."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 (most methods keep nothing)
        """Load the method's own state from a checkpoint."""


class OwnAllocation(Method):
    """Base of methods with an allocation of their own, for clients of one rank."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        config = federation.config
        if federation.clients.ranks is not None:
            raise InputError(
                f"clients.ranks: found ranks with method.name {config.name}, expected none (it needs one rank)"
            )
        if config.allocation is not None:
            raise InputError(
                f"method.allocation: found {config.allocation} with method.name {config.name}, expected null (it "
                "allocates blocks in its own way)"
            )


def check_full_depth(asked: str, federation: Federation, *, always: bool = False) -> None:
    """Raise InputError if no client can hold all blocks; `method.ignore_capacities` allows it, unless `always`."""
    deepest = int(federation.clients.capacities.max())
    if deepest < federation.depth and (always or not federation.config.ignore_capacities):
        raise InputError(
            f"clients.capacities: found at most {deepest} of {federation.depth} blocks with {asked}, expected a client "
            f"that can hold all{'' if always else ' (or method.ignore_capacities true)'}"
        )


def check_classifier(federation: Federation, method: str) -> None:
    """Raise InputError when `method`, which needs the logits of classes, is to train a causal language model."""
    if not federation.trains_classifier:
        raise InputError(f"method.name: found {method} with a causal language model, expected a classifier")


METHODS: dict[str, type[Method]] = {}
"""The methods by name; importing `registry` fills in the package's own."""

_Method = TypeVar("_Method", bound=type[Method])


def register_method(name: str, options: type | None = None) -> Callable[[_Method], _Method]:
    """Decorate a method's class, to make it `method.name` `name` of configurations.

    The fields of the dataclass `options`, each a `fedra_engine.config.options.option`, become the settings
    `method.<name>.<field>`, which the method reads from `Method.options`.

    Raises:
        InputError: there is a method of that name.
    """
    put = registering(METHODS, "method.name", name)

    def register(method: _Method) -> _Method:
        # The configuration knows the package's own options without importing the methods.
        if not method.__module__.startswith("fedra_engine."):
            register_method_options(name, options)
        return put(method)

    return register
