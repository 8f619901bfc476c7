"""Presets that follow a published rule, against that rule written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
from layouts import NETWORKS, STAGES, config, real

from lit_transfer.phases.optim import lr_at
from lit_transfer.phases.presets import expand
from lit_transfer.phases.table import resolve


def fastai_rule(
    step: int, steps: int, groups: int, *, lr: float, lr_mult: float, div: float, pct_start: float
) -> list[float]:
    """fastai's one-cycle over groups whose peaks rise in equal ratios: a half cosine up, then one down to 1e-5."""
    position = step / steps
    start, end = (1 / div, 1.0) if position < pct_start else (1.0, 1e-5)
    done = position / pct_start if position < pct_start else (position - pct_start) / (1 - pct_start)
    factor = start + (1 + math.cos(math.pi * (1 - done))) * (end - start) / 2
    lowest = lr / lr_mult
    return [lowest * (lr / lowest) ** (index / max(groups - 1, 1)) * factor for index in range(groups)]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 3},
        {"epochs": 2, "base_lr": 1e-2, "freeze_epochs": 3, "lr_mult": 10, "pct_start": 0.5, "div": 25},
        {"epochs": 1, "lr_mult": 1, "div": 1},
    ],
)
def test_fastai_has_the_rates_of_fine_tune_at_every_step(network: str, settings: dict[str, Any]) -> None:
    layout = real(network)
    given = {"base_lr": 2e-3, "freeze_epochs": 1, "lr_mult": 100, "pct_start": 0.3, "div": 5} | settings
    head, thaw = resolve(config({"preset": "fastai"} | settings), layout, samples=1000)
    base_lr, lr_mult, steps = given["base_lr"], given["lr_mult"], 16  # of an epoch of 1000 in batches of 64
    assert (head.max_steps, thaw.max_steps) == (given["freeze_epochs"] * steps, given["epochs"] * steps)
    for step in range(head.max_steps):
        expected = fastai_rule(step, head.max_steps, 1, lr=base_lr, lr_mult=1, div=25, pct_start=0.99)
        assert lr_at(head, step) == pytest.approx({"head": expected[0]}, rel=1e-9)
    parts = [*layout.stages, "head"]
    shape = {"lr": base_lr / 2, "lr_mult": lr_mult, "div": given["div"], "pct_start": given["pct_start"]}
    for step in range(thaw.max_steps):
        rates = lr_at(thaw, step)
        found = [rates["backbone" if lr_mult == 1 and part != "head" else part] for part in parts]
        assert found == pytest.approx(fastai_rule(step, thaw.max_steps, len(parts), **shape), rel=1e-9), step


def test_fastai_has_its_optimizer() -> None:
    for phase in expand(config({"preset": "fastai", "epochs": 2}), STAGES, None):
        assert (phase.optimizer, phase.weight_decay, phase.global_batch) == ("adamw", 0.01, 64)
        assert phase.optimizer_args == {"betas": [0.9, 0.99], "eps": 1e-5}


BIT = config({"preset": "bit"})
BIT_MARKS = {
    1: [100, 200, 300, 400, 500],
    19_999: [100, 200, 300, 400, 500],
    20_000: [500, 3000, 6000, 9000, 10_000],
    499_999: [500, 3000, 6000, 9000, 10_000],
    500_000: [500, 6000, 12_000, 18_000, 20_000],
    10**7: [500, 6000, 12_000, 18_000, 20_000],
}
"""BiT-HyperRule by samples: the end of the warm-up, the steps after which the rate is divided by ten, and the end."""


@pytest.mark.parametrize("samples", BIT_MARKS)
def test_bit_has_the_rates_of_the_hyperrule_at_every_step(samples: int) -> None:
    warmup, *drops, end = BIT_MARKS[samples]
    (plan,) = resolve(BIT, real("timm/test_efficientnet"), samples)
    assert plan.max_steps == end
    for step in range(end):
        rate = 0.003 * step / warmup if step < warmup else 0.003 * 10.0 ** -sum(step > drop for drop in drops)
        assert lr_at(plan, step) == pytest.approx({"backbone": rate, "head": rate}, rel=1e-9), step


@pytest.mark.parametrize("samples", BIT_MARKS)
def test_bit_has_the_batch_the_mixup_and_the_optimizer_of_the_hyperrule(samples: int) -> None:
    (phase,) = expand(BIT, STAGES, samples)
    assert phase.mixup == (0.0 if samples < 20_000 else 0.1)
    assert (phase.optimizer, phase.momentum, phase.weight_decay, phase.global_batch) == ("sgd", 0.9, 0.0, 512)
