"""What a training step adds up to: parts, ranks, padding, mixed targets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from one_step import CLASSES, PLAIN, ROWS, Linear, batch_of, gradient, made, whole
from torch import Tensor, nn

from lit_transfer.config import Augment
from lit_transfer.data.plan import PADDING, slice_of
from lit_transfer.model import module as module_file
from lit_transfer.model.augment import eval_input, mix
from lit_transfer.model.module import LossNotFinite, TransferModule
from lit_transfer.model.network import Network
from lit_transfer.objectives.losses import loss_rows
from lit_transfer.phases.job import Setup
from lit_transfer.phases.run import build_module
from lit_transfer.phases.table import PhasePlan
from lit_transfer.recipe import Objective
from lit_transfer.schedule import Phase


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_and_ranks_together_give_the_gradient_of_the_mean(
    parts: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 rows divide by none of them, so there is padding; 4 parts for 3 ranks even leave ranks without a row."""
    expected = made()
    values, _ = loss_rows(
        "multiclass", expected(eval_input(whole()["image"], PLAIN)), whole()["target"], Objective(), None
    )
    mean = (values * whole()["weight"]).sum() / ROWS
    torch.autograd.backward(mean)

    module = made(world_size=ranks, parts=parts)
    monkeypatch.setattr(module, "_all_reduce", lambda tensor: tensor)
    rows, losses = np.arange(ROWS), []
    for rank in range(ranks):
        for part in range(parts):
            mine = slice_of(slice_of(rows, part, parts), rank, ranks)
            loss = module.training_step(batch_of(mine, ROWS), part)
            torch.autograd.backward(loss / parts / ranks)  # as Lightning and DDP divide
        losses.append(module.train_loss)
    assert torch.allclose(gradient(module), gradient(expected), atol=1e-6)
    assert sum(losses) == pytest.approx(mean.item(), rel=1e-5), "each rank has the part of the loss that it saw"


def test_the_loss_of_a_step_starts_anew() -> None:
    module = made(parts=2)
    losses = []
    for _ in range(2):
        for part in range(2):
            module.training_step(batch_of(slice_of(np.arange(ROWS), part, 2), ROWS), part)
        losses.append(module.train_loss)
    assert losses[0] == losses[1]


def test_a_padded_row_counts_nothing() -> None:
    module = made()
    rows = np.array([4, 5, PADDING])
    padded, bare = batch_of(rows, 2), batch_of(rows[:2], 2)
    assert torch.equal(module.training_step(padded, 0), module.training_step(bare, 0))
    logits = torch.randn(3, CLASSES)
    assert [rows[2] for rows in module._loss_of(logits, padded, 0.5)] == [0, 0]


@pytest.mark.parametrize("own", [0.0, 0.3, 1.0])
def test_the_loss_of_mixed_pictures_is_that_of_both_targets(own: float) -> None:
    module, batch = made(), whole()
    logits = torch.randn(ROWS, CLASSES)
    plain = nn.functional.cross_entropy(logits, batch["target"], reduction="none") * batch["weight"]
    before = [ROWS - 1, *range(ROWS - 1)]
    target, weight = batch["target"][before], batch["weight"][before]
    other = nn.functional.cross_entropy(logits, target, reduction="none") * weight
    assert torch.allclose(module._loss_of(logits, batch, own)[0], own * plain + (1 - own) * other)


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_a_step_mixes_pictures_and_targets_alike(settings: dict[str, Any]) -> None:
    module, batch = made(**settings), whole()
    module.on_train_batch_start(batch, 0)
    loss = module.training_step(batch, 0)
    module.on_train_batch_start(batch, 0)
    images, own = mix(eval_input(batch["image"], PLAIN), settings.get("mixup", 0.0), settings.get("cutmix", 0.0))
    assert 0 < own < 1
    assert torch.allclose(loss, module._loss_of(module(images), batch, own)[0].sum() / ROWS)
    assert not torch.allclose(loss, made().training_step(batch, 0))


def test_what_is_random_depends_on_the_seed_the_step_the_part_and_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(batch_idx: int = 0, rank: int = 0, global_step: int = 0, **settings: int) -> float:
        module = made(**settings)
        trainer = SimpleNamespace(world_size=1, global_step=global_step, global_rank=rank)
        module._trainer = cast(Any, trainer)
        module.on_train_batch_start({}, batch_idx)
        return float(torch.rand(()))

    different = [drawn(), drawn(seed=1), drawn(first_step=1), drawn(rank=1), drawn(batch_idx=1, parts=2)]
    assert len(set(different)) == len(different)
    assert drawn(global_step=3, first_step=2) == drawn(first_step=5), "of the run, wherever a fit began"
    assert drawn(batch_idx=2, parts=2) == drawn(parts=2), "the first part of a step"


def test_a_loss_that_is_not_finite_is_one_sentence() -> None:
    module = made(first_step=7)
    nn.init.constant_(module.get_parameter("network.layer.weight"), float("inf"))
    with pytest.raises(LossNotFinite, match=r"train/loss is nan at step 7; lower the phase's learning rates"):
        module.training_step(whole(), 0)


def test_what_ranks_ask_for_is_agreed_on_at_every_step() -> None:
    asked = [False, True, False]
    module = made(requests=lambda: asked)
    module.training_step(whole(), 0)
    assert module.agreed == [False, True, False]
    asked[1] = False
    module.training_step(whole(), 0)
    assert module.agreed == [False, False, False]


def norms_of_ranks(ranks: int) -> list[nn.ModuleDict]:
    """A network of each rank: two layers that train, one that is frozen."""
    return [
        nn.ModuleDict({"a": nn.BatchNorm1d(3), "frozen": nn.BatchNorm1d(2).eval(), "b": nn.BatchNorm1d(4)})
        for _ in range(ranks)
    ]


def share(networks: Sequence[nn.ModuleDict], monkeypatch: pytest.MonkeyPatch, norm: str = "batch") -> None:
    """As ranks would, each in a thread; sums are in place, as those of torch.distributed."""
    barrier, told = threading.Barrier(len(networks), timeout=20), {}

    def all_reduce(module: TransferModule, tensor: Tensor) -> Tensor:
        told[id(module)] = tensor.clone()
        barrier.wait()
        total = torch.stack(list(told.values())).sum(0)
        barrier.wait()
        return tensor.copy_(total)

    monkeypatch.setattr(TransferModule, "_all_reduce", all_reduce)
    modules = [made(world_size=len(networks)) for _ in networks]
    for module, network in zip(modules, networks, strict=True):
        network.norm = cast(Any, norm)
        module.network = cast(Network, network)
    with ThreadPoolExecutor(len(networks)) as pool:
        list(pool.map(TransferModule.share_running_statistics, modules))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (100.0, 1e-2), (-100.0, 1e-2)])
def test_running_statistics_become_those_of_the_ranks_union(
    ranks: int, mean: float, deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = norms_of_ranks(ranks)
    noise = torch.Generator().manual_seed(0)
    union: dict[str, Tensor] = {}
    for name in ("a", "b"):
        size = networks[0][name].num_features
        rows = mean + deviation * torch.randn(ranks, 50, size, generator=noise, dtype=torch.float64)
        rows += deviation * torch.arange(ranks)[:, None, None]  # or all ranks would have the same mean
        union[name] = rows.flatten(0, 1)
        for network, own in zip(networks, rows, strict=True):
            network[name].running_mean.copy_(own.mean(0))
            network[name].running_var.copy_(own.var(0, correction=0))
    share(networks, monkeypatch)
    for name, rows in union.items():
        for network in networks:
            layer = network[name]
            assert torch.equal(layer.running_mean, networks[0][name].running_mean)
            assert torch.equal(layer.running_var, networks[0][name].running_var)
        torch.testing.assert_close(layer.running_mean.double(), rows.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), rows.var(0, correction=0), rtol=0.01, atol=0.0)


def test_equal_statistics_with_large_means_keep_their_small_variances(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = norms_of_ranks(2)
    for network in networks:
        network["a"].running_mean.fill_(100.0)
        network["a"].running_var.fill_(1e-4)
    share(networks, monkeypatch)
    assert torch.allclose(networks[1]["a"].running_var, torch.tensor(1e-4), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("norm", ["batch", "pretrained"])
def test_statistics_that_do_not_move_are_not_shared(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = norms_of_ranks(2)
    for rank, network in enumerate(networks):
        for layer in network.values():
            layer.running_mean.fill_(rank)
    share(networks, monkeypatch, norm)
    kept = ("a", "frozen", "b") if norm == "pretrained" else ("frozen",)
    for name in networks[0]:
        means = [float(network[name].running_mean[0]) for network in networks]
        assert means == ([0.0, 1.0] if name in kept else [0.5, 0.5])


def test_a_phase_hands_its_own_settings_to_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_file, "metrics", None)
    augment, objective = Augment(zoom=0.4), Objective(label_smoothing=0.1, focal_gamma=2.0)
    data = SimpleNamespace(max_bad_fraction=0.2)
    config = SimpleNamespace(augment=augment, objective=objective, seed=3, data=data)
    streams = {"train": SimpleNamespace(manifest=SimpleNamespace(task="multiclass"))}
    setup = cast(
        Setup,
        SimpleNamespace(config=config, network=Linear(), streams=streams, preprocessing=PLAIN, class_weights=None),
    )
    phase = Phase(name="a", max_epochs=1, lr=0.1, mixup=0.1, cutmix=0.2, accumulate=4, augment_strength=0.5)

    def module_of(phase: Phase) -> TransferModule:
        return build_module(setup, PhasePlan(phase, "head", (), 1, 1), cast(Any, None), 5, tuple)

    module = module_of(phase)
    assert (module.mixup, module.cutmix, module.parts, module.seed, module.first_step) == (0.1, 0.2, 4, 3, 5)
    assert module.augment == Augment(zoom=0.2) and module.objective == objective
    assert module.quarantine.max_bad_fraction == 0.2
    smoother = module_of(replace(phase, label_smoothing=0.3)).objective
    assert smoother == replace(objective, label_smoothing=0.3)
    assert module_of(replace(phase, label_smoothing=0.0)).objective.label_smoothing == 0
