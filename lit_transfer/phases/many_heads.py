"""Many heads of a phase at once (`Phase.heads`): which there are, which leads, and what is told of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lit_transfer.files import write_json
from lit_transfer.model.ema import Ema
from lit_transfer.model.heads import build_head
from lit_transfer.model.module import TransferModule
from lit_transfer.phases.optim import divide_gradients, lr_factor
from lit_transfer.phases.stacked import StackedOptimizer, stack
from lit_transfer.phases.steps import Steps
from lit_transfer.phases.validation import Validation
from lit_transfer.phases.watch import improves_downwards

FILE_NAME = "heads.json"
SHOWN = 10
"""Heads that are printed at a phase's end, the best ones; all are in `heads.json`."""


class ManyHeads:
    """The heads of a phase side by side; the best at a validation leads: it is put into the network.

    Their state is `steps.heads`, which every checkpoint holds. The phase's own optimizer only shows the largest
    learning rate, and the phase's own average of weights is the leader's.

    Args:
        module: of the phase; its head says the shape, and where no seeds are given how all begin.
        steps: of the phase.
    """

    def __init__(self, module: TransferModule, steps: Steps) -> None:
        self.module, self.steps, phase = module, steps, steps.plan.phase
        self.settings = phase.head_settings
        self.copies = len(self.settings)
        self.head = module.network.head
        assert isinstance(self.head, nn.Sequential)
        self.stacked = stack(self.head, [self._first_weights(setting.seed) for setting in self.settings])
        self.stacked.to(next(self.head.parameters()).device)
        self.ema = Ema(self.stacked, phase.ema_decay) if phase.ema_decay is not None else None
        self.lr = torch.tensor([setting.lr for setting in self.settings], dtype=torch.float64)
        decaying = [name for group in steps.plan.groups if group.name.endswith("/decay") for name in group.parameters]
        self.optimizer = StackedOptimizer(
            dict(self.stacked.named_parameters()),
            phase,
            [setting.weight_decay for setting in self.settings],
            [name.removeprefix("head.") for name in decaying],
        )
        unknown = torch.full((self.copies,), math.nan, dtype=torch.float64)
        steps_of_best = torch.zeros(self.copies, dtype=torch.int64)
        self.seen = {"last": unknown, "best": unknown.clone(), "best_step": steps_of_best}  # values of `monitor`
        self._validated: tuple[Validation, Tensor] | None = None
        if steps.heads is not None:
            self._go_on_from(steps.heads)
        steps.heads = self._state()

    @property
    def leader(self) -> int:
        """Place of the head that was best at the last validation; the first one before any."""
        return self._order("last")[0]

    def logits(self, features: Tensor) -> Tensor:
        """Features [B, F] -> [B * n, O]."""
        return self.stacked(features).flatten(0, 1)  # type: ignore[no-any-return]

    def update(self, read_share: float) -> None:
        """One update of every head, at its learning rate of this step."""
        divide_gradients(self.optimizer.parameters.values(), read_share)
        plan, step = self.steps.plan, self.steps.step
        self.optimizer.step(self.lr * lr_factor(plan.phase, step, plan.max_steps, self.steps.drops), step + 1)
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update()

    def validate(self, validation: Validation) -> dict[str, float]:
        """Measure all heads, and put the best one into the network; its metrics."""
        self.stacked.eval()
        if self.ema:
            self.ema.swap()
        logits = validation.logits(self.stacked)
        self._see(self._monitored(validation, logits))
        self._lead()
        if self.ema:
            self.ema.swap()
        self.stacked.train()
        self._validated = validation, logits
        return validation.metrics(logits[:, self.leader])

    def finish(self) -> None:
        """Write what became of each head to `heads.json`, and print the best."""
        assert self._validated, "the last step is validated"
        validation, logits = self._validated
        metric = self.steps.config.monitor
        best = self.steps.plan.phase.restore_best
        order = self._order("best" if best else "last")
        rows = [
            {**asdict(setting), **validation.metrics(logits[:, place]), "best": value, "best_step": step}
            | {"goes_on": place == order[0]}
            for place, (setting, value, step) in enumerate(
                zip(self.settings, self.seen["best"].tolist(), self.seen["best_step"].tolist(), strict=True)
            )
        ]
        write_json(self.steps.files.folder / FILE_NAME, {"monitor": metric, "heads": rows})
        print(_table(self.steps.plan.phase.name, metric, [rows[place] for place in order]), flush=True)

    def _first_weights(self, seed: int | None) -> Mapping[str, Tensor]:
        if seed is None:
            return self.head.state_dict()
        outputs, features = self.head.get_submodule("logits").out_features, self.module.network.backbone.features
        assert isinstance(outputs, int)
        return build_head(self.steps.config.model.head, features, outputs, seed).state_dict()

    def _monitored(self, validation: Validation, logits: Tensor) -> Tensor:
        """The value of `monitor` for each head [n]."""
        metric = self.steps.config.monitor
        if metric == "val/loss":  # the others are made head by head, which takes longer than an epoch of training
            return validation.losses(logits).double()
        return torch.tensor([validation.metrics(each)[metric] for each in logits.unbind(1)], dtype=torch.float64)

    def _see(self, values: Tensor) -> None:
        better = self._cost(values) < self._cost(self.seen["best"])
        self.seen["last"].copy_(values)
        self.seen["best"][better] = values[better]
        self.seen["best_step"][better] = self.steps.step

    @torch.no_grad()
    def _lead(self) -> None:
        """Put the leader into the network; mutates it. With averages the network gets the average, and `steps.ema` the
        weights, as they are exchanged while a phase is validated.
        """
        own = self.steps.ema.weights if self.steps.ema else {}
        for name, parameter in self.head.named_parameters():
            parameter.copy_(self.stacked.get_parameter(name)[self.leader])
            if self.ema:
                own[f"head.{name}"].copy_(self.ema.weights[name][self.leader])

    def _order(self, when: str) -> list[int]:
        """Places of the heads, the best by `monitor` first; of equal ones the one that was so earlier."""
        costs, steps = self._cost(self.seen[when]).tolist(), self.seen["best_step"].tolist()
        return sorted(range(self.copies), key=lambda place: (costs[place], steps[place], place))

    def _cost(self, values: Tensor) -> Tensor:
        """Smaller is better; infinite where a head has failed, or was not measured."""
        sign = 1.0 if improves_downwards(self.steps.config.monitor) else -1.0
        return (sign * values).nan_to_num(math.inf, math.inf, -math.inf)

    def _state(self) -> dict[str, Any]:
        """All that going on needs, for a checkpoint: the tensors themselves, which training mutates."""
        return {
            "weights": {name: parameter.detach() for name, parameter in self.stacked.named_parameters()},
            "moments": self.optimizer.moments,
            "averages": self.ema.weights if self.ema else {},
            "monitor": self.steps.config.monitor,
            "seen": self.seen,
        }

    def _go_on_from(self, state: Mapping[str, Any]) -> None:
        own = self._state()
        groups = ["weights", "moments", "averages", *(["seen"] if state["monitor"] == own["monitor"] else [])]
        for group in groups:
            assert own[group].keys() == state[group].keys(), "heads of another kind"
            for name, tensor in own[group].items():
                tensor.copy_(state[group][name])


def _table(phase: str, metric: str, rows: list[dict[str, Any]]) -> str:
    """The best heads as plain text, the one that goes on marked."""
    head = f"  {'lr':>9} {'weight_decay':>12} {'seed':>6} {metric:>20} {'best':>10} {'at step':>8}"
    lines = [
        f"{'*' if row['goes_on'] else ' '} {row['lr']:>9g} {row['weight_decay']:>12g} "
        f"{'-' if row['seed'] is None else row['seed']:>6} {row[metric]:>20.4g} {row['best']:>10.4g} "
        f"{row['best_step']:>8}"
        for row in rows[:SHOWN]
    ]
    left = f", the best {SHOWN}" if len(rows) > SHOWN else ""
    return "\n".join([f"phase {phase}: {len(rows)} heads by {metric}{left}; all stand in {FILE_NAME}", head, *lines])
