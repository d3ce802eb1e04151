"""Sharding of the frozen weights over the processes of a job, by DeepSpeed's ZeRO-3.

DeepSpeed's hooks gather the parameters of a module before it runs, forward or backward, prefetch those of the next
modules, and release them afterwards. Gathering is a collective operation, so all processes must run the same modules in
the same order. A sweep does: a process without samples for a block runs the block on a dummy (`SweepBlock`), and a
process without clients left makes dummy passes (`SweepExecutor`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedra_engine.config import ExperimentConfig
from fedra_engine.runtime.errors import InputError, one_line
from fedra_engine.runtime.processes import launched_with_deepspeed

if TYPE_CHECKING:
    from accelerate import Accelerator

_UNSET = (None, "auto")
_SAMPLES_OF_STEP = "training.batch_size and max_local_steps of the experiment decide"
_WEIGHTS = "the model computes with the weights it has"
_ALLOWED: dict[str, tuple[tuple[object, ...], str]] = {
    "optimizer": ((None,), "every client has an optimizer of its own"),
    "scheduler": ((None,), "training.lr_schedule of the experiment decides"),
    "gradient_clipping": ((*_UNSET, 0), "training.clip_norm of the experiment decides"),
    "train_batch_size": (_UNSET, _SAMPLES_OF_STEP),
    "train_micro_batch_size_per_gpu": (_UNSET, _SAMPLES_OF_STEP),
    "gradient_accumulation_steps": ((*_UNSET, 1), _SAMPLES_OF_STEP),
    "torch_autocast.enabled": ((None, False), "model.dtype of the experiment decides"),
    "amp.enabled": ((None, False), "model.dtype of the experiment decides"),
    "zero_optimization.offload_optimizer.device": ((*_UNSET, "none"), "only frozen weights are sharded"),
    "zero_optimization.offload_param.device": ((*_UNSET, "none", "cpu"), "only CPU offload is supported"),
    "zero_optimization.zero_quantized_weights": ((None, False), _WEIGHTS),
    "zero_optimization.zero_quantized_nontrainable_weights": ((None, False), _WEIGHTS),
}
"""Allowed values of DeepSpeed's settings, the usual one first, and the reason why no others are."""
_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


class Sharding:
    """Sharding by the DeepSpeed configuration `settings`, with which the job was started."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._given = settings
        # Without "auto" values, which accelerate would fill in from the data loaders and models that it prepares.
        others = ("zero_optimization", "fp16", "bf16", *_ALLOWED)
        zero = settings.get("zero_optimization", {})
        self._settings = {
            **{name: deepcopy(value) for name, value in settings.items() if name not in others and value != "auto"},
            # DeepSpeed requires a batch size, although it does no training here.
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {name: deepcopy(value) for name, value in zero.items() if value != "auto"},
        }
        self._engines: list[Any] = []

    @classmethod
    def of(cls, accelerator: Accelerator) -> Sharding | None:
        """The sharding of the job; None if it was not started with DeepSpeed."""
        from accelerate import DeepSpeedPlugin

        plugin = accelerator.state.deepspeed_plugin
        if plugin is None and accelerator.device.type == "cpu" and launched_with_deepspeed():
            # accelerate ignores DeepSpeed on the CPU, although its launcher passes the settings on.
            plugin = DeepSpeedPlugin()
        if plugin is None:
            return None
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        if accelerator.device.type == "cpu":
            # DeepSpeed would look for another device, and warn that there is none.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # From here on transformers shards what it loads only within `loading`.
        unset_hf_deepspeed_config()
        return cls(plugin.deepspeed_config)

    def check(self, config: ExperimentConfig) -> None:
        """Raise InputError if the DeepSpeed configuration contradicts the experiment's."""
        stage = _value(self._given, "zero_optimization.stage")
        if stage != 3:
            raise InputError(
                f"deepspeed.zero_optimization.stage: found {stage}, expected 3 (only weights that are frozen can be "
                "sharded; others are each client's own)"
            )
        for field, (allowed, reason) in _ALLOWED.items():
            value = _value(self._given, field)
            if value not in allowed:
                found = "one" if isinstance(value, dict) else value
                expected = "none" if allowed[0] is None else allowed[0]
                raise InputError(f"deepspeed.{field}: found {found}, expected {expected} ({reason})")
        for section, dtype in _PRECISIONS.items():
            enabled = _value(self._given, f"{section}.enabled")
            if enabled not in _UNSET and enabled != (config.model.dtype == dtype):
                raise InputError(
                    f"deepspeed.{section}.enabled: found {enabled} with model.dtype {config.model.dtype}, expected "
                    f"{not enabled} or no section {section}"
                )
        if config.lora.modules_to_save:
            raise InputError(
                f"lora.modules_to_save: found {config.lora.modules_to_save} with a sharded model, expected none"
            )
        if config.model.load_in is not None:
            raise InputError(f"model.load_in: found {config.model.load_in} with a sharded model, expected null")
        if config.execution.executor != "sweep":
            raise InputError(
                f"execution.executor: found {config.execution.executor} with a sharded model, expected sweep (only "
                "there do all processes pass the blocks in the same order)"
            )
        if config.execution.fused_blocks == "on":
            raise InputError("execution.fused_blocks: found on with a sharded model, expected auto or off")
        if config.execution.cuda_graphs == "on":
            raise InputError("execution.cuda_graphs: found on with a sharded model, expected off")
        if config.clients.devices:
            raise InputError(
                "clients.devices: found some with a sharded model, whose costs are not counted, expected none"
            )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Shard the models that transformers loads inside."""
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        deepspeed = _import_deepspeed()
        # transformers holds a weak reference to it.
        notice = HfDeepSpeedConfig(self._settings)
        try:
            # transformers sets the precision: DeepSpeed has no float64 and would round buffers.
            device = deepspeed.runtime.zero.partition_parameters.DeepSpeedTensorOverride.device
            try:
                shards = deepspeed.zero.Init(config_dict_or_path=self._settings, tensor_overrides=[device])
            except (AssertionError, TypeError, ValueError) as error:
                reason = one_line(error)
                raise InputError(f"deepspeed: found settings that it cannot use ({reason}), expected others") from error
            with shards:
                yield
        finally:
            unset_hf_deepspeed_config()
            del notice

    def attach(self, model: nn.Module) -> None:
        """Shard the rest of `model`, and have its parameters gathered whenever a module runs.

        Module trees that share parameters are attached one by one, after all copies have been made.
        """
        if self._engines:
            # A tree must find the parameters that another one has begun to fetch.
            model.ds_inflight_param_registry = self._engines[0].module.ds_inflight_param_registry
        engine, *_ = _import_deepspeed().initialize(model=model, config=self._settings)
        self._engines.append(engine)

    def release(self) -> None:
        """Release parameters that are still gathered after a backward pass.

        DeepSpeed does not notice the end of the backward pass of a module whose input needs no gradient.
        """
        for engine in self._engines:
            engine.optimizer.release_backward_leftovers()


def is_sharded(module: nn.Module) -> bool:
    """Whether the parameters of `module` are sharded over the processes of the job."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def parameter_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter, of all shards together, and of a weight of 4 bits, which is stored in another shape."""
    unpacked = getattr(parameter, "quant_state", None)
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape) if unpacked is None else unpacked.shape
    return shape


def parameter_count(module: nn.Module) -> int:
    """Number of parameters of `module`, in all shards together."""
    return sum(parameter_shape(parameter).numel() for parameter in module.parameters())


@contextmanager
def gathered(module: nn.Module, *, writes: bool = False, recurse: bool = False) -> Iterator[None]:
    """Gather the parameters of `module`, if it is sharded, to access them without calling it; a collective operation.

    Args:
        module: owner of the parameters.
        writes: keep what the main process writes into them.
        recurse: also gather those of its submodules.
    """
    sharded = [parameter for parameter in module.parameters(recurse) if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if writes else None):
        yield


def refuse_sharding(accelerator: Accelerator) -> None:
    """Raise InputError for a dry run, which needs the whole model, if the job was started with DeepSpeed."""
    if Sharding.of(accelerator) is not None:
        raise InputError("dry_run: found true in a job with DeepSpeed, expected a job without it")


def _import_deepspeed() -> Any:
    import deepspeed

    # An unused reduction in shared memory. DeepSpeed would compile it on a CPU at the first use, for minutes, and a
    # process that is killed meanwhile leaves a lock for which all later ones wait forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls a deprecated function of torch, once for every parameter.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
    return deepspeed


def _value(settings: dict[str, Any], field: str) -> Any:
    """The value at a dotted path; None if missing."""
    value: Any = settings
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
