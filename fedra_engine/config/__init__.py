"""The experiment as a tree of dataclasses, with the values each field takes; imports nothing but `runtime`."""

from fedra_engine.config.tree import (
    ClientsConfig,
    ColumnsConfig,
    DataConfig,
    DepthFLConfig,
    DeviceConfig,
    ExecutionConfig,
    ExperimentConfig,
    FedHelloConfig,
    HetLoraConfig,
    InclusiveFLConfig,
    LoraConfig,
    LoraFairConfig,
    MethodConfig,
    ModelConfig,
    ServerConfig,
    TrainingConfig,
)

__all__ = [
    "ClientsConfig",
    "ColumnsConfig",
    "DataConfig",
    "DepthFLConfig",
    "DeviceConfig",
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
]
