"""A run with damaged samples: what it counted survives a restart, and its loss is the mean over what it read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from digits import digits, fine_tuning, metric_rows, prepared
from packing import damage
from torch import Tensor

from lit_transfer.config import Config
from lit_transfer.data import plan
from lit_transfer.data.samplers import TrainSampler
from lit_transfer.data.streams import Samples, open_streams
from lit_transfer.errors import UserError
from lit_transfer.phases.run import run_phases
from lit_transfer.reading import parse, to_plain

STEPS = 3
"""Of an epoch: 24 pictures, 8 at a time."""


class Killed(Exception):
    pass


class KilledAt(pl.Callback):
    """Ends a fit as if its process had died, after a step and what belongs to it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def config_of(folder: Path, allowed: int, of: int, task: str = "multiclass", **row: Any) -> Config:
    """A head trained on digits, of which some may be damaged; each step has a checkpoint."""
    phase = {"name": "head", "max_epochs": 2, "lr": 0.1, "optimizer": "sgd", "global_batch": 8} | row
    config = fine_tuning(digits(folder / "digits", task), folder, [phase], checkpoint={"every_steps": 1})
    limit = {"max_bad_fraction": (allowed + 0.5) / of}
    return parse(Config, to_plain(config) | {"data": to_plain(config)["data"] | limit})


def train(config: Config, *callbacks: pl.Callback) -> dict[str, Tensor]:
    """Run the phases; the weights that they end with."""
    job, plans = prepared(config)
    run_phases(job, plans, callbacks)
    return job.network.state_dict()


def killed_after(config: Config, step: int) -> None:
    with pytest.raises(Killed):
        train(config, KilledAt(step))


def test_what_an_epoch_has_met_counts_after_a_restart(tmp_path: Path) -> None:
    config = config_of(tmp_path, allowed=1, of=24, max_epochs=1)
    samples = open_streams(config.data, config.seed)["train"]
    order = TrainSampler(samples, seed=config.seed, global_batch=8, steps=range(STEPS)).epoch_rows(0)
    for row in (order[0], order[-1]):
        damage(samples.manifest, int(row))
    killed_after(config, 2)
    with pytest.raises(UserError, match=r"2 of the 24 samples of data\.train are damaged"):
        train(config)


def test_a_validation_after_a_restart_counts_for_itself(tmp_path: Path) -> None:
    """Its step in the fit is that of the validation before, in the fit that was killed."""
    config = config_of(tmp_path, allowed=1, of=12)
    val = open_streams(config.data, config.seed)["val"]
    damage(val.manifest, int(val.rows[3]))
    killed_after(config, STEPS)
    train(config)
    assert [int(row["step"]) for row in metric_rows(config) if row["val/loss"]] == [STEPS, 2 * STEPS]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_is_the_mean_over_the_labels_that_were_read(
    tmp_path: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as if the stand-ins of damaged samples, which have more labels than these, had been planned."""
    row = {"max_steps": 1, "max_epochs": None, "global_batch": 26, "accumulate": accumulate, "clip_norm": 100.0}
    config = config_of(tmp_path, allowed=10, of=26, task="multilabel", **row)
    samples = open_streams(config.data, config.seed)["train"]
    rows, count = samples.rows, samples.entries
    fewer = [int(row) for row in rows if count(np.array([row])) == 1]
    for row in fewer:
        damage(samples.manifest, row)
    used = {row: stand_in(samples, config.seed, row, fewer) for row in fewer}
    assert fewer and count(rows) + len(fewer) == count(np.array([used.get(int(row), int(row)) for row in rows]))

    weights = train(config)
    monkeypatch.setattr(Samples, "entries", lambda _, rows: count(rows) + len(fewer))
    planned = train(replace(config, name="planned"))
    assert all(torch.allclose(tensor, planned[name], rtol=1e-5, atol=1e-7) for name, tensor in weights.items())
    losses = [float(metric_rows(replace(config, name=name))[0]["train/loss"]) for name in ("tiny", "planned")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def stand_in(samples: Samples, seed: int, row: int, damaged: list[int]) -> int:
    """The sound sample that is read in the place of a damaged one."""
    tried = (plan.substitute(samples.rows, row, samples.manifest.digest, seed, 0, n) for n in range(1, 10))
    return next(found for found in tried if found not in damaged)
