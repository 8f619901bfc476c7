"""Many heads as one: their weights stand side by side, so that one product serves all, and each learns as if alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_transfer.schedule import Phase


class StackedLinear(nn.Module):
    """n linear layers: [B, I], which all see, or [B, n, I] -> [B, n, O].

    Args:
        weight: [n, O, I].
        bias: [n, O].
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).view(-1, *self.bias.shape)
        return torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight.transpose(1, 2)).transpose(0, 1)


class StackedDropout(nn.Module):
    """Dropout of [B, I] or [B, n, I] that draws for all heads what one alone would draw."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = F.dropout(torch.ones(x.shape[0], x.shape[-1], device=x.device), self.rate)
        return x * (kept if x.ndim == 2 else kept[:, None])


def stack(head: nn.Sequential, weights: Sequence[Mapping[str, Tensor]]) -> nn.Sequential:
    """n heads of one shape as one, `[B, features]` to `[B, n, outputs]`; its parameters are named as the head's.

    Args:
        head: as `build_head` makes it.
        weights: of each, as in its `state_dict()`; they are copied.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in head.named_children():
        if isinstance(layer, nn.Linear):
            tensors = (torch.stack([each[f"{name}.{part}"] for each in weights]) for part in ("weight", "bias"))
            layers[name] = StackedLinear(*tensors)
        elif isinstance(layer, nn.Dropout):
            layers[name] = StackedDropout(layer.p)
        else:
            assert isinstance(layer, nn.ReLU), layer
            layers[name] = nn.ReLU()
    return nn.Sequential(layers)


class StackedOptimizer:
    """adamw, adam and sgd of torch.optim for n heads at once, each with its own learning rate and weight decay.

    AdamW: Loshchilov & Hutter 2019, algorithm 2; Adam: Kingma & Ba 2015, algorithm 1; SGD with the momentum of
    Sutskever et al. 2013 as torch writes it. A gradient that is not finite spoils its own head alone.

    Args:
        parameters: by name, [n, ...] each.
        phase: its optimizer, `optimizer_args`, `momentum` and `clip_norm`, which holds for each head.
        weight_decay: of each head [n].
        decaying: names of the parameters that decay.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        phase: Phase,
        weight_decay: Sequence[float],
        decaying: Collection[str],
    ) -> None:
        self.parameters = parameters
        self.kind = phase.optimizer.lower()
        self.betas = phase.optimizer_args.get("betas", (0.9, 0.999))
        self.eps = phase.optimizer_args.get("eps", 1e-8)
        self.momentum, self.nesterov = phase.momentum, phase.optimizer_args.get("nesterov", False)
        self.clip_norm = phase.clip_norm
        self.weight_decay = torch.tensor(weight_decay, dtype=torch.float64)
        self.decaying = {name for name in parameters if name in decaying and self.weight_decay.any()}
        self.moments = {
            f"{name}.{order}": torch.zeros_like(parameter)
            for name, parameter in parameters.items()
            for order in (("first",) if self.kind == "sgd" else ("first", "second"))
        }

    @torch.no_grad()
    def step(self, lr: Tensor, count: int) -> None:
        """Update all heads by their gradients; mutates parameters, gradients and moments.

        Args:
            lr: of each head, float64 [n].
            count: of the updates of the phase, this one included.
        """
        if self.clip_norm is not None:
            self._clip(self.clip_norm)
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, name
            if self.kind == "sgd":
                self._sgd(name, parameter, parameter.grad, lr)
            else:
                self._adam(name, parameter, parameter.grad, lr, count)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def _adam(self, name: str, parameter: Tensor, grad: Tensor, lr: Tensor, count: int) -> None:
        beta1, beta2 = self.betas
        first, second = self.moments[f"{name}.first"], self.moments[f"{name}.second"]
        if name in self.decaying and self.kind == "adamw":
            parameter.mul_(_of_heads(1 - lr * self.weight_decay, parameter))
        elif name in self.decaying:
            grad = torch.addcmul(grad, parameter, _of_heads(self.weight_decay, parameter))
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = second.sqrt().div_((1 - beta2**count) ** 0.5).add_(self.eps)
        parameter.add_((first * _of_heads(-lr / (1 - beta1**count), parameter)).div_(root))

    def _sgd(self, name: str, parameter: Tensor, grad: Tensor, lr: Tensor) -> None:
        if name in self.decaying:
            grad = torch.addcmul(grad, parameter, _of_heads(self.weight_decay, parameter))
        mean = self.moments[f"{name}.first"].mul_(self.momentum).add_(grad)
        move = grad.add(mean, alpha=self.momentum) if self.nesterov else mean
        parameter.addcmul_(move, _of_heads(-lr, parameter))

    def _clip(self, largest: float) -> None:
        """Scale the gradient of each head down to a norm."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        shares = (largest / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(_of_heads(shares, gradient))


def _of_heads(values: Tensor, like: Tensor) -> Tensor:
    """A number of each head [n] in the shape and type that multiplies [n, ...]."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
