"""Runs whose head starts as the logistic regression on what the backbone gives (LP-FT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from digits import digits, fine_tuning, prepared
from stored_runs import TOP, written
from torch import Tensor

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.features.initialise import start_of_head
from lit_transfer.launch import main
from lit_transfer.phases.checkpoint import PhaseFiles
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.steps import Steps

MODEL = {"backbone": "timm/test_efficientnet", "weights": "none", "head": {"init": "logistic_regression"}}
ONE_STEP = {**TOP, "max_epochs": None, "max_steps": 1, "ema_decay": 0.5}


class Began(pl.Callback):
    """What the head, and its average, hold where a phase begins."""

    def __init__(self) -> None:
        self.heads: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = next(callback for callback in trainer.callbacks if isinstance(callback, Steps))
        assert steps.ema
        self.heads.append({name: p.detach().clone() for name, p in pl_module.network.head.named_parameters()})
        own = {name: average for name, average in steps.ema.weights.items() if name.startswith("head.")}
        self.averages.append({name.removeprefix("head."): average.clone() for name, average in own.items()})


def configured(manifest: Manifest, folder: Path, phases: list[dict[str, Any]]) -> Config:
    return fine_tuning(manifest, folder / "runs", phases, model=MODEL)


def test_the_first_phase_begins_with_the_fitted_layer(tmp_path: Path) -> None:
    config = configured(digits(tmp_path / "digits"), tmp_path, [ONE_STEP, {**ONE_STEP, "name": "next"}])
    job, plans = prepared(config)
    start = start_of_head(job.network, job.config, job.streams["train"], job.preprocessing)
    began = Began()
    run_phases(job, plans, [began])
    first, second = began.heads
    for held in (first, began.averages[0]):
        assert torch.equal(held["logits.weight"], start.weight) and torch.equal(held["logits.bias"], start.bias)
    trained = PhaseFiles(job.run.checkpoints("top")).read_final()
    for name, held in second.items():
        assert torch.equal(held, trained[f"head.{name}"]), "the next phase goes on from what was trained"


def test_what_it_cannot_be_fitted_to_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(digits(tmp_path / "digits", "regression"), tmp_path, [ONE_STEP])
    assert main(["train", "--config", written(config, tmp_path)]) == 2
    assert "logistic_regression needs classes, but the dataset is regression; use random." in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
