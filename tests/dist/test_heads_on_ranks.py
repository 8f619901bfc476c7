"""Heads on features in memory with two ranks: the first trains alone, and both end alike, however it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits import digits
from loops import config_of, features_of, train
from torch.multiprocessing.spawn import spawn

from lit_transfer.data.manifest import Manifest
from lit_transfer.errors import UserError
from lit_transfer.launch.train import prepare_setup
from lit_transfer.model.ema import Ema
from lit_transfer.model.module import Stopped
from lit_transfer.phases import rank_zero
from lit_transfer.phases.checkpoint import PhaseFiles
from lit_transfer.phases.heads import train_heads
from lit_transfer.phases.optim import build_optimizer
from lit_transfer.phases.run import build_module, set_trained
from lit_transfer.phases.steps import Steps, StopSignal
from lit_transfer.tracking import MetricsFile, Recorder

ROWS: dict[str, dict[str, Any]] = {
    "ended": {"ema_decay": 0.5, "schedule": "warmup_cosine"},
    "many": {"lr": None, "heads": {"lr": [0.1, 0.01]}, "ema_decay": 0.5},
    "stopped": {},
    "failed": {"optimizer": "sgd", "lr": 1e38},
}


class Signalled(StopSignal):
    """A signal has come."""

    def __call__(self) -> bool:
        return True


def phase_on_a_rank(rank: int, folder: Path, data: Path, name: str) -> dict[str, Any]:
    """Train a phase by itself on this rank; what it ends with."""
    config = config_of(Manifest.open(str(data)), folder, ROWS[name], name=name)
    setup, (plan,) = prepare_setup(config)
    set_trained(setup, plan)
    recorder = Recorder(
        MetricsFile(config.run_dir / f"metrics-{rank}.csv"),
        None,
        phase=name,
        first_epoch=0,
        first_step=0,
        samples=len(setup.streams["train"].rows),
        global_batch=plan.phase.global_batch,
        steps_per_epoch=plan.steps_per_epoch,
        log_every_steps=50,
    )
    stop = Signalled() if name == "stopped" and rank == 0 else StopSignal()
    steps = Steps(plan, config, PhaseFiles(config.run_dir / "head"), recorder, stop, "id", [])
    if plan.phase.ema_decay:
        steps.ema = Ema(setup.network, plan.phase.ema_decay)
    module = build_module(setup, plan, build_optimizer(setup.network, plan), 0, steps.requests)
    ended = ""
    try:
        train_heads(module, steps, *((features_of(setup, s) for s in ("train", "val")) if rank == 0 else (None, None)))
    except (Stopped, UserError) as error:
        ended = f"{type(error).__name__}: {error}"
    averages = steps.ema.weights if steps.ema else {}
    place = {"step": steps.step, "reason": steps.reason, "best_step": steps.monitor.best_step}
    return {"ended": ended, "weights": setup.network.head.state_dict(), "averages": averages} | place


def on_a_rank(rank: int, folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    rank_zero.BEAT_S = 0.0
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: phase_on_a_rank(rank, folder, data, name) for name in ROWS}, folder / f"left-{rank}.pt")
    dist.destroy_process_group()


def test_the_first_rank_trains_and_the_others_take_what_it_saved(tmp_path: Path) -> None:
    manifest = digits(tmp_path / "digits")
    spawn(on_a_rank, (tmp_path, manifest.path), nprocs=2)
    first, second = (torch.load(tmp_path / f"left-{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ("ended", "many"):
        for key in ("step", "reason", "best_step", "ended"):
            assert first[name][key] == second[name][key]
        assert first[name]["reason"] == "max_epochs 3 reached"
        for group in ("weights", "averages"):
            for tensor_name, tensor in first[name][group].items():
                assert torch.equal(tensor, second[name][group][tensor_name])
        assert first[name]["averages"]
        assert not (tmp_path / name / "metrics-1.csv").exists(), "one writer"
    assert first["stopped"]["ended"] == second["stopped"]["ended"] == "Stopped: "
    assert first["failed"]["ended"].startswith("LossNotFinite: train/loss is")
    assert second["failed"]["ended"] == first["failed"]["ended"].replace("LossNotFinite", "UserError")
    alone = train(config_of(manifest, tmp_path, ROWS["ended"], name="alone"), loop=True)
    for tensor_name, tensor in first["ended"]["averages"].items():
        assert torch.equal(tensor, alone.final[tensor_name]), "the result of one rank"
