"""Small networks with noise in every stage, and with every kind of normalisation: frozen, both must stand still."""

from __future__ import annotations

import timm
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn


class Block(nn.Module):
    """A convolution that halves the map, a normalisation, and a residual whose branch is noisy in training."""

    def __init__(self, inputs: int, outputs: int, norm: nn.Module, noise: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm = norm
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, H, W]` to `[B, outputs, H/2, W/2]`."""
        x = self.norm(self.conv(x))
        return x + self.noise(F.gelu(x))


class Mixed(nn.Module):
    """Four stages: each its own pair of a normalisation and a noise."""

    stages = (("batch", ("batch",)), ("group", ("group",)), ("layer", ("layer",)), ("top", ("top", "pool")))
    classifier = "fc"

    def __init__(self) -> None:
        super().__init__()
        self.batch = Block(3, 8, nn.BatchNorm2d(8), nn.Dropout(0.3))
        self.group = Block(8, 8, nn.GroupNorm(2, 8), DropPath(0.5))
        self.layer = Block(8, 8, LayerNorm2d(8), nn.Dropout(0.3))
        self.top = Block(8, 16, nn.BatchNorm2d(16), DropPath(0.5))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(16, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 3, S, S]` to logits `[B, 1000]`."""
        return self.fc(self.pool(self.top(self.layer(self.group(self.batch(x))))))  # type: ignore[no-any-return]


def efficientnet() -> nn.Module:
    """A family with BatchNorm; drop-path where its blocks have a residual."""
    return timm.create_model("test_efficientnet", drop_path_rate=0.5)  # type: ignore[no-any-return]


def vit() -> nn.Module:
    """A family with LayerNorm; dropout of positions, attention and projections, and drop-path."""
    noise = {"pos_drop_rate": 0.3, "attn_drop_rate": 0.3, "proj_drop_rate": 0.3, "drop_path_rate": 0.5}
    return timm.create_model("test_vit", img_size=32, **noise)  # type: ignore[no-any-return]
