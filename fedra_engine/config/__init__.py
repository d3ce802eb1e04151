"""The configuration of an experiment: a tree of dataclasses whose fields are command-line options (`--data.root …`).

Imports nothing of the package but `runtime`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedra_engine.config import options as allowed
from fedra_engine.config.data import ColumnsConfig, DataConfig
from fedra_engine.config.fields import settings
from fedra_engine.config.methods import (
    DepthFLConfig,
    FedHelloConfig,
    HetLoraConfig,
    InclusiveFLConfig,
    LoraFairConfig,
    MethodConfig,
    register_method_options,
)
from fedra_engine.config.model import LoraConfig, ModelConfig
from fedra_engine.config.options import SOMETHING, Choice, group, option, register_choice
from fedra_engine.runtime.errors import InputError

__all__ = [
    "ClientsConfig",
    "ColumnsConfig",
    "DataConfig",
    "DepthFLConfig",
    "DeviceConfig",
    "EarlyStoppingConfig",
    "ExecutionConfig",
    "ExperimentConfig",
    "FedHelloConfig",
    "HetLoraConfig",
    "InclusiveFLConfig",
    "LoraConfig",
    "LoraFairConfig",
    "MethodConfig",
    "ModelConfig",
    "ServerConfig",
    "TrainingConfig",
    "refuse_test_samples",
    "register_choice",
    "register_method_options",
]

MEASURE_NAMES = Choice("early_stopping.measure", "accuracy", "test_loss", "macro_f1", "calibration_error", "perplexity")

_AS_IT_IS = {
    "flora": "the method writes the rest of each mean into the model",
    "fedexlora": "the method writes the rest of each mean into the model",
    "flexlora": "factors from an SVD have another basis every round, so nothing lies between two of them",
}
"""Methods that work only if the mean of the updates becomes the new state unchanged, and why."""


@dataclass
class ServerConfig:
    """How the server uses the mean of a round's updates.

    Args:
        optimizer: `fedavg` (takes it as the new state), `fedavgm` (momentum), `fedadam` or `fedyogi` (adaptive).
        lr: server learning rate; when null, 1 for `fedavg`, 1 − momentum for `fedavgm`, and 0.01 for the adaptive
            optimizers.
        betas: decay rates of the moments of `fedadam` and `fedyogi`; the first is the momentum of `fedavgm`.
        tau: adaptivity τ in the denominator of `fedadam` and `fedyogi`.
    """

    optimizer: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    lr: float | None = option(None, allowed.RATE)
    betas: tuple[float, float] = option(
        (0.9, 0.99), allowed.BELOW_ONE, needs=[{"optimizer": ("fedavgm", "fedadam", "fedyogi")}]
    )
    tau: float = option(1e-3, allowed.RATE, needs=[{"optimizer": ("fedadam", "fedyogi")}])

    @property
    def rate(self) -> float:
        """The server learning rate."""
        if self.lr is not None:
            return self.lr
        return {"fedavg": 1.0, "fedavgm": 1 - self.betas[0], "fedadam": 0.01, "fedyogi": 0.01}[self.optimizer]


@dataclass
class DeviceConfig:
    """A kind of device that clients train on (docs/devices.md). A null field takes no time, or sets no limit.

    Args:
        compute: speed that training reaches, in GFLOP/s.
        upload: speed to the server, in Mbit/s.
        download: speed from the server, in Mbit/s.
        memory: GiB that training may use; determines capacities if `clients.capacities` is `memory`.
        availability: probability that a client is available in a round.
        dropout: probability that a participant drops out, so that its update is lost.
        variation: standard deviation of the logarithm of a participant's time, drawn anew every round.
    """

    compute: float | None = option(None, allowed.number(1e-6, 1e12))
    upload: float | None = option(None, allowed.number(1e-6, 1e12))
    download: float | None = option(None, allowed.number(1e-6, 1e12))
    memory: float | None = option(None, allowed.number(0, 1e6, above=True), needs=[{"clients.capacities": ("memory",)}])
    availability: float = option(1.0, allowed.ABOVE_ZERO_TO_ONE)
    dropout: float = option(0.0, allowed.PROBABILITY)
    variation: float = option(0.0, allowed.SPREAD)


@dataclass
class ClientsConfig:
    """Who takes part.

    Args:
        capacities: number of blocks a client can hold, one entry per domain in domain order (or one for all); or
            `memory`: as many as fit the memory of its device.
        capacity_schedule: capacities stay `fixed`, or are `drawn`: every round, each client gets the capacity of a
            random client.
        ranks: LoRA rank of a client's adapters, at most lora.rank, one entry per domain (or one for all); lora.rank
            for all when empty.
        sampling: `one_per_domain`, or `uniform` draws of `participants` clients without replacement.
        participants: clients per round under `uniform` sampling; all clients when null.
        devices: kinds of devices; when empty, devices are not simulated.
        device_schedule: a client has the device of its `domain` (one entry per domain in domain order, or one for all),
            or one `drawn` uniformly before the first round.
        deadline: simulated seconds after which the server accepts no more updates in a round; none when null.
    """

    capacities: list[int] | Literal["memory"] = option([12, 10, 8, 6, 4, 3], allowed.whole(1, 10**6))
    capacity_schedule: Literal["fixed", "drawn"] = "fixed"
    ranks: list[int] = option([], allowed.RANK)
    sampling: Literal["one_per_domain", "uniform"] = "one_per_domain"
    participants: int | None = option(None, allowed.CLIENTS, needs=[{"sampling": ("uniform",)}])
    devices: list[DeviceConfig] = option([])
    device_schedule: Literal["domain", "drawn"] = option("domain", needs=[{"devices": (SOMETHING,)}])
    deadline: float | None = option(None, allowed.POSITIVE, needs=[{"devices": (SOMETHING,)}])

    def check(self) -> None:
        """Raise InputError if devices lack a value that the capacities or the deadline need."""
        timed = [device for device in self.devices if (device.compute, device.upload, device.download) != (None,) * 3]
        for index, device in enumerate(self.devices):
            name = f"clients.devices[{index}]"
            if self.capacities == "memory" and device.memory is None:
                raise InputError(f"{name}.memory: found null with clients.capacities memory, expected GiB")
            if device.variation > 0 and device not in timed:
                raise InputError(
                    f"{name}.variation: found {device.variation:g} of a device that takes no time, expected its "
                    "compute, upload or download, or variation 0"
                )
        if not self.capacities:
            raise InputError("clients.capacities: found an empty list, expected one entry, or one for each domain")
        if not self.devices and self.capacities == "memory":
            raise InputError(
                "clients.capacities: found memory with no clients.devices, expected devices and their memory"
            )
        if self.deadline is not None and not timed:
            raise InputError(
                f"clients.deadline: found {self.deadline:g} with clients.devices that take no time, expected compute, "
                "upload or download of a device, or no deadline"
            )
        if self.capacities == "memory" and self.capacity_schedule == "drawn":
            raise InputError(
                "clients.capacity_schedule: found drawn with clients.capacities memory, expected fixed (a client "
                "keeps its device)"
            )


@dataclass
class TrainingConfig:
    """What a client does in a round.

    Args:
        optimizer: `sgd` (with momentum) or `adamw`; its state is reset every round.
        lr: learning rate of the first round.
        lr_schedule: how the learning rate changes over the rounds: `constant`, `linear` or `cosine` decay towards 0.
        momentum: momentum of `sgd`.
        betas: decay rates of the moments of `adamw`.
        eps: denominator term of `adamw`.
        weight_decay: L2 term of `sgd`, decoupled decay of `adamw`.
        proximal_mu: weight μ of FedProx's term μ/2 ‖w − w₀‖², which keeps a client near the state it received.
        clip_norm: each client's gradient is scaled to at most this norm; no clipping when null.
        batch_size: samples of a client in one local step.
        local_epochs: passes over a client's samples in a round.
        max_local_steps: upper limit of a client's local steps in a round; none when null.
        even_steps: cap local steps at one more than the smallest client takes, as in FedRA's published code.
        on_bad_update: what happens when the loss, a gradient or a value of a client's update is not finite: `drop`
            leaves the client out of the round, as if its update had not arrived, and says so; `error` ends the run.
            A round in which every update is bad ends it in either case.
    """

    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = option(0.005, allowed.number(0, 1e30, above=True))
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    momentum: float = option(0.9, allowed.BELOW_ONE, needs=[{"optimizer": ("sgd",)}])
    betas: tuple[float, float] = option((0.9, 0.999), allowed.BELOW_ONE, needs=[{"optimizer": ("adamw",)}])
    eps: float = option(1e-8, allowed.ABOVE_ZERO_TO_ONE, needs=[{"optimizer": ("adamw",)}])
    weight_decay: float = option(1e-5, allowed.number(0, 1e4))
    proximal_mu: float = option(0.0, allowed.NON_NEGATIVE)
    clip_norm: float | None = option(10.0, allowed.number(1e-6, 1e12))
    batch_size: int = option(16, allowed.whole(1, 10**6))
    local_epochs: int = option(3, allowed.STEPS)
    max_local_steps: int | None = option(5, allowed.COUNT)
    even_steps: bool = False
    on_bad_update: Literal["drop", "error"] = "drop"


@dataclass
class EarlyStoppingConfig:
    """When a run ends before its last round; decided on validation samples, so needs `data.validation_fraction`.

    Args:
        patience: evaluations in a row without an improvement after which the run ends; none when null. The first
            evaluation, with which they are compared, does not count, and they must fit in before the last round.
        measure: what is to improve, on average over the domains: `perplexity` is for causal language models only,
            `macro_f1` and `calibration_error` are for classifiers only (docs/measures.md).
        min_improvement: how much better than the best one before an evaluation must be, to count as an improvement.
    """

    patience: int | None = option(None, allowed.COUNT)
    measure: str = option("accuracy", MEASURE_NAMES, needs=[{"patience": (SOMETHING,)}])
    min_improvement: float = option(0.0, allowed.NON_NEGATIVE, needs=[{"patience": (SOMETHING,)}])


@dataclass
class ExecutionConfig:
    """How participants are trained; none of these changes the results.

    Args:
        executor: `sweep` (many clients in one pass over the blocks) or `sequential` (one PEFT sub-model
            per client, one after another; slow, the oracle of the tests).
        lanes: clients that `sweep` trains at the same time; bounds memory, whatever the number of clients. `auto`
            uses as many as help and fit into free memory, and halves them if memory still runs out.
        fused_blocks: compute blocks of known families by fewer operations; `auto` does so unless the model is sharded,
            on a CPU for those with plain attention (docs/design.md).
        checkpoint_blocks: keep only the inputs of blocks for the backward pass, which then runs each block again: less
            memory, but about half as much computation again.
        cuda_graphs: launch the local steps of `sweep` as CUDA graphs, each captured once for all steps of the same
            clients with batches of the same sizes (docs/kernels.md). Only with images, and a whole model on each GPU;
            no GPU has run it yet.
        deterministic: repeat a run, or resume it, to the last bit (docs/processes.md): sums do not depend on the order
            in which clients finish, clients are divided among processes by counted cost rather than measured speed, and
            a resumed run keeps its lanes.
    """

    executor: Literal["sweep", "sequential"] = "sweep"
    lanes: int | Literal["auto"] = option("auto", allowed.whole(1, 10**5), needs=[{"executor": ("sweep",)}])
    fused_blocks: Literal["auto", "on", "off"] = "auto"
    checkpoint_blocks: bool = option(
        # FedHello measures gradients with the sweep's model under any executor.
        False,
        needs=[{"executor": ("sweep",), "method.name": ("fedhello",)}],
    )
    cuda_graphs: Literal["off", "on"] = option("off", needs=[{"executor": ("sweep",)}])
    deterministic: bool = False


@dataclass
class ExperimentConfig:
    """A federated LoRA tuning experiment, with a group for each part; the default values are the embedded experiment.

    Args:
        rounds: federated rounds.
        seed: the seed from which every random draw is derived.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        keep_best: the measure (see `early_stopping.measure`) by which the best evaluated round is chosen, whose state
            and adapter are kept in `best/` of the run folder; needs `data.validation_fraction`. None is kept when null.
        name: name of the run folder; made from the method, model and time when null.
        output_dir: folder that receives run folders.
        report_to: experiment trackers that also get the metrics of every round, if they are installed.
        trace: also write everything needed to recompute each round with other code (needs lora.dropout 0).
    """

    rounds: int = option(80, allowed.COUNT)
    seed: int = option(0, allowed.NATURAL)
    evaluate_every: int = option(20, allowed.COUNT)
    keep_best: str | None = option(None, MEASURE_NAMES)
    name: str | None = option(None, allowed.FOLDER_NAME)
    output_dir: str = option("runs", allowed.PATH)
    report_to: list[str] = option([], allowed.TRACKER)
    trace: bool = False
    data: DataConfig = group(DataConfig)
    model: ModelConfig = group(ModelConfig)
    lora: LoraConfig = group(LoraConfig)
    method: MethodConfig = group(MethodConfig)
    server: ServerConfig = group(ServerConfig)
    clients: ClientsConfig = group(ClientsConfig)
    training: TrainingConfig = group(TrainingConfig)
    early_stopping: EarlyStoppingConfig = group(EarlyStoppingConfig)
    execution: ExecutionConfig = group(ExecutionConfig)

    def __repr__(self) -> str:
        """The fields that differ from their defaults, by dotted names, as on the command line."""
        try:
            changed = [each for each in settings(self) if each.value != each.default and "[" not in each.name]
        except InputError as error:
            return f"ExperimentConfig({error})"
        return f"ExperimentConfig({', '.join(f'{each.name}={each.value!r}' for each in changed)})"

    def chosen_rounds(self) -> dict[str, object]:
        """The options that choose a round by what is measured on it, as far as they are given, by name."""
        options = {"early_stopping.patience": self.early_stopping.patience, "keep_best": self.keep_best}
        return {name: value for name, value in options.items() if value is not None}

    def check(self) -> None:
        """Raise InputError if fields of different groups do not fit together."""
        for name, value in self.chosen_rounds().items():
            refuse_test_samples(name, value, self.data)
        self._check_patience()
        if self.lora.rank_pattern and (self.clients.ranks or self.method.name == "hetlora"):
            other = "method.name hetlora" if self.method.name == "hetlora" else f"clients.ranks {self.clients.ranks}"
            raise InputError(
                f"lora.rank_pattern: found {self.lora.rank_pattern} with {other}, expected one rank for all targets"
            )
        if self.model.load_in == "4bit" and self.model.dtype == "float64":
            raise InputError("model.load_in: found 4bit with model.dtype float64, expected another of the two")
        if self.model.load_in and self.execution.fused_blocks == "on":
            raise InputError(
                f"execution.fused_blocks: found on with model.load_in {self.model.load_in}, expected auto or off"
            )
        if self.model.load_in and self.execution.cuda_graphs == "on":
            raise InputError(f"execution.cuda_graphs: found on with model.load_in {self.model.load_in}, expected off")
        if self.method.allocation == "reference" and self.seed >= 2**32:
            raise InputError(
                f"seed: found {self.seed} with method.allocation reference, whose legacy NumPy stream takes 32 bits, "
                f"expected a whole number from 0 to {2**32 - 1}"
            )
        if self.trace and self.lora.dropout > 0:
            raise InputError(f"trace: found true with lora.dropout {self.lora.dropout}, expected lora.dropout 0")
        if self.trace and self.data.augmentation != "none":
            raise InputError(f"trace: found true with data.augmentation {self.data.augmentation}, expected none")

    def _check_patience(self) -> None:
        """Raise InputError if the run cannot end before its last round, however its evaluations turn out."""
        patience = self.early_stopping.patience
        # The first evaluation is what the others are compared with, and after the last round nothing is left to save.
        most = (self.rounds - 1) // self.evaluate_every - 1
        if patience is not None and patience > most:
            at_most = f"at most {most}, " if most > 0 else ""
            raise InputError(
                f"early_stopping.patience: found {patience} with rounds {self.rounds} and evaluate_every "
                f"{self.evaluate_every}, where it saves no round; expected {at_most}a smaller evaluate_every or more "
                "rounds"
            )

    def check_method(self) -> None:
        """Raise InputError if the server's optimizer changes a mean that the method needs unchanged."""
        server, name = self.server, self.method.name
        if name in _AS_IT_IS and (server.optimizer != "fedavg" or server.rate != 1):
            raise InputError(
                f"server: found optimizer {server.optimizer} with lr {server.rate:g} and method.name {name}, "
                f"expected fedavg with lr 1 ({_AS_IT_IS[name]})"
            )


def refuse_test_samples(name: str, value: object, data: DataConfig) -> None:
    """Raise InputError if option `name` chooses a round by what is measured on test samples."""
    if data.validation_fraction == 0:
        raise InputError(
            f"{name}: found {value} with data.validation_fraction 0, expected a fraction above 0 (on test samples that "
            "have chosen it, a round looks better than it is)"
        )
