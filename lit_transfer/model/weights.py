"""Weights from files: found, verified tensor by tensor, loaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from lit_transfer.errors import UserError, require
from lit_transfer.model import caffe
from lit_transfer.model.stages import starts_with
from lit_transfer.recipe import Model

# The portable model of a run holds its Backbone's tensors under these names.
RUN_FILE = Path("model") / "weights.safetensors"
RUN_PREFIX = "backbone.net."
SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Source:
    """Where weights came from: the file on this machine, if it can be told, and its public origin."""

    path: Path | None
    origin: str
    licence: str | None = None

    def sha256(self) -> str | None:
        """Digest of the file."""
        if self.path is None:
            return None
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find(weights: str) -> Source:
    """The file that `file:PATH`, `caffe_npy:PATH`, `package:MODULE[:relative/path]` or `run:DIR` means.

    Raises:
        UserError: there is no such file, or a package holds several.
    """
    kind, _, place = weights.partition(":")
    if kind == "package":
        return _in_package(place)
    path = Path(place) / RUN_FILE if kind == "run" else Path(place)
    remedy = "finish that run first" if kind == "run" else "correct the path, or bring the file here"
    require(path.is_file(), f"model.weights '{weights}': {path} does not exist; {remedy}.")
    return Source(path, origin=weights)


def _in_package(place: str) -> Source:
    """A weight file in an installed package, found without running any of the package's code."""
    module, _, relative = place.partition(":")
    root, *inner = module.split(".")
    spec = importlib.util.find_spec(root)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.weights 'package:{place}': {root} is not installed; run {_install(root)}.")
    folder = Path(spec.submodule_search_locations[0], *inner).resolve()
    found = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if relative:
        found = [path for path in found if path == (folder / relative).resolve()]
        require(bool(found), f"model.weights 'package:{place}': {module} holds no weight file {relative}.")
    listed = ", ".join(path.relative_to(folder).as_posix() for path in found[:10])
    require(bool(found), f"model.weights 'package:{place}': {module} holds no file *{', *'.join(SUFFIXES)}.")
    require(
        len(found) == 1,
        f"model.weights 'package:{place}': {module} holds {len(found)} weight files ({listed}); choose "
        f"one, as package:{module}:{found[0].relative_to(folder).as_posix()}.",
    )
    return Source(found[0], origin=f"package:{place}", licence=_licence(root))


def _install(module: str) -> str:
    """The command that installs a package: an extra of this project if one lists it."""
    wanted = module.replace("_", "-").lower()
    try:
        known = importlib.metadata.requires("lit_transfer") or []
    except importlib.metadata.PackageNotFoundError:
        known = []
    for requirement in known:
        match = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", requirement)
        if match and match[1].replace("_", "-").lower() == wanted:
            return f"`pip install 'lit_transfer[{match[2]}]'`"
    return f"`pip install {wanted}`"


def _licence(module: str) -> str | None:
    """The licence an installed package names: in its metadata, else the first line of its licence file."""
    names = importlib.metadata.packages_distributions().get(module, [])
    for distribution in map(importlib.metadata.distribution, names):
        for key in ("License-Expression", "License"):
            stated: list[str] = distribution.metadata.get_all(key) or []
            if stated and stated[0] != "UNKNOWN":
                return stated[0].splitlines()[0]
        for file in distribution.files or []:
            if file.name.upper().startswith("LICENSE"):
                return file.read_text().partition("\n")[0].strip()
    return None


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, in its order; `state_dict` and `model` are unwrapped.

    Raises:
        UserError: not such a file, or a file that holds other Python objects than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, safetensors.SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as a file of tensors ({reason}); save a state_dict, best as .safetensors."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    remedy = "save a state_dict, best as .safetensors"
    require(tensors, f"{path} does not hold names, each with one tensor; {remedy}.")
    return dict(content)


def load(
    net: nn.Module, path: Path | None, model: Model, classifier: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Copy a file's tensors into the network; mutates `net`.

    Every tensor must match by name and shape, apart from what the config names. `optional` tensors of the
    network need not be in the file. Files older than BatchNorm's `num_batches_tracked` lack all of them.

    Raises:
        UserError: lists what is missing, unexpected or of another shape.
    """
    assert path is not None
    target = net.state_dict()
    held = caffe.read(path) if model.weights.startswith("caffe_npy:") else read(path)
    tensors = _strip(held, path, RUN_PREFIX if model.weights.startswith("run:") else model.strip_prefix)
    if model.weights.startswith("run:"):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    if not any(map(_is_counter, tensors)):
        target = {name: tensor for name, tensor in target.items() if not _is_counter(name)}
    dropped = [prefix.rstrip(".") for prefix in model.drop if prefix != "head"]
    for prefix in dropped:
        known = any(starts_with(name, [prefix]) for name in (*tensors, *target))
        require(known, f"model.drop '{prefix}' begins no tensor's name in {path} or the network; correct it.")
    tensors = {name: tensor for name, tensor in tensors.items() if not starts_with(name, dropped)}
    head = list(classifier) if "head" in model.drop else []
    if model.match == "order":
        tensors = _pair_by_order(tensors, target, path, head)
    tensors = {name: tensor for name, tensor in tensors.items() if not starts_with(name, head)}
    if "pos_embed" in model.resample:
        _resample_positions(net, tensors, target, path)
    _compare(tensors, target, path, [*head, *dropped, *optional])
    net.load_state_dict(tensors, strict=False)


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")


def _strip(tensors: dict[str, Tensor], path: Path, prefix: str) -> dict[str, Tensor]:
    require(
        any(name.startswith(prefix) for name in tensors),
        f"no tensor of {path} has a name that begins with '{prefix}' (model.strip_prefix); the first is "
        f"{next(iter(tensors), 'absent: the file is empty')}.",
    )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _pair_by_order(
    tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], path: Path, head: Sequence[str]
) -> dict[str, Tensor]:
    """Give the file's tensors the network's names, position by position."""
    require(
        path.suffix != ".safetensors",
        f"model.match order: {path} is .safetensors, which keeps no order; use a .pth file.",
    )
    names = list(target)
    if len(tensors) != len(names):  # the file may lack the last layer that is to be dropped
        names = [name for name in names if not starts_with(name, head)]
    require(
        len(tensors) == len(names),
        f"model.match order: {path} has {len(tensors)} tensors and the network {len(target)}; "
        "orders pair only where the counts agree; use model.match name.",
    )
    for place, (theirs, ours) in enumerate(zip(tensors, names, strict=True)):
        require(
            theirs.rpartition(".")[2] == ours.rpartition(".")[2],
            f"model.match order: tensor {place} is {theirs} in {path} but {ours} in the network, another "
            "kind, so the orders differ; use model.match name.",
        )
    return dict(zip(names, tensors.values(), strict=True))


def _resample_positions(net: nn.Module, tensors: dict[str, Tensor], target: Mapping[str, Tensor], path: Path) -> None:
    """Interpolate the file's position embedding to the network's grid; mutates `tensors`."""
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    require(
        grid is not None and "pos_embed" in tensors and "pos_embed" in target,
        f"model.resample pos_embed: the network or {path} has no pos_embed over a grid; remove the setting.",
    )
    if tensors["pos_embed"].shape != target["pos_embed"].shape:
        prefix = 0 if getattr(net, "no_embed_class", False) else getattr(net, "num_prefix_tokens", 1)
        tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], grid, num_prefix_tokens=prefix)


def _compare(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], path: Path, optional: Sequence[str]) -> None:
    missing = [name for name in target if name not in tensors and not starts_with(name, optional)]
    unexpected = [name for name in tensors if name not in target]
    shapes = [
        f"{name} {list(tensor.shape)} instead of {list(target[name].shape)}"
        for name, tensor in tensors.items()
        if name in target and tensor.shape != target[name].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    told = [
        f"{len(names)} {what}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
        for what, names in faults.items()
        if names
    ]
    positions = any(name.startswith("pos_embed ") for name in shapes)
    require(
        not told,
        f"the tensors of {path} are not those of the network: {'; '.join(told)}; name exceptions with "
        "model.drop (prefixes to leave out), model.strip_prefix, model.match order and model.resample."
        + (" For another image size use model.resample [pos_embed]." if positions else ""),
    )
