"""The learning-rate range test of a phase (Smith 2017, section 3.3): a few steps at rates that grow exponentially.

All rates of the phase grow together, in the ratio that its plan gives them; the rate of the head stands for them.
Everything else is as `run.py` trains the phase: weights, batches, augmentation, optimizer, clipping, norm, precision.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng

from lit_transfer.errors import require
from lit_transfer.model.module import LossNotFinite, Stopped, TransferModule
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.job import Setup
from lit_transfer.phases.optim import build_optimizer
from lit_transfer.phases.run import build_data, build_module, set_trained
from lit_transfer.phases.steps import StopSignal
from lit_transfer.phases.table import PhasePlan, differences
from lit_transfer.phases.trainer import PhaseBar, make_trainer
from lit_transfer.schedule import Phase
from lit_transfer.tracking import Run

MIN_STEPS = 20
"""Below, no line can be told from the noise of the batches."""

DIVERGED = 4.0
"""The test ends when the smoothed loss is this many times its lowest."""

MEMORY = 0.9
"""Of the moving average that smooths the loss: it looks back on about 10 steps."""


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw.

    Args:
        rates: of `axis` at each step that was done [N].
        losses: training loss of each step, before its update [N].
        axis: whose rate it is: `head`, or where the head does not train, the group with the largest rate.
        planned: the full rate of `axis` in the plan.
        steps: that were to be done; fewer were where the loss grew too large.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    axis: str
    planned: float
    steps: int

    @property
    def smoothed(self) -> list[float]:
        """The losses, smoothed [N]."""
        return smooth(self.losses)

    @property
    def lowest(self) -> int:
        """The step of the lowest smoothed loss, the first tenth left out: there it is no average yet."""
        settled = min(self.steps // 10, len(self.losses) - 1)
        return settled + int(np.argmin(self.smoothed[settled:]))

    @property
    def suggested(self) -> int | None:
        """The step with the rate to take; None where the loss does not clearly fall anywhere. See `steepest`."""
        return steepest(self.rates, self.losses, width=max(MIN_STEPS // 4, self.steps // 6), last=self.lowest)


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start at zero (Kingma & Ba 2015, section 3)."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = MEMORY * average + (1 - MEMORY) * loss
        smoothed.append(average / (1 - MEMORY**count))
    return smoothed


def steepest(rates: Sequence[float], losses: Sequence[float], width: int, last: int) -> int | None:
    """Where the loss falls fastest against the logarithm of the rate: Gugger's (2018) reading of a range test.

    A least-squares line is laid through each `width` neighbouring steps; the result is the middle of the one that
    falls fastest, among those centred at step `last` or before whose slope is over three times its standard error.

    Args:
        rates: geometric [N].
        losses: of the steps, not smoothed: an average that looks back would move the fall to higher rates [N].
        width: steps of a window, at least 3.
        last: the last step at which a window may be centred.
    """
    if len(losses) < width:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(losses), width)[: max(0, last - width // 2 + 1)]
    x = (np.arange(width) - (width - 1) / 2) * np.log10(rates[1] / rates[0])
    slopes = windows @ x / (x @ x)
    residuals = windows - windows.mean(1, keepdims=True) - slopes[:, None] * x
    errors = np.sqrt((residuals**2).sum(1) / (width - 2) / (x @ x))
    falls = np.where(slopes < -3 * errors, slopes, 0.0)
    return int(np.argmin(falls)) + width // 2 if falls.any() else None


def growing_rates(low: float, high: float, steps: int) -> list[float]:
    """Rates from `low` to `high`, each the same factor above the one before.

    Raises:
        UserError: too few steps, or rates that are not positive or do not rise.
    """
    require(steps >= MIN_STEPS, f"--steps {steps} is under {MIN_STEPS}, too few to see a trend; 100 is usual.")
    require(
        0 < low < high < float("inf"),
        f"--from {low:g} and --to {high:g} are no range; give two rates above 0, the lower one first.",
    )
    return [float(rate) for rate in np.geomspace(low, high, steps)]


def results_before(run_dir: Path, earlier: Sequence[PhasePlan], marks: dict[str, Any]) -> list[PhaseResult]:
    """What became of the phases before the one that is tested; the run directory is only read.

    Args:
        run_dir: of the run that trained them.
        earlier: those phases.
        marks: the fingerprint of the present config with just these phases.

    Raises:
        UserError: one of them is not finished there, or was trained under other settings.
    """
    if not earlier:
        return []
    record = run_dir / "run.json"
    run = Run(run_dir, json.loads(record.read_text()) if record.is_file() else {}, resumed=True)
    found = {plan.phase.name: PhaseFiles(run.checkpoints(plan.phase.name)).result() for plan in earlier}
    missing = [name for name, result in found.items() if result is None]
    require(
        not missing,
        f"phase '{''.join(missing[:1])}' is not finished in {run_dir}, so the weights that a later one begins with "
        f"do not exist yet; train until then with lit-transfer train, or test phase '{earlier[0].phase.name}'.",
    )
    trained = run.record["fingerprint"]
    kept = trained | {"phases": trained["phases"][: len(earlier)]}
    changed = differences(kept, json.loads(json.dumps(marks)))
    require(
        not changed,
        f"{run_dir} holds earlier phases of other settings ({'; '.join(changed[:8])}); only the tested phase and "
        "later ones may differ: take the changes back, or train under another --name.",
    )
    return [result for result in found.values() if result is not None]


def load_weights_before(setup: Setup, run_dir: Path, before: Sequence[PhaseResult]) -> None:
    """Give the network the weights that the last of the phases `before` ended with; mutates it."""
    if before:
        files = PhaseFiles(run_dir / "checkpoints" / before[-1].name)
        setup.network.load_state_dict(files.read_final())


def range_test(setup: Setup, plan: PhasePlan, before: Sequence[PhaseResult], rates: Sequence[float]) -> RangeTest:
    """Train a copy of the network for a step at each rate; every rank must call it, and gets the same.

    The network, files and the global random state stay as they are.

    Args:
        setup: its network has the weights that the phase begins with.
        plan: of the phase.
        before: the phases before it, which decide its batches and random numbers.
        rates: geometric, of the head (see `RangeTest.axis`).

    Raises:
        Stopped: a signal came.
        UserError: the first loss is no number.
    """
    setup = replace(setup, network=copy.deepcopy(setup.network))
    set_trained(setup, plan)
    optimizer = build_optimizer(setup.network, plan)
    sweep, config = RateSweep(plan, rates), setup.config.trainer
    trainer = make_trainer(
        config,
        max_epochs=1,
        accumulate_grad_batches=plan.phase.accumulate,
        gradient_clip_val=plan.phase.clip_norm,
        callbacks=[*([PhaseBar(plan.phase.name)] if config.progress else []), sweep],
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_progress_bar=config.progress,
    )
    module = build_module(setup, plan, optimizer, sum(result.steps for result in before), sweep.requests)
    with isolate_rng(), suppress(LossNotFinite):
        trainer.fit(module, datamodule=build_data(setup, plan, range(len(rates)), before))
    done = len(sweep.losses)
    require(
        done > 0,
        f"the loss is no number at the first step, at rate {rates[0]:g}; use trainer.precision 32, or other weights.",
    )
    axis, planned = axis_of(plan)
    return RangeTest(tuple(rates[:done]), tuple(sweep.losses), axis, planned, len(rates))


class RateSweep(pl.Callback):
    """Gives each step of a fit its rates, keeps the losses, and ends the fit when they grow too large."""

    def __init__(self, plan: PhasePlan, rates: Sequence[float]) -> None:
        self.parts = plan.phase.accumulate
        self.rates = rates
        self.ratios = {group.name: group.lr / axis_of(plan)[1] for group in plan.groups}
        self.losses: list[float] = []
        self.stop = StopSignal()

    def requests(self) -> tuple[bool]:
        """Whether this rank was asked to stop."""
        return (self.stop(),)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A signal is heeded at the next step."""
        self.stop.install()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rates of the step."""
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rates[len(self.losses)] * self.ratios[group["name"]]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last part of a step: keep its loss, which is the same on every rank."""
        assert isinstance(pl_module, TransferModule)
        if (batch_idx + 1) % self.parts:
            return
        if pl_module.agreed[0]:
            raise Stopped
        self.losses.append(pl_module.train_loss)
        settled = smooth(self.losses)[len(self.rates) // 10 :]
        trainer.should_stop = bool(settled) and settled[-1] > DIVERGED * min(settled)


def axis_of(plan: PhasePlan) -> tuple[str, float]:
    """Whose rate stands for all of a phase, and that rate: the head's, or where it does not train, the largest."""
    head = [group.lr for group in plan.groups if any(name.startswith("head.") for name in group.parameters)]
    largest = max(plan.groups, key=lambda group: group.lr)
    return ("head", max(head)) if head else (largest.rate_name, largest.lr)


def config_rates(phase: Phase, factor: float) -> dict[str, float]:
    """The rates that a phase's config gives, times a factor: `lr` and `backbone_lr`, or those of its patterns."""
    given = {"lr": phase.head_lr, "backbone_lr": phase.backbone_lr} | (phase.patterns or {})
    return {key: rate * factor for key, rate in given.items() if rate is not None}
