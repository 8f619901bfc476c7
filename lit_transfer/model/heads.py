"""What replaces a network's last layer."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from lit_transfer.recipe import Head


def build_head(head: Head, features: int, outputs: int, seed: int) -> nn.Sequential:
    """A linear layer, or hidden layers with ReLU and dropout before it: `[B, features]` to `[B, outputs]`.

    Hidden layers start as He et al. 2015 (eq. 10). The last layer starts near zero (normal, std 0.01, bias
    0): the first loss is that of a uniform guess, and the first gradients into a thawed backbone are small.
    All values come from `seed` alone; the global random state is neither read nor moved. Tensor names do not
    depend on the dropout rates.
    """
    generator = torch.Generator().manual_seed(seed)
    places = max(1, len(head.hidden))
    rates = head.dropout if isinstance(head.dropout, list) else [head.dropout] * places
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, rate in enumerate(rates):
        if head.hidden:
            layers[f"hidden{i}"] = _linear(features, head.hidden[i], (2 / features) ** 0.5, generator)
            layers[f"relu{i}"] = nn.ReLU()
            features = head.hidden[i]
        if rate > 0:
            layers[f"dropout{i}"] = nn.Dropout(rate)
    layers["logits"] = _linear(features, outputs, 0.01, generator)
    return nn.Sequential(layers)


def _linear(features: int, outputs: int, std: float, generator: torch.Generator) -> nn.Linear:
    # Made without values: nn.Linear itself would draw them from the global random state.
    layer = nn.Linear(features, outputs, device="meta").to_empty(device="cpu")
    nn.init.normal_(layer.weight, std=std, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
