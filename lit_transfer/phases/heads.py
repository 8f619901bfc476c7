"""Heads trained on features in memory, by the loop of `head_loop.py`: when, and by which rank."""

from __future__ import annotations

import torch.distributed as dist

from lit_transfer.errors import UserError, require
from lit_transfer.model.module import Stopped, TransferModule
from lit_transfer.model.network import Network
from lit_transfer.phases.agreement import check_ranks_equal
from lit_transfer.phases.features import Features
from lit_transfer.phases.head_loop import HeadLoop
from lit_transfer.phases.rank_zero import FAILED, told
from lit_transfer.phases.resume import load_weights
from lit_transfer.phases.steps import Steps
from lit_transfer.schedule import Phase


def why_not_looped(phase: Phase, network: Network) -> str | None:
    """Why a phase cannot be trained on pooled features; None if it can. What trains must have been set."""
    if network.first_trained < len(network.backbone.stages):
        return "stages train, too"
    if phase.cutmix:
        return "cutmix cuts pictures"
    return "compile asks for a compiled head" if phase.compile else None


def require_features(phase: Phase, reason: str) -> None:
    """Refuse `heads` where the features of a phase are not in memory, for a reason."""
    require(
        phase.heads is None,
        f"phase '{phase.name}': heads trains on stored features, but they are not stored ({reason}); set "
        "activations.store to require, or remove heads.",
    )


def train_heads(module: TransferModule, steps: Steps, train: Features | None, val: Features | None) -> None:
    """Train a phase's head, or heads, from the step where it stands to the phase's end. Every rank must call it.

    Mutates the module's head, its optimizer and `steps`. Rank 0 trains alone; the others wait, and take what it saved:
    the result is that of one rank, and a signal must reach rank 0 to stop the run in time.

    Args:
        module: of the phase; its optimizer holds the state to go on from.
        steps: of the phase.
        train: features of the training stream; only rank 0 needs them.
        val: those of the validation stream, where there is one.

    Raises:
        LossNotFinite: before anything is saved that came of it.
        RanksDiffer: not all ranks hold what rank 0 has saved.
        Stopped: a signal came.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        (_lead if dist.get_rank() == 0 else _follow)(module, steps, train, val)
        device = next(module.network.parameters()).device
        check_ranks_equal(module.network.state_dict(), device, f"phase '{steps.plan.phase.name}'")
    else:
        assert train is not None
        HeadLoop(module, steps, train, val).run()


def _lead(module: TransferModule, steps: Steps, train: Features | None, val: Features | None) -> None:
    """Rank 0: train, and tell the others how it ends."""
    assert train is not None
    ended = FAILED
    try:
        HeadLoop(module, steps, train, val, beat=lambda: told("trains")).run()
        ended = "ended"
    except Stopped:
        ended = "stopped"
        raise
    except UserError as error:
        ended = str(error)
        raise
    finally:
        told(ended)


def _follow(module: TransferModule, steps: Steps, *_: object) -> None:
    """Another rank: wait for rank 0, and take what it saved."""
    steps.stop.install()
    while (ended := told("")) == "trains":
        pass
    if ended == "stopped":
        raise Stopped
    require(ended == "ended", ended)
    saved = steps.files.read_last()
    assert saved is not None, "a phase ends with a checkpoint"
    load_weights(module.network, saved["network"], steps.files.last)
    module.quarantine.go_on_from(saved["quarantine"])
    steps.go_on_from(saved)
