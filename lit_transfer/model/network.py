"""A backbone and its head as one network whose cut says what trains."""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor, nn

from lit_transfer.model.backbone import Backbone


class Network(nn.Module):
    """Backbone, then head. Freshly made, everything but the head is frozen.

    Frozen means: no gradient, normalisation and dropout in eval mode whatever `train()` is called, and run
    without an autograd graph as far as the cut.
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.first_trained = 0
        self.norm: Literal["pretrained", "batch"] = "pretrained"
        # Convolutions run faster over channels-last memory, several times so on a CPU; others do not mind.
        self.to(memory_format=torch.channels_last)
        self.set_cut("head")

    def set_cut(self, cut: str, norm: Literal["pretrained", "batch"] = "pretrained") -> None:
        """Freeze all before stage `cut` (`head`: the whole backbone; `all`: nothing). Mutates requires_grad.

        Call it on every rank and before DDP wraps: gradients of what is thawed later are never reduced.
        """
        self.first_trained = self.backbone.cut_index(cut)
        self.norm = norm
        for index in range(len(self.backbone.stages)):
            for _, parameter in self.backbone.stage_parameters(index):
                parameter.requires_grad_(index >= self.first_trained)
                parameter.grad = None
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; frozen stages, and BatchNorm under `norm: pretrained`, stay in eval mode."""
        super().train(mode)
        for index in range(len(self.backbone.stages)):
            for module in self.backbone.stage_modules(index):
                if index < self.first_trained:
                    module.eval()
                elif self.norm == "pretrained":
                    for norm in batch_norms(module):
                        norm.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> logits [B, outputs]."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            images = self.backbone.run(images, 0, self.first_trained)
        features = self.backbone.run(images, self.first_trained, len(self.backbone.stages))
        if features.is_meta:  # which knows no autocast
            return self.head(features)  # type: ignore[no-any-return]
        with torch.autocast(features.device.type, enabled=False):  # bf16 logits would fall on few distinct values
            return self.head(features.float())  # type: ignore[no-any-return]


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All layers below a module whose statistics come from the batch while training."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
