"""A pretrained network as ordered, named stages that end in a vector."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lit_transfer.config import Image
from lit_transfer.errors import UserError, require
from lit_transfer.model import weights
from lit_transfer.model.sources import Built, build_net
from lit_transfer.model.stages import (
    Function,
    Stage,
    Step,
    Table,
    find_cut,
    flatten,
    owners,
    summarise,
    tensor_names,
)
from lit_transfer.recipe import Model


class Backbone(nn.Module):
    """A network without its last layer; `suffix(prefix(x, cut), cut)` is the whole of it for every cut.

    Args:
        name: as in the config.
        net: the network, its last layer replaced by the identity.
        stages: in order; each tensor of `net` belongs to exactly one.
        features: width of the output.
        image: size, crop, interpolation, mean and std the network was made for.
        provenance: backbone, weights, origin (and up to which stage they were transferred), sha256 and licence.

    Raises:
        UserError: a tensor that belongs to no stage, or to several.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        stages: tuple[Stage, ...],
        features: int,
        image: Image,
        provenance: dict[str, str | None],
    ) -> None:
        super().__init__()
        self.name = name
        self.net = net
        self.stages = stages
        self.features = features
        self.image = image
        self.provenance = provenance
        self._owners = owners(tensor_names(net), stages, name)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return tuple(stage.name for stage in self.stages)

    def cut_index(self, cut: str) -> int:
        """Stages stand before a cut: `all`, `head` or the first stage behind it; or `UserError`."""
        return find_cut(cut, self.stage_names, self.name)

    def run(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The stages start <= i < stop, one after the other."""
        return run_stages(self.net, self.stages[start:stop], x)

    def prefix(self, x: Tensor, cut: str) -> Tensor:
        """Normalised images `[B, 3, S, S]` to the activations at the cut, `[B, features]` for `head`."""
        return self.run(x, 0, self.cut_index(cut))

    def suffix(self, x: Tensor, cut: str) -> Tensor:
        """The activations at the cut to `[B, features]`."""
        return self.run(x, self.cut_index(cut), len(self.stages))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `[B, 3, S, S]` to `[B, features]`."""
        return self.run(x, 0, len(self.stages))

    def stage_of(self, tensor_name: str) -> str:
        """The stage of a parameter or buffer, named as in `named_parameters()`; KeyError if there is none."""
        return self.stages[self._owners[tensor_name.removeprefix("net.")]].name

    def stage_parameters(self, index: int) -> list[tuple[str, nn.Parameter]]:
        """The parameters of a stage, named as in `named_parameters()`."""
        named = self.named_parameters()
        return [(name, p) for name, p in named if self._owners[name.removeprefix("net.")] == index]

    def stage_modules(self, index: int) -> list[nn.Module]:
        """The modules of a stage, none inside another: what `eval()` must reach to freeze it."""
        modules = dict(self.net.named_modules())
        return [modules[path] for path in self.stages[index].prefixes if path in modules]


def build_backbone(
    model: Model, *, image_size: int | None = None, device: str = "cpu", load_weights: bool = True
) -> Backbone:
    """Build the network, load its weights, cut it into stages, and take off its last layer and unused stages.

    The stages are run once against the network's own forward pass and must give its last layer the same to the
    bit (except on `meta`, where nothing has a value). The global random state moves only where weights start random.

    Args:
        model: all but `head` is read.
        image_size: side of the input in pixels; the network's own by default.
        device: where the backbone ends up; `meta` gives shapes without values.
        load_weights: False leaves random values, for weights that are copied in later.

    Raises:
        UserError: an unknown name or stage, missing or unfitting weights, or a stage table that is wrong.
    """
    network = build_net(model, image_size=image_size, device=device, load_weights=load_weights)
    net, size = network.net, image_size or network.image.size
    assert size is not None, "a network's own image has every field set"
    last = _stages_kept(model, [stage.name for stage in network.table.stages])
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device_of(net))
    net.eval()
    with torch.no_grad():
        _take_off_classifier(network, image, model.backbone)
        stages, features = _end_in_vector(network, last, image, model)
    _remove(net, network.table.stages[last:])
    source = network.source
    provenance = {
        "backbone": model.backbone,
        "weights": model.weights if load_weights else "none",
        "origin": _origin(source, model),
        "sha256": source.sha256() if source else None,
        "licence": source.licence if source else None,
    }
    return Backbone(model.backbone, net.train(), stages, features, network.image, provenance).to(device)


def _origin(source: weights.Source | None, model: Model) -> str | None:
    if source is None or model.transfer_to is None:
        return source.origin if source else None
    return f"{source.origin}, transferred up to {model.transfer_to}"


def run_stages(net: nn.Module, stages: tuple[Stage, ...], x: Tensor) -> Tensor:
    """Run stages of a network one after the other."""
    for stage in stages:
        for step in stage.steps:
            x = net.get_submodule(step)(x) if isinstance(step, str) else step(net, x)
    return x


def device_of(net: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a network without any."""
    return next((parameter.device for parameter in net.parameters()), torch.device("cpu"))


def _stages_kept(model: Model, names: list[str]) -> int:
    """How many stages `model.last_stage` keeps."""
    require(
        len(set(names)) == len(names) and not {"all", "head"} & set(names),
        f"the stages of {model.backbone} are {summarise(names)}; give each its own name, none all or head.",
    )
    if model.last_stage is None:
        return len(names)
    require(
        model.last_stage not in ("all", "head"),
        f"model.last_stage '{model.last_stage}' is not a stage's name.",
    )
    return find_cut(model.last_stage, names, model.backbone) + 1


def _take_off_classifier(network: Built, image: Tensor, name: str) -> None:
    """Take off the last layer and prove the stages equal to the whole network; mutates the net.

    What the last layer is given is compared, not what it makes of it: a last layer of zeros would hide everything.
    """
    net, table = network.net, network.table
    for path in network.classifier:
        net.set_submodule(path, nn.Identity())
    try:
        expected = net(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name} cannot take images of {image.shape[-1]} pixels ({reason}); set image.size to "
            f"{network.image.size}, which it was made for."
        ) from error
    owners(tensor_names(net), table.stages, name)
    if not table.is_cut or image.is_meta:
        return
    assert len(network.classifier) == 1, "families with a stage table have one last layer"
    try:
        same = torch.equal(run_stages(net, _extended(table.stages, table.end), image), expected)
    except RuntimeError:  # shapes that do not fit together
        same = False
    require(
        same,
        f"the stage table of {name} ({summarise([stage.name for stage in table.stages])}) is wrong: run "
        "stage by stage, the network's output is not that of its own forward pass; correct or remove it.",
    )


def _extended(stages: tuple[Stage, ...], end: tuple[Step, ...]) -> tuple[Stage, ...]:
    """The stages, with more steps at the end of the last one."""
    return (*stages[:-1], replace(stages[-1], steps=stages[-1].steps + end))


def _end_in_vector(network: Built, last: int, image: Tensor, model: Model) -> tuple[tuple[Stage, ...], int]:
    """The first `last` stages with the pooling at their end, and the width of the vector they give."""
    net, table = network.net, network.table
    stages = table.stages[:last]
    if last == len(table.stages) and model.pool == "auto":
        stages = _extended(stages, table.end)
    output = run_stages(net, stages, image)
    end = _pooling(table, output, model)
    for step in end:
        output = step(net, output)
    require(output.ndim == 2, f"{model.backbone} ends in {list(output.shape)}, not in one vector per image.")
    return _extended(stages, end), output.shape[1]


def _pooling(table: Table, output: Tensor, model: Model) -> tuple[Function, ...]:
    """What turns the last stage's output into a vector."""
    if output.ndim == 2:
        require(
            model.pool == "auto",
            f"model.pool {model.pool}: the last stage of {model.backbone} already gives a vector; use auto, "
            "or name an earlier model.last_stage.",
        )
        return ()
    ways = {"auto": table.pool, "avg": table.average, "max": table.maximum, "flatten": flatten}
    return (ways[model.pool],)


def _remove(net: nn.Module, stages: tuple[Stage, ...]) -> None:
    """Delete what belongs to stages; mutates the net. Other names stay as they are."""
    for prefix in (prefix for stage in stages for prefix in stage.prefixes):
        parent, _, leaf = prefix.rpartition(".")
        delattr(net.get_submodule(parent), leaf)
