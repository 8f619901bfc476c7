"""A backbone and its head as one network that knows which of its parameters train."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_transfer.model.backbone import Backbone

Norm = Literal["pretrained", "batch"]


@dataclass(frozen=True)
class ParameterInfo:
    """What a schedule must know of a parameter.

    Args:
        name: as in `Network.named_parameters()`.
        path: `STAGE/NAME`, with the network's own name, or `head/NAME`: what patterns match.
        decays: takes weight decay: no vector or scalar, and not exempted by the network itself.
        is_norm: weight or bias of a normalisation layer.
    """

    name: str
    path: str
    decays: bool
    is_norm: bool

    @property
    def stage(self) -> str:
        """The stage it stands in, or `head`."""
        return self.path.partition("/")[0]


@dataclass(frozen=True)
class Layout:
    """A network as a schedule sees it: its name, its stages in order, and all parameters, those of the head last."""

    backbone: str
    stages: tuple[str, ...]
    parameters: tuple[ParameterInfo, ...]


class Network(nn.Module):
    """Backbone, then head. Freshly made, everything but the head is frozen.

    Frozen means: no gradient; a stage (or the head) of which nothing trains, and a layer whose own parameters are
    frozen, stays in eval mode whatever `train()` is called; what lies before the first stage that trains runs
    without an autograd graph.
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.trained_parts: set[str] = set()
        self.first_trained = 0
        self.norm: Norm = "pretrained"
        self.grad_checkpointing = False
        self._compiled: Callable[[Tensor], Tensor] | None = None
        # Convolutions run faster over channels-last memory, several times so on a CPU; others do not mind.
        self.to(memory_format=torch.channels_last)
        self.set_cut("head")

    def layout(self) -> Layout:
        """Stages and parameters as a schedule sees them; also of a network on `meta`."""
        exempt: set[str] = getattr(
            self.backbone.net, "no_weight_decay", set
        )()  # timm's: position embeddings and tokens
        norms = {
            f"{path}.{name}".removeprefix(".")
            for path, module in self.named_modules()
            if "norm" in type(module).__name__.lower()
            for name, _ in module.named_parameters(recurse=False)
        }
        found = []
        for name, parameter in self.named_parameters():
            own = name.removeprefix("backbone.net.")
            place = f"head/{own.removeprefix('head.')}" if own == name else f"{self.backbone.stage_of(own)}/{own}"
            decays = parameter.ndim > 1 and own not in exempt
            found.append(ParameterInfo(name, place, decays, name in norms))
        return Layout(self.backbone.name, self.backbone.stage_names, tuple(found))

    def set_cut(self, cut: str, norm: Norm = "pretrained") -> None:
        """Train the head and all from stage `cut` on (`head`: no stage; `all`: every stage). See `set_trained`."""
        first = self.backbone.cut_index(cut)
        stages = {"head", *self.backbone.stage_names[first:]}
        self.set_trained([p.name for p in self.layout().parameters if p.stage in stages], norm)

    def set_trained(
        self,
        names: Collection[str],
        norm: Norm = "pretrained",
        *,
        compile: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        """Train the named parameters and freeze all others. Mutates requires_grad, and drops gradients.

        Call it on every rank and before DDP wraps: gradients of what is thawed later are never reduced.

        Args:
            names: as in `named_parameters()`.
            norm: whether trained BatchNorm layers use their pretrained statistics or the batch's.
            compile: run the trained part through torch.compile.
            grad_checkpointing: keep only the inputs of trained stages for the backward pass.
        """
        trained = set(names)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)
            parameter.grad = None
        self.trained_parts = {p.stage for p in self.layout().parameters if p.name in trained}
        trained_stages = (i for i, name in enumerate(self.backbone.stage_names) if name in self.trained_parts)
        self.first_trained = next(trained_stages, len(self.backbone.stages))
        self.norm = norm
        self.grad_checkpointing = grad_checkpointing
        if compile or self._compiled:  # a frame for other trained parameters may be taken (pytorch/pytorch#139476)
            torch._dynamo.reset()
        self._compiled = torch.compile(self._run_trained) if compile else None
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; what is frozen, and BatchNorm under `norm: pretrained`, stays in eval mode."""
        super().train(mode)
        stages = {name: self.backbone.stage_modules(index) for index, name in enumerate(self.backbone.stage_names)}
        for part, modules in (stages | {"head": [self.head]}).items():
            for module in modules:
                if part not in self.trained_parts:
                    module.eval()
                for layer in module.modules():
                    own = list(layer.parameters(recurse=False))
                    keeps_statistics = self.norm == "pretrained" and isinstance(layer, nn.modules.batchnorm._BatchNorm)
                    if keeps_statistics or (own and not any(p.requires_grad for p in own)):
                        layer.training = False
        return self

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Normalised images [B, 3, S, S], or activations behind `start` frozen stages -> logits [B, outputs]."""
        assert start <= self.first_trained, "a stage that trains must be run"
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            x = self.backbone.run(x, start, self.first_trained)
        run_trained = self._compiled if self._compiled and self.training else self._run_trained
        return run_trained(x)

    def _run_trained(self, x: Tensor) -> Tensor:
        """Activations at the first trained stage -> logits [B, outputs]."""
        count = len(self.backbone.stages)
        if self.grad_checkpointing and self.training:
            for index in range(self.first_trained, count):
                x = checkpoint(self.backbone.run, x, index, index + 1, use_reentrant=False)
        else:
            x = self.backbone.run(x, self.first_trained, count)
        if x.is_meta:  # which knows no autocast
            return self.head(x)  # type: ignore[no-any-return]
        with torch.autocast(x.device.type, enabled=False):  # bf16 logits would fall on few distinct values
            return self.head(x.float())  # type: ignore[no-any-return]


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All layers below a module whose statistics come from the batch while training."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
