"""A classifier made of a backbone that has none: a pooling of its outputs and a new Linear."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

from fedra_engine.runtime.errors import InputError

Pooling = Literal["pooler", "first", "mean", "last"]


class PooledClassifier(nn.Module):
    """Logits of one vector per sample.

    The vector is what the backbone itself gives as `pooler_output` (`pooler`), the output of the `first` token (a
    class token), the `mean` over all tokens that are not padding, or the output of the `last` of these.
    """

    def __init__(self, backbone: PreTrainedModel, classes: int, pooling: Pooling) -> None:
        """The new Linear is drawn as transformers draws those of its classifiers."""
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        features = backbone.config.hidden_size
        self.classifier = nn.Linear(features, classes, dtype=backbone.dtype)
        nn.init.normal_(self.classifier.weight, std=getattr(backbone.config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    @property
    def config(self) -> Any:
        """The backbone's transformers configuration."""
        return self.backbone.config

    @property
    def main_input_name(self) -> str:
        """`pixel_values` or `input_ids`."""
        return self.backbone.main_input_name

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """`logits` [samples, classes].

        Raises:
            InputError: the backbone does not give what the pooling reads.
        """
        output = self.backbone(**inputs)
        return SequenceClassifierOutput(logits=self.classifier(self._pool(output, inputs.get("attention_mask"))))

    def _pool(self, output: ModelOutput, mask: Tensor | None) -> Tensor:
        name = "pooler_output" if self.pooling == "pooler" else "last_hidden_state"
        states = output.get(name)
        if not isinstance(states, Tensor) or states.dim() != (2 if self.pooling == "pooler" else 3):
            raise InputError(
                f"model.pooling: found {self.pooling} with a {type(self.backbone).__name__}, which gives no {name} of "
                "one vector per sample or token, expected another pooling"
            )
        if self.pooling == "pooler":
            return states
        if self.pooling == "first":
            return states[:, 0]
        present = torch.ones_like(states[..., 0], dtype=torch.int64) if mask is None else mask.long()
        if self.pooling == "mean":
            weights = present.to(states.dtype)
            return (weights[:, None] @ states)[:, 0] / weights.sum(1, keepdim=True)
        # Whichever side is padded.
        last = (present * torch.arange(1, states.shape[1] + 1, device=states.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]
