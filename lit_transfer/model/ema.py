"""An exponential moving average of the weights that train (Tarvainen & Valpola 2017, eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """The average of a network's trained parameters; buffers are the network's own.

    Args:
        network: whose parameters are averaged; what trains must have been set before.
        decay: share of the old average that each update keeps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network's present weights."""
        torch._foreach_lerp_(list(self.weights.values()), list(self._parameters.values()), 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the network's weights; mutates the network. A second call takes it back."""
        for name, parameter in self._parameters.items():
            own = parameter.clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(own)

    def move_to(self, device: torch.device) -> None:
        """Follow the network to its device."""
        self.weights = {name: tensor.to(device) for name, tensor in self.weights.items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Go on from the averages of a checkpoint."""
        assert weights.keys() == self.weights.keys(), "an average of other parameters"
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}
