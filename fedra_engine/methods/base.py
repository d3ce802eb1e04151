"""The seam behind which federated algorithms differ. A method never touches devices or loops over samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
    """What a method may know.

    Attributes:
        config: the method's options.
        clients: all clients, with their capacities and ranks.
        depth: blocks of the foundation model.
        layout: where the factors lie in a slot.
        scale: factor of the adapter's product, alpha / rank.
        seed: seed of every draw.
        fisher: measures the Fisher information of every block of a state, [blocks], on a number of training samples
            drawn for a round.
        deterministic: aggregate so that even the last bit does not depend on the order clients finish in.
        capacities_drawn: each round every client draws one of all capacities there are.
        trains_classifier: whether clients train a classifier, not the tokens of a causal language model.
    """

    config: MethodConfig
    clients: Clients
    depth: int
    layout: AdapterLayout
    scale: float
    seed: int
    fisher: Callable[[GlobalState, int, int], NDArray[np.float64]]
    deterministic: bool = False
    capacities_drawn: bool = False
    trains_classifier: bool = True

    def capacities(self, round: int) -> NDArray[np.int64]:
        """Number of blocks each client can hold in `round`, int64 [clients]."""
        fixed = self.clients.capacities
        if not self.capacities_drawn:
            return fixed
        # Drawing among clients keeps the shares that the configuration gives to the capacities.
        return fixed[generator(self.seed, round=round, purpose="capacities").integers(len(fixed), size=len(fixed))]


class Method(ABC):
    """A federated algorithm: what participants train, and what the server makes of it."""

    aggregates: type[Aggregator] = Aggregator
    """The kind of aggregator that collects the updates."""
    ranks: NDArray[np.int64] | None = None
    """int64 [clients], LoRA rank of every client, if each rank is averaged over the clients that have it; else None."""
    writes_base = False
    """Whether the frozen weights change, so that participants must be sent the change."""
    caution: str | None = None
    """What a user should know before the first round, if anything."""
    order_matters: str | None = None
    """Why the order of updates changes the last bits even with `execution.deterministic`; None if it does not."""

    def __init__(self, federation: Federation) -> None:
        """Raises InputError when the method cannot work with this federation."""
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
        """How the method's aggregator sums."""
        federation = self.federation
        return Averaging(federation.config.weighting, federation.deterministic, federation.layout, self.ranks)

    @abstractmethod
    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """What each participant holds and trains in `round`; one that holds nothing sits the round out."""

    def initial_state(self, state: GlobalState, base: Callable[[], tuple[Tensor, ...]]) -> GlobalState:
        """The state before the first round.

        Args:
            state: the global adapters and the classifier, as a plain federation starts with them.
            base: gives the frozen weights of the adapter targets, for methods that write into them.
        """
        return state

    def aggregator(self, previous: GlobalState, round: int) -> Aggregator:
        """What collects the updates of `round`, which began with `previous`."""
        return self.aggregates(previous, self.averaging)

    def receive(self, updates: ClientUpdates) -> None:  # noqa: B027 (most methods keep nothing)
        """See the updates of a few clients before they are aggregated; to keep something of them, or to change them.

        Those that `ClientUpdates.good` excludes must be ignored.
        """

    def synchronize(self, processes: Processes) -> None:  # noqa: B027 (most methods keep nothing)
        """After the last update of a round: share with all processes what `receive` kept of this one's participants."""

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        """The new global state from all updates of a round that began with `previous`."""
        return aggregator.result()

    def after_round(self, state: GlobalState, round: int) -> None:  # noqa: B027 (most methods learn nothing of it)
        """See the `state` after `round`: what the server's optimizer made of the result of `aggregate`."""

    def evaluated_model(self) -> EvaluatedModel:
        """Which part of the global state predicts; all blocks, unless a method's model is shallower."""
        return EvaluatedModel(np.arange(self.federation.depth))

    def personal_states(self, state: GlobalState) -> Mapping[int, Iterable[GlobalState]] | None:
        """The models of the clients of each domain that has some, if these are what is evaluated; else None."""
        return None

    def uploaded_factors(self, assignment: Assignment) -> Factor:
        """Which LoRA factors clients send to the server."""
        return assignment.factors

    def downloaded_factors(self) -> Factor:
        """Which LoRA factors the server sends to the participants of a round."""
        return "both"

    def tensors(self) -> dict[str, Tensor]:
        """What the method remembers from round to round besides the global state, for a checkpoint."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 (most methods keep nothing)
        """Take back what `tensors` gave."""


class OwnAllocation(Method):
    """Base of methods that allocate blocks in their own way, to clients of one rank."""

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
    """Raises InputError when `method`, which looks at the logits of classes, is to train a causal language model."""
    if not federation.trains_classifier:
        raise InputError(f"method.name: found {method} with a causal language model, expected a classifier")


METHODS: dict[str, type[Method]] = {}
"""The methods by name; `registry` brings in those of the package."""

_Method = TypeVar("_Method", bound=type[Method])


def register_method(name: str, options: type | None = None) -> Callable[[_Method], _Method]:
    """Decorator of a method's class: `method.name` may be `name` from now on.

    `options` is a dataclass made of `fedra_engine.config.options.option`: its fields become `method.<name>.<field>` in
    configurations and on the command line, and `Method.options` gives them to the method.

    Raises:
        InputError: there is a method of that name.
    """

    put = registering(METHODS, "method.name", name)

    def register(method: _Method) -> _Method:
        # The configuration has those of the package, without loading any.
        if not method.__module__.startswith("fedra_engine."):
            register_method_options(name, options)
        return put(method)

    return register
