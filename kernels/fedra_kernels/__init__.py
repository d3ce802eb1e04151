"""Grouped LoRA ops for many clients in one launch: Triton on a GPU, torch on a CPU."""

from .adamw import adamw, adamw_reference
from .aggregate import aggregate, aggregate_reference, finish_aggregate
from .dropout import Dropout, dropout_key, dropout_keys, dropout_mask
from .frozen_linear import FrozenLinear
from .groups import RowGroups, to_device
from .head import head_cross_entropy, head_cross_entropy_reference
from .head_logits import head_logits, head_logits_reference
from .lora_linear import lora_linear, lora_linear_reference
from .low_rank_add import low_rank_add, low_rank_add_reference
from .pre_norm_block import (
    AdapterColumns,
    BlockAdapters,
    PreNormBlock,
    pre_norm_block,
    pre_norm_block_reference,
)
from .sgd import sgd, sgd_reference
from .squared_norms import squared_changes, squared_changes_reference, squared_norms, squared_norms_reference
from .stream_block import AdaptedLayer, GradientHandOver, Norm, StreamBlock, stream_block, stream_block_reference

__all__ = [
    "AdaptedLayer",
    "AdapterColumns",
    "BlockAdapters",
    "Dropout",
    "FrozenLinear",
    "GradientHandOver",
    "Norm",
    "PreNormBlock",
    "RowGroups",
    "StreamBlock",
    "adamw",
    "adamw_reference",
    "aggregate",
    "aggregate_reference",
    "dropout_key",
    "dropout_keys",
    "dropout_mask",
    "finish_aggregate",
    "head_cross_entropy",
    "head_cross_entropy_reference",
    "head_logits",
    "head_logits_reference",
    "lora_linear",
    "lora_linear_reference",
    "low_rank_add",
    "low_rank_add_reference",
    "pre_norm_block",
    "pre_norm_block_reference",
    "sgd",
    "sgd_reference",
    "squared_changes",
    "squared_changes_reference",
    "squared_norms",
    "squared_norms_reference",
    "stream_block",
    "stream_block_reference",
    "to_device",
]
