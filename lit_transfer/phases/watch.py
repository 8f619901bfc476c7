"""What validation decides: whether a metric has improved, and whether a phase has reached its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_transfer.schedule import Until


def improves_downwards(metric: str) -> bool:
    """Whether smaller is better."""
    return metric.split("/")[-1] in ("loss", "mae", "rmse", "mse")


@dataclass
class Watch:
    """The best value of a metric so far, and the validations since.

    Args:
        metric: its name says whether smaller is better.
        min_delta: smallest change that counts as an improvement.
        best: None before the first validation.
        best_step: of the phase.
        waited: validations without an improvement.
    """

    metric: str
    min_delta: float = 0.0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    def see(self, value: float, step: int) -> bool:
        """Take the value of a validation; whether it is an improvement."""
        sign = -1 if improves_downwards(self.metric) else 1
        if self.best is None or sign * (value - self.best) > self.min_delta:
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "waited": self.waited}

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; where it watched another metric, start anew."""
        if state["metric"] == self.metric:
            self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]


def reason_to_end(until: Until, watch: Watch, value: float) -> str | None:
    """Why a phase ends after a validation that `watch` has seen; None if it goes on."""
    if until.patience is not None and watch.waited >= until.patience:
        return f"{until.metric} has not improved for {until.patience} validations"
    if until.below is not None and value < until.below:
        return f"{until.metric} {value:.4g} is below {until.below:g}"
    if until.above is not None and value > until.above:
        return f"{until.metric} {value:.4g} is above {until.above:g}"
    return None
