"""What a run leaves for others: a folder with weights, preprocessing, names, temperature, threshold and provenance.

`weights.safetensors` holds the tensors of a `Network`, `model.json` all else that `load` needs, `README.md`
is for people. Nothing is ever unpickled, and nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lit_transfer.blocks import Combination
from lit_transfer.data.decode import Preprocessing, decode, to_canvas, to_rgb
from lit_transfer.errors import UserError, require
from lit_transfer.files import write_json, write_text
from lit_transfer.model.augment import eval_input
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.card import model_card
from lit_transfer.model.heads import build_head
from lit_transfer.model.joined import build_combination
from lit_transfer.model.network import Network
from lit_transfer.objectives.calibration import rescale
from lit_transfer.objectives.decisions import decide, probabilities
from lit_transfer.objectives.losses import outputs
from lit_transfer.reading import parse, to_plain
from lit_transfer.recipe import Model

FORMAT = 1
DESCRIPTION, WEIGHTS, CARD = "model.json", "weights.safetensors", "README.md"
ARCHITECTURE = "config.json"
"""A copy of the file that describes a network from a hub or a folder, under the name timm looks for; of several blocks
each has its own in a folder `block0` and so on."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """All that a network's weights do not say.

    Args:
        task: of the dataset.
        label: the label column, where it was chosen among several.
        classes: class names by index; for multilabel and regression the label columns.
        display: how people read them.
        temperature: that the probabilities are scaled by (see `objectives/calibration.py`), or None.
        threshold: of the decision (see `objectives/decisions.py`), or None.
        preprocessing: from picture to network input.
        model: backbone and head, or blocks and the kind of head that was fitted to them.
        provenance: where it came from: run, commit, versions, dataset, weights, config and figures.
    """

    task: str
    label: str | None
    classes: tuple[str, ...]
    display: tuple[str, ...]
    temperature: float | None = None
    threshold: list[float] | None
    preprocessing: Preprocessing
    model: Model | Combination
    provenance: dict[str, Any]

    def to_plain(self) -> dict[str, Any]:
        """The content of `model.json`."""
        return {
            "format": FORMAT,
            "task": self.task,
            "label": self.label,
            "classes": list(self.classes),
            "display": list(self.display),
            "temperature": self.temperature,
            "threshold": self.threshold,
            "outputs": outputs(self.task, len(self.classes)),
            "preprocessing": self.preprocessing.to_plain(),
            "model": to_plain(self.model),
            "provenance": self.provenance,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Description:
        """The inverse of `to_plain`."""
        temperature = plain.get("temperature")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"temperature {temperature}")
        return cls(
            task=plain["task"],
            label=plain["label"],
            classes=tuple(plain["classes"]),
            display=tuple(plain["display"]),
            temperature=temperature,
            threshold=plain["threshold"],
            preprocessing=Preprocessing.from_plain(plain["preprocessing"]),
            model=_parse_model(plain["model"]),
            provenance=plain["provenance"],
        )


def _parse_model(plain: Mapping[str, Any]) -> Model | Combination:
    return parse(Combination, plain) if "blocks" in plain else parse(Model, plain)


@dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Args:
        decision: the class, or all labels at or above their thresholds; empty for regression.
        scores: display names with probabilities, likeliest first; of a regression its targets and values.
    """

    decision: tuple[str, ...]
    scores: tuple[tuple[str, float], ...]


class TransferModel(nn.Module):
    """A trained network with its preprocessing and names, in eval mode and without gradients.

    Args:
        network: backbone and head.
        info: all else.
    """

    def __init__(self, network: Network, info: Description) -> None:
        super().__init__()
        self.network = network
        self.info = info
        self.task, self.classes, self.display = info.task, info.classes, info.display
        self.temperature, self.threshold, self.preprocessing = info.temperature, info.threshold, info.preprocessing
        self.requires_grad_(False)
        self.eval()

    def preprocess(self, image: bytes | str | Path | Image.Image) -> Tensor:
        """A picture (bytes or path of a file, or a PIL image) as network input [3, S, S]; of a file as in validation.

        A large JPEG file is decoded at a part of its size, a PIL image is not: they may differ by some levels of 255.

        Raises:
            DecodeError: it cannot be decoded.
            OSError: the file cannot be read.
        """
        if isinstance(image, Image.Image):
            canvas = to_canvas(to_rgb(image), self.preprocessing)
        else:
            canvas = decode(image if isinstance(image, bytes) else Path(image).read_bytes(), self.preprocessing)
        return eval_input(torch.from_numpy(canvas)[None], self.preprocessing)[0]

    def forward(self, images: Tensor) -> Tensor:
        """Network input [B, 3, S, S] -> probabilities [B, K] (fp64 with a temperature); for regression values."""
        return rescale(self.task, probabilities(self.task, self.network(images)), self.temperature)

    def predict(self, images: Sequence[bytes | str | Path | Image.Image]) -> list[Prediction]:
        """Name pictures, all in one batch, on the device the model is on. Raises as `preprocess` does."""
        device = next(self.parameters()).device
        batch = torch.stack([self.preprocess(image) for image in images]).to(device)
        return [self.describe(row) for row in self(batch).cpu()]

    def describe(self, row: Tensor) -> Prediction:
        """The decision and the ranked names of one row of probabilities [K]."""
        scores = list(zip(self.display, row.tolist(), strict=True))
        if self.task == "regression":
            return Prediction((), tuple(scores))
        decided = decide(self.task, row[None].cpu(), self.threshold)[0]
        chosen = decided.nonzero().flatten().tolist() if self.task == "multilabel" else [int(decided)]
        ranked = sorted(scores, key=lambda pair: -pair[1])
        return Prediction(tuple(self.display[k] for k in chosen), tuple(ranked))


def save_portable(folder: Path, network: Network, info: Description) -> None:
    """Write a model folder, whole or not at all; one that is there is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    old = folder.with_name(f"{temporary.name}.old")
    temporary.mkdir()
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        _write(temporary / WEIGHTS, save(tensors))
        plain = info.to_plain()
        write_json(temporary / DESCRIPTION, plain)
        write_text(temporary / CARD, model_card(plain, folder))
        for model, place in _models(info.model, temporary):
            _copy_architecture(model.backbone, place)
        _put(temporary, folder, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(new: Path, folder: Path, old: Path) -> None:
    """Rename `new` to `folder`; one that is there stays under the name `old` until that has succeeded."""
    if not folder.exists():
        new.rename(folder)
        return
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load(path: str | Path) -> TransferModel:
    """The model of a finished run, from its run directory or the `model` folder in it, on the CPU.

    Raises:
        UserError: no model there, one of another format, or files that do not belong together.
    """
    folder = Path(path)
    if not (folder / DESCRIPTION).is_file():
        folder = folder / "model"
    info = _read_description(folder, path)
    try:
        tensors = load_file(folder / WEIGHTS)
        network = _network(info, folder, tensors)
        network.load_state_dict(tensors)
    except (OSError, RuntimeError, TypeError, KeyError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder / WEIGHTS} does not fit {folder / DESCRIPTION} ({reason}); copy the model folder "
            "again, or use the versions that its provenance names."
        ) from error
    return TransferModel(network, info)


def _network(info: Description, folder: Path, tensors: Mapping[str, Tensor]) -> Network:
    """The network that has these tensors, with random values in their place."""
    bare = [_bare(model, place) for model, place in _models(info.model, folder)]
    if isinstance(info.model, Combination):
        blocks = [replace(block, model=model) for block, model in zip(info.model.blocks, bare, strict=True)]
        return build_combination(replace(info.model, blocks=blocks), info.task, info.preprocessing, tensors)
    backbone = build_backbone(bare[0], image_size=info.preprocessing.size, load_weights=False)
    head = build_head(info.model.head, backbone.features, outputs(info.task, len(info.classes)), seed=0)
    return Network(backbone, head)


def _models(model: Model | Combination, folder: Path) -> list[tuple[Model, Path]]:
    """Each backbone of a portable model, and where the file that describes it is, if there is one."""
    if isinstance(model, Model):
        return [(model, folder)]
    return [(block.model, folder / f"block{i}") for i, block in enumerate(model.blocks)]


def _bare(model: Model, place: Path) -> Model:
    """A backbone as it is built without its own weights, which are in the folder."""
    name = f"local-dir:{place}" if (place / ARCHITECTURE).is_file() else model.backbone
    return replace(model, backbone=name, weights="none", transfer_to=None)


def _read_description(folder: Path, path: str | Path) -> Description:
    file = folder / DESCRIPTION
    require(
        file.is_file(),
        f"'{path}' holds no model ({file} does not exist); give the directory of a finished run, "
        "or the model folder in it.",
    )
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        version = plain["format"]
        require(
            version == FORMAT,
            f"{file} has format {version}, this version reads {FORMAT}; use the version of lit_transfer that wrote it.",
        )
        return Description.from_plain(plain)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} is not the description of a model ({error!r}); copy the model folder again."
        ) from error


def _copy_architecture(backbone: str, folder: Path) -> None:
    """Bring along what describes a network from a hub or a folder, which the reader may not have."""
    kind, _, place = backbone.partition(":")
    if kind in ("local-dir", "hf-hub"):
        folder.mkdir(exist_ok=True)
    if kind == "local-dir":
        shutil.copyfile(Path(place) / ARCHITECTURE, folder / ARCHITECTURE)
    elif kind == "hf-hub":
        repository, _, revision = place.partition("@")
        cached = huggingface_hub.try_to_load_from_cache(repository, ARCHITECTURE, revision=revision or None)
        assert isinstance(cached, str), "the network was built from this file"
        shutil.copyfile(cached, folder / ARCHITECTURE)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:  # safetensors' own writer makes files that only their owner may read
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
