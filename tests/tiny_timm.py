"""Small models of the same structure as timm's, which may not be installed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

DEPTH = 4
WIDTH = 16


class Attention(nn.Module):
    """timm's ViT attention: one Linear for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.norm = nn.Linear(features, hidden), nn.GELU(), nn.Identity()
        self.fc2 = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VitBlock(nn.Module):
    """timm's ViT block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(WIDTH), Attention(), LayerScale()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(WIDTH), Mlp(WIDTH, 32), nn.Identity()
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MixerBlock(nn.Module):
    """timm's MLP-Mixer block: the first MLP acts on the tokens of every channel, [samples, channels, tokens]."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(WIDTH), Mlp(tokens, 8)
        self.norm2, self.mlp_channels = nn.LayerNorm(WIDTH), Mlp(WIDTH, 32)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


@dataclass
class Output:
    logits: Tensor


class TimmModel(nn.Module):
    """Images of 8 × 8 pixels as 4 patches, `blocks`, a mean over patches and a classifier."""

    main_input_name = "pixel_values"

    def __init__(self, blocks: list[nn.Module], classes: int, channels: int = 1) -> None:
        super().__init__()
        self.patches = nn.Linear(16 * channels, WIDTH)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, pixel_values: Tensor) -> Output:
        patches = pixel_values.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        tokens = self.patches(patches.reshape(len(pixel_values), 4, -1))
        return Output(self.head(self.norm(self.blocks(tokens)).mean(1)))


def timm_vit(classes: int) -> TimmModel:
    return TimmModel([VitBlock() for _ in range(DEPTH)], classes)


def timm_mixer(classes: int, channels: int = 1) -> TimmModel:
    return TimmModel([MixerBlock(tokens=4) for _ in range(DEPTH)], classes, channels)
