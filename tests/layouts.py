"""Configs and layouts on which schedules are tested."""

from __future__ import annotations

import functools
from typing import Any

from lit_transfer.config import Config
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.heads import build_head
from lit_transfer.model.network import Layout, Network, ParameterInfo
from lit_transfer.reading import parse
from lit_transfer.recipe import Head, Model

NETWORKS = ["timm/test_efficientnet", "timm/test_vit"]
STAGES = ("stem", "blocks.0", "blocks.1", "top")


def config(phases: Any, **sections: Any) -> Config:
    """A config with `train` and `val`, apart from what is given."""
    streams = {"train": {"manifest": "x", "split": "train"}, "val": {"manifest": "x", "split": "val"}}
    plain = {"name": "run", "data": streams, "model": {"backbone": "timm/net"}, "phases": phases}
    return parse(Config, plain | sections)


def row(**settings: Any) -> dict[str, Any]:
    """A phase of two epochs that trains the head at 0.1, apart from what is given."""
    return {"name": "a", "max_epochs": 2, "lr": 0.1} | settings


def small() -> Layout:
    """Four stages and a head; each stage has a kernel, and the weight and bias of a normalisation layer."""
    found = []
    for stage in STAGES:
        for name, decays in (("conv.weight", True), ("bn.weight", False), ("bn.bias", False)):
            own = f"{stage}.{name}"
            found.append(ParameterInfo(f"backbone.net.{own}", f"{stage}/{own}", decays, is_norm=not decays))
    head = [
        ParameterInfo(f"head.logits.{name}", f"head/logits.{name}", name == "weight", is_norm=False)
        for name in ("weight", "bias")
    ]
    return Layout("timm/net", STAGES, (*found, *head))


@functools.cache
def real(name: str) -> Layout:
    """The layout of a timm network with a new head, made on `meta`."""
    backbone = build_backbone(Model(backbone=name, weights="none"), image_size=160, device="meta", load_weights=False)
    return Network(backbone, build_head(Head(hidden=[8]), backbone.features, 3, seed=0).to("meta")).layout()
