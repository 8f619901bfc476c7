"""What of an earlier start a phase goes on from; the order of resuming stands in `run.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_transfer.config import Config
from lit_transfer.errors import require
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.steps import trained_of
from lit_transfer.phases.table import PhasePlan, fingerprint_hash


def finished(files: PhaseFiles, after: Sequence[str]) -> PhaseResult | None:
    """What became of a phase that is done; None if it is not. `after`: the names of the phases before it.

    Raises:
        UserError: it followed other phases than it would now, so its weights are no longer what the table says.
    """
    result = files.result()
    if result:
        require(
            result.after == list(after),
            f"phase '{result.name}' was trained after {result.after}, but now stands after {list(after)}; remove "
            f"{files.folder} to train it again, or put the phases back in their order.",
        )
    return result


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], origin: object) -> None:
    """Copy weights into a network; mutates it.

    Raises:
        UserError: they are those of another network; nothing is copied then.
    """
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (network.state_dict(), weights)]
    wrong = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    require(
        not wrong,
        f"{origin} holds the weights of another network ({len(wrong)} tensors differ, such as {', '.join(wrong[:3])}); "
        "put the model section back as it was, or choose another --name.",
    )
    network.load_state_dict(weights)


def read_checkpoint(
    record: Mapping[str, Any],
    config: Config,
    plan: PhasePlan,
    files: PhaseFiles,
    optimizer: torch.optim.Optimizer,
    before: Sequence[PhaseResult],
) -> dict[str, Any] | None:
    """What the phase goes on from; None where there is nothing, or what there is has no meaning under a changed plan.

    Raises:
        UserError: the checkpoint belongs to another run, or to settings that were not agreed to be changed.
    """
    saved = files.read_last()
    if saved is None:
        return None
    now = fingerprint_hash(record["fingerprint"])
    known = [now, *(fingerprint_hash(earlier["fingerprint"]) for earlier in record.get("earlier", []))]
    require(
        saved["identity"] in known,
        f"{files.last} is of a run with other settings; remove it, or choose another --name.",
    )
    if saved["identity"] != now:
        new = optimizer.state_dict()
        if saved["after"] != [result.name for result in before] or not _goes_on(saved, config, plan, new):
            print(f"phase {plan.phase.name} trains otherwise than before, and starts anew", flush=True)
            return None
        saved["optimizer"]["param_groups"] = new["param_groups"]  # or the weight decay would be that of before
        saved["reason"] = None  # it may be longer now
    if saved["step"] >= plan.max_steps and saved["reason"] is None:
        saved["reason"] = f"{plan.max_steps} steps were done already"
    return saved


def _goes_on(saved: dict[str, Any], config: Config, plan: PhasePlan, optimizer: dict[str, Any]) -> bool:
    """Whether the steps done so far are steps of the changed plan, too: same parameters, epochs and measures."""
    return (
        [(name, list(names)) for name, names in saved["trained"]] == trained_of(plan)
        and (saved["steps_per_epoch"], saved["global_batch"]) == (plan.steps_per_epoch, plan.phase.global_batch)
        and _settings(saved["optimizer"]) == _settings(optimizer)
        and (saved["ema"] is None) == (plan.phase.ema_decay is None)
        and (saved["watches"]["monitor"]["metric"] == config.monitor or not plan.phase.restore_best)
    )


def _settings(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What of an optimizer's groups must be as it was for its state to have a meaning."""
    return [{k: v for k, v in group.items() if k not in ("lr", "weight_decay")} for group in state["param_groups"]]
