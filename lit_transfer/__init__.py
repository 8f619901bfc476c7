"""Distributed transfer learning for images. The public names, in the order in which data flows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_transfer.config import Config as Config
    from lit_transfer.data.decode import DecodeError as DecodeError
    from lit_transfer.data.decode import Preprocessing as Preprocessing
    from lit_transfer.data.decode import decode as decode
    from lit_transfer.data.manifest import Manifest as Manifest
    from lit_transfer.data.packing.items import Pack as Pack
    from lit_transfer.data.packing.pack import pack as pack
    from lit_transfer.errors import UserError as UserError
    from lit_transfer.model.backbone import Backbone as Backbone
    from lit_transfer.model.backbone import build_backbone as build_backbone
    from lit_transfer.model.heads import build_head as build_head
    from lit_transfer.model.network import Network as Network
    from lit_transfer.model.portable import Prediction as Prediction
    from lit_transfer.model.portable import TransferModel as TransferModel
    from lit_transfer.model.portable import load as load

_HOMES = {
    "Config": "config",
    "UserError": "errors",
    "Pack": "data.packing.items",
    "pack": "data.packing.pack",
    "Manifest": "data.manifest",
    "Preprocessing": "data.decode",
    "DecodeError": "data.decode",
    "decode": "data.decode",
    "Backbone": "model.backbone",
    "build_backbone": "model.backbone",
    "build_head": "model.heads",
    "Network": "model.network",
    "load": "model.portable",
    "TransferModel": "model.portable",
    "Prediction": "model.portable",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: all of them take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_transfer' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lit_transfer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(_HOMES)
