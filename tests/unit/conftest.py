"""Fixtures of more than one file here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from digits import PREPROCESSING, digits, streams_of, tiny_config
from libraries import opened

from lit_transfer.activations import build as build_module
from lit_transfer.activations import shelf as shelf_module
from lit_transfer.activations.library import Library
from lit_transfer.data.streams import Samples
from lit_transfer.model.backbone import Backbone, build_backbone
from lit_transfer.recipe import Model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def import_benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of benchmarks/ by its name; no other test sees it, or those that it imports."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(f"{BENCHMARKS}/"):
            del sys.modules[name]


@pytest.fixture
def backbone() -> Backbone:
    """A tiny network in training mode."""
    torch.manual_seed(0)
    backbone = build_backbone(Model(backbone="timm/test_efficientnet", weights="none"), image_size=PREPROCESSING.size)
    for tensor in backbone.state_dict().values():
        if tensor.ndim == 1:  # weights of BatchNorm that do nothing would hide that they are not there
            tensor.add_(0.1 * torch.rand_like(tensor))
    return backbone


@pytest.fixture
def streams(tmp_path: Path) -> dict[str, Samples]:
    """48 samples of train, 24 of val."""
    return streams_of(tiny_config(digits(tmp_path / "digits", count=96), tmp_path))


@pytest.fixture
def library(backbone: Backbone, streams: dict[str, Samples], tmp_path: Path, small_parts: None) -> Library:
    """Of both streams as they are, exact to the bit."""
    return opened(backbone, streams, tmp_path)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 16 records, so that a shelf has several."""
    monkeypatch.setattr(shelf_module, "ROWS_PER_PART", 16)
    monkeypatch.setattr(build_module, "ROWS_PER_PART", 16)
