"""What the accuracy study trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedra_engine.config import (
    ClientsConfig,
    DataConfig,
    DepthFLConfig,
    ExecutionConfig,
    ExperimentConfig,
    InclusiveFLConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    TrainingConfig,
)
from fedra_engine.config.validation import validate

METHODS = {
    "fedra": MethodConfig("fedra"),
    "fedstandin": MethodConfig("fedstandin"),
    # Both as in FedRA's published comparison.
    "inclusivefl": MethodConfig("inclusivefl", inclusivefl=InclusiveFLConfig(momentum=0.0)),
    "depthfl": MethodConfig("depthfl", depthfl=DepthFLConfig(variant="fedra_paper")),
    "allsmall": MethodConfig("allsmall"),
    "alllarge": MethodConfig("alllarge"),
}
"""What a study can train, by name."""


@dataclass(frozen=True)
class StudySetting:
    """Feature skew: every domain is one client, and all take part in every round with a full local epoch.

    The optimizer is that of FedRA's published runs. The other fields of the configuration have their default values.

    Attributes:
        capacities: blocks that a client can hold, by domain in the order of their names.
        methods: names in `METHODS`, in the order in which they take turns.
        rounds: of each method; when all have them, the next seed begins.
        slice: rounds that a method trains before it is the next one's turn, and after which it is evaluated; at the
            end all are.
        seeds: of the experiments, one after another; each draws another test set.
        image_size: side in pixels.
        batch_size: images of a client's local step.
        learning_rate: constant over the rounds.
        rank: of the adapters; their product is not scaled.
        targets: Linears with an adapter, the attention's last one and the MLP's, by a regular expression for the path
            in a block: versions of transformers name the former differently.
    """

    capacities: tuple[int, ...] = (12, 8, 6, 4)
    methods: tuple[str, ...] = ("fedra", "fedstandin", "inclusivefl", "depthfl", "allsmall", "alllarge")
    rounds: int = 100
    slice: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    image_size: int = 56
    batch_size: int = 16
    learning_rate: float = 0.01
    rank: int = 8
    targets: str = r".*(o_proj|attention\.output\.dense|fc2)"

    def experiment(self, images: str, model: str, device: torch.device, method: str, seed: int) -> ExperimentConfig:
        """The configuration of one run, validated.

        Args:
            images: folder of the images.
            model: folder of the model.
            device: that trains; a GPU holds the frozen model in bf16, a CPU in fp32. Adapters are fp32 on both.
            method: its name in `METHODS`.
            seed: of all draws.
        """
        config = ExperimentConfig(
            rounds=self.rounds,
            seed=seed,
            evaluate_every=self.slice,
            data=DataConfig("image_folder", images, image_size=self.image_size, partition="domain", min_samples=1),
            model=ModelConfig(model, dtype=precision(device)),
            lora=LoraConfig(self.rank, float(self.rank), target_modules=self.targets),
            method=METHODS[method],
            clients=ClientsConfig(list(self.capacities)),
            training=self._training(),
            # All clients together; a number that depended on free memory could change how sums are rounded.
            execution=ExecutionConfig(lanes=len(self.capacities)),
        )
        validate(config)
        return config

    def described(self) -> dict[str, Any]:
        """All that decides what a round computes, by name, as JSON has it."""
        values = asdict(self)
        for name in ("methods", "rounds", "slice", "seeds"):
            del values[name]
        groups: dict[str, Any] = {
            "training": self._training(),
            "inclusivefl": METHODS["inclusivefl"].inclusivefl,
            "depthfl": METHODS["depthfl"].depthfl,
        }
        values |= {f"{name}.{field}": value for name, group in groups.items() for field, value in asdict(group).items()}
        stand_ins = asdict(METHODS["fedstandin"])
        values |= {name: value for name, value in stand_ins.items() if name.startswith("stand_in_")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _training(self) -> TrainingConfig:
        return TrainingConfig(
            optimizer="sgd",
            lr=self.learning_rate,
            lr_schedule="constant",
            batch_size=self.batch_size,
            local_epochs=1,
            max_local_steps=None,
        )


def precision(device: torch.device) -> Any:
    """The data type of the frozen model."""
    # Most CPUs are slower in bf16.
    return "float32" if device.type == "cpu" else "bfloat16"
