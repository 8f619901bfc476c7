"""A name becomes a network that still has its own last layer, with the weights the config asks for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import torchvision.models as tv
from torch import nn

from lit_transfer.config import Image
from lit_transfer.errors import UserError, nearest, require
from lit_transfer.model import caffe, weights
from lit_transfer.model.families import table_of
from lit_transfer.model.stages import Table, find_cut, owners, starts_with, tensor_names
from lit_transfer.recipe import Model

IMAGENET = Image(size=224, crop=0.875, interpolation="bilinear", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Built:
    """A network with its own last layer.

    Args:
        net: the network, in training mode.
        classifier: dotted paths of its last layer (distilled networks have two).
        table: its stages.
        image: the input it was made for, every field set.
        source: where its weights came from; None where they are random.
    """

    net: nn.Module
    classifier: tuple[str, ...]
    table: Table
    image: Image
    source: weights.Source | None = None


def build_net(model: Model, *, image_size: int | None = None, device: str = "cpu", load_weights: bool = True) -> Built:
    """Build the whole network and load its weights, its own classifier included where the file has it.

    With `model.transfer_to` weights are copied up to and including that stage; all else has the values of a network
    made without weights in the same random state (layer transfer, Yosinski et al. 2014, section 2).

    Args:
        model: all but `pool` and `head` is read.
        image_size: side of the input; the network's own by default. Position embeddings are made for it.
        device: `cpu`, or `meta` for shapes without values (weights are not loaded then).
        load_weights: False leaves random values.

    Raises:
        UserError: an unknown name, weights that are missing, or weights that do not match.
    """
    load_weights = load_weights and device != "meta" and model.weights != "none"
    if model.transfer_to is None:
        return _build(model, image_size, device, load_weights)
    fresh = _build(model, image_size, device, load_weights=False)
    later = _stages_behind(fresh, model, model.transfer_to)
    require(
        set(_stages_behind(fresh, model, model.last_stage)) <= set(later),
        f"model.transfer_to '{model.transfer_to}' lies behind model.last_stage '{model.last_stage}', which removes it; "
        "name an earlier stage, or remove the setting.",
    )
    if not load_weights:
        return fresh
    network = _build(model, image_size, device, load_weights)
    new = [*later, *network.classifier]
    tensors = {name: tensor for name, tensor in fresh.net.state_dict().items() if starts_with(name, new)}
    network.net.load_state_dict(tensors, strict=False)
    return network


def _build(model: Model, image_size: int | None, device: str, load_weights: bool) -> Built:
    """The whole network with all its weights, or all random."""
    pretrained = load_weights and model.weights == "pretrained"
    if pretrained:
        changed = [key for key, default in _MATCHING.items() if getattr(model, key) != default]
        told = f"model.{' and model.'.join(changed)}: only weights file:, package: and run: take it"
        require(not changed, f"{told}; remove it, or name another model.weights.")
    named = model.backbone.startswith(("timm/", "torchvision/", "caffe/"))
    kind, _, name = model.backbone.partition("/" if named else ":")
    kinds = "timm/NAME, torchvision/NAME, caffe/alexnet, hf-hub:REPO, local-dir:DIR or module:callable"
    require(bool(name), f"model.backbone '{model.backbone}' is not {kinds}.")
    if kind == "torchvision":
        network = _torchvision(name, model, image_size, device, pretrained)
    elif kind in ("timm", "hf-hub", "local-dir"):
        network = _timm(name if kind == "timm" else model.backbone, model, image_size, device, pretrained)
    elif kind == "caffe":
        require(
            name == "alexnet",
            f"model.backbone '{model.backbone}': of Caffe's networks only caffe/alexnet is known; name that.",
        )
        net = _make(caffe.AlexNet, device)
        network = Built(net, (caffe.AlexNet.classifier,), table_of(net), caffe.IMAGE)
    else:
        network = _from_callable(kind, name, device, pretrained)
    _quiet_dropout(network)
    if load_weights and not pretrained:
        source = weights.find(model.weights)
        later = _stages_behind(network, model, model.transfer_to or model.last_stage)
        weights.load(network.net, source.path, model, network.classifier, later)
        return replace(network, source=source)
    return network


_MATCHING: dict[str, Any] = {"drop": ["head"], "strip_prefix": "", "match": "name"}


def _stages_behind(network: Built, model: Model, last: str | None) -> tuple[str, ...]:
    """Tensors of the stages behind one: a file need not hold those that are removed or not copied."""
    names = [stage.name for stage in network.table.stages]
    if last is None:
        return ()
    keep = find_cut(last, names, model.backbone) + 1
    tensors = [name for name in tensor_names(network.net) if not starts_with(name, network.classifier)]
    return tuple(name for name, i in owners(tensors, network.table.stages, model.backbone).items() if i >= keep)


def _make(build: Callable[[], nn.Module], device: str) -> nn.Module:
    if device != "meta":
        return build()
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # a constructor that computes with tensors, such as torchvision's RegNet
        return build().to("meta")


def _torchvision(name: str, model: Model, image_size: int | None, device: str, pretrained: bool) -> Built:
    names = tv.list_models(module=tv)
    require(
        name in names,
        f"'{name}' is not a classification network of torchvision; list them with "
        f"torchvision.models.list_models().{nearest(name, names)}",
    )
    # The preprocessing that belongs to these two weights expects the network to undo it (transform_input).
    inception = {"aux_logits": False, "transform_input": True, "init_weights": False}
    arguments: dict[str, Any] = inception if name in ("googlenet", "inception_v3") else {}
    entry = tv.get_model_weights(name).DEFAULT
    preset = entry.transforms()
    size, canvas = preset.crop_size[0], preset.resize_size[0]
    if name.startswith("vit_") and image_size not in (None, size):
        remedy = "or use a timm network with model.resample [pos_embed]."
        require(not pretrained, _positions(model, size, image_size) + remedy)
        arguments = {"image_size": image_size}
    source = None
    if pretrained:
        path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
        with _hub(entry.url, path.parent):
            net = tv.get_model(name, weights=entry, progress=False, **arguments)
        source = weights.Source(path, origin=entry.url)
    else:
        net = _make(lambda: tv.get_model(name, weights=None, **arguments), device)
    # torchvision's networks register their layers in order, so the last one is the classifier.
    layers = [path for path, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    image = Image(
        size=size,
        crop=min(1.0, size / canvas),
        interpolation="bicubic" if preset.interpolation.value == "bicubic" else "bilinear",
        mean=list(preset.mean),
        std=list(preset.std),
    )
    return Built(net, (layers[-1],), table_of(net), image, source)


def _positions(model: Model, own: int | None, size: int | None) -> str:
    return (
        f"{model.backbone} has position embeddings for images of {own} pixels, but image.size is {size}: "
        f"set image.size {own}, "
    )


def _timm(name: str, model: Model, image_size: int | None, device: str, pretrained: bool) -> Built:
    _check_timm_name(name)
    hub = Path(huggingface_hub.constants.HF_HUB_CACHE)
    source = None
    try:
        with _hub(name.removeprefix("hf-hub:"), hub):
            net = _make(lambda: timm.create_model(name), device)
        config: Mapping[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
        own = config["input_size"][-1]
        resized = config.get("fixed_input_size") and image_size not in (None, own)
        if resized and pretrained and "pos_embed" not in model.resample:
            raise UserError(_positions(model, own, image_size) + "or set model.resample [pos_embed].")
        arguments = {"img_size": image_size} if resized else {}
        if pretrained:
            origin = str(config.get("hf_hub_id") or config.get("file") or config.get("url"))
            with _hub(f"{origin} (weights of {model.backbone})", hub):
                net = timm.create_model(name, pretrained=True, **arguments)
            source = weights.Source(_timm_file(config), origin, config.get("license"))
        elif resized:
            net = _make(lambda: timm.create_model(name, **arguments), device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # timm's own complaints: an unknown tag, no weights at all
        raise UserError(f"timm cannot build {model.backbone}: {_first_line(error)}") from error
    image = Image(
        size=own,
        crop=min(1.0, float(config["crop_pct"])),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        mean=list(config["mean"]),
        std=list(config["std"]),
    )
    return Built(net, _classifier_of(net, model.backbone), table_of(net), image, source)


def _check_timm_name(name: str) -> None:
    kind, _, place = name.rpartition(":")
    if kind == "local-dir":
        config = Path(place) / "config.json"
        require(config.is_file(), f"model.backbone '{name}': {config} does not exist; correct the folder.")
    elif not kind:
        plain = name.split(".")[0]
        require(
            timm.is_model(plain),
            f"'{plain}' is not a network of this timm ({timm.__version__}); list them with "
            f"timm.list_models().{nearest(plain, timm.list_models())}",
        )


def _timm_file(config: Mapping[str, Any]) -> Path | None:
    """Where timm keeps the file of a pretrained network, if it can be told."""
    names = [config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"]
    if config.get("source") == "local-dir":
        places = [Path(config["file"]) / name for name in names if name]
    elif config.get("hf_hub_id"):
        cached = [huggingface_hub.try_to_load_from_cache(config["hf_hub_id"], name) for name in names if name]
        places = [Path(found) for found in cached if isinstance(found, str)]
    else:
        places = [Path(torch.hub.get_dir()) / "checkpoints" / str(config["url"]).rsplit("/", 1)[-1]]
    return next((place for place in places if place.is_file()), None)


def _from_callable(module: str, name: str, device: str, pretrained: bool) -> Built:
    where = f"model.backbone '{module}:{name}'"
    require(
        not pretrained,
        f"model.weights pretrained has no meaning for {where}; use none (the callable may load its own), or file:PATH.",
    )
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        remedy = "install it or add its folder to PYTHONPATH"
        raise UserError(f"{where} cannot be imported ({error}); {remedy}.") from error
    net = _make(build, device)
    require(isinstance(net, nn.Module), f"{where} gave {type(net).__name__}, not a torch.nn.Module.")
    return Built(net, _classifier_of(net, f"{module}:{name}"), table_of(net), IMAGENET)


def _classifier_of(net: nn.Module, name: str) -> tuple[str, ...]:
    """Paths of the last layer: what the network declares, or what timm's `get_classifier` gives."""
    paths: tuple[str, ...] = ()
    if isinstance(getattr(net, "classifier", None), str):
        declared = str(net.classifier)
        paths = (declared,) if declared in dict(net.named_modules()) else ()
    elif callable(getattr(net, "get_classifier", None)):
        last = net.get_classifier()  # type: ignore[operator]
        layers = last if isinstance(last, tuple) else (last,)
        paths = tuple(path for path, module in net.named_modules() if any(module is one for one in layers))
    require(
        bool(paths),
        f"the last layer of {name} is not known; give the network `classifier`, its dotted path.",
    )
    return paths


def _quiet_dropout(network: Built) -> None:
    """Dropout directly in front of the classifier belongs to the old head; the new head has its own."""
    leaves = [(path, module) for path, module in network.net.named_modules() if not list(module.children())]
    paths = [path for path, _ in leaves]
    for path in network.classifier:
        before = leaves[paths.index(path) - 1][1] if path in paths and paths.index(path) else None
        if isinstance(before, nn.Dropout):
            before.p = 0.0


@contextmanager
def _hub(what: str, where: Path) -> Iterator[None]:
    """Turn a failed download into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} is not in {where} and cannot be downloaded ({_first_line(error)}); on a machine with a "
            "network run `lit-transfer fetch --config FILE`, then bring that folder here."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
