"""The loop over stored features against a bare loop over the same tensors, and 16 heads at once against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from store_job import Row, job_of, library_of, ratio_of, run_phase, seconds_of, spread
from torch import Tensor, nn

from lit_transfer.phases.features import in_memory
from lit_transfer.phases.job import Job

EPOCHS = 20
HEADS = {"lr": [1e-3, 2e-3, 5e-3, 1e-2], "weight_decay": [0.0, 0.01, 0.05, 0.1]}
ONE: Row = {"name": "head", "lr": 5e-3, "schedule": "warmup_cosine"}
SIXTEEN: Row = ONE | {"lr": None, "weight_decay": 0.0, "heads": HEADS}


def stored_epoch_s(row: Row, folder: Path, fraction: float, steps_per_epoch: int) -> float:
    """Seconds of the training steps of an epoch by our loop; validated once, which is not counted."""
    total = EPOCHS * steps_per_epoch
    row = row | {"max_epochs": EPOCHS, "validate_every_steps": total}
    job, plans = job_of(row, folder, "require", fraction=fraction)
    assert plans[0].steps_per_epoch == steps_per_epoch
    return run_phase(job, plans, warm_up=steps_per_epoch)[1] * steps_per_epoch


def bare_epoch_s(features: Tensor, targets: Tensor, head: nn.Module, batch: int, smoothing: float) -> float:
    """Seconds of an epoch of a loop as short as it can be: one rate, no curves, no checks, nothing left."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3, weight_decay=0.05)

    def epochs(count: int) -> None:
        for _ in range(count):
            order = torch.randperm(len(features), device=features.device)
            inputs, labels = features[order].float(), targets[order]
            for first in range(0, len(features), batch):
                logits = head(inputs[first : first + batch])
                loss = F.cross_entropy(logits, labels[first : first + batch], label_smoothing=smoothing)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()

    epochs(1)
    return seconds_of(lambda: epochs(EPOCHS - 1)) / (EPOCHS - 1)


def features_of(job: Job) -> tuple[Tensor, Tensor]:
    """Features [N, F] and targets [N] of training, on the device, built in the store where they are not there."""
    library = library_of(job, job.config.data.workers)
    cut = len(library.backbone.stages)
    recipe = library.recipe([cut]) or library.new_recipe([cut])
    library.fill([cut], recipe, share=(0, 1), progress=False)
    held = in_memory(library.streams(cut, recipe), library.device)
    assert held is not None, "they fit into memory"
    return held["train"].views[0], held["train"].samples.labels.to(library.device)


def compare_loops(folder: Path, pairs: int, fraction: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Ratios of our loop to the bare one and of 16 heads to one, and what was measured."""
    job, plans = job_of(ONE | {"max_epochs": 1}, folder, "require", fraction=fraction)
    features, targets = features_of(job)
    batch, steps = plans[0].phase.global_batch, plans[0].steps_per_epoch
    found: dict[str, list[float]] = {"bare": [], "ours": [], "16_heads": []}
    for pair in range(pairs + 1):  # the first is a warm-up
        times = {
            "bare": bare_epoch_s(features, targets, job.network.head, batch, job.config.objective.label_smoothing),
            "ours": stored_epoch_s(ONE, folder, fraction, steps),
            "16_heads": stored_epoch_s(SIXTEEN, folder, fraction, steps),
        }
        for name, seconds in times.items():
            found[name] += [seconds] if pair else []
    ratios = {
        "loop_over_bare": ratio_of(found["ours"], found["bare"]),
        "heads_16_over_1": ratio_of(found["16_heads"], found["ours"]),
    }
    about = {"samples": len(features), "batch": batch, "steps": steps, "features": features.shape[1]}
    return ratios, about | {f"{name}_epoch_s": spread(seconds) for name, seconds in found.items()}
