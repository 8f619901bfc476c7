"""Many heads at once: each learns as it would alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits, prepared
from loops import config_of, looped, train
from torch import Tensor, nn

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.model.heads import build_head
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.stacked import StackedOptimizer, stack
from lit_transfer.reading import parse, to_plain
from lit_transfer.recipe import Head
from lit_transfer.schedule import HeadSetting, Phase

GRID = {"lr": [0.3, 0.01], "weight_decay": [0.0, 0.1], "seeds": [1, 2]}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "data", weighted=True)


def phase(**row: Any) -> Phase:
    return parse(Phase, {"name": "a", "max_epochs": 1} | row)


def heads_of(count: int, head: Head) -> list[nn.Sequential]:
    """Heads of 6 features, whose last layers are far from zero."""
    found = [build_head(head, 6, 3, seed) for seed in range(count)]
    for one in found:
        nn.init.normal_(one.get_submodule("logits").weight)
    return found


@pytest.mark.parametrize("head", [Head(), Head(hidden=[5, 4], dropout=0.3), Head(dropout=0.5)], ids=str)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_stack_gives_what_each_head_gives_and_its_gradients(head: Head, mode: bool) -> None:
    alone = [one.train(mode) for one in heads_of(3, head)]
    stacked = stack(alone[0], [one.state_dict() for one in alone]).train(mode)
    x, g = torch.randn(7, 6), torch.randn(7, 3, 3)
    torch.manual_seed(1)
    together = stacked(x)
    together.backward(g)
    assert together.shape == (7, 3, 3) and [*dict(stacked.named_parameters())] == [*dict(alone[0].named_parameters())]
    for place, one in enumerate(alone):
        torch.manual_seed(1)
        out = one(x)
        out.backward(g[:, place])
        assert torch.allclose(out, together[:, place], atol=1e-6)
        for name, parameter in one.named_parameters():
            gradient = stacked.get_parameter(name).grad
            assert gradient is not None and torch.allclose(parameter.grad, gradient[place], atol=1e-5), name


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], bool]] = {
    "adamw": (torch.optim.AdamW, {"betas": [0.8, 0.99], "eps": 1e-6}, True),
    "adam": (torch.optim.Adam, {}, False),
    "sgd": (torch.optim.SGD, {}, False),
    "SGD": (torch.optim.SGD, {"nesterov": True}, False),
}


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_that_of_torch_for_each_head_alone(name: str, clip_norm: float | None) -> None:
    """Equal gradients of every size; of AdamW the bits, of the others what a fused multiplication rounds otherwise."""
    cls, args, is_exact = OPTIMIZERS[name]
    lrs, decays = [0.1, 0.01, 0.3], [0.0, 0.1, 0.5]
    row = phase(lr=1.0, optimizer=name, optimizer_args=args, clip_norm=clip_norm)
    alone = heads_of(3, Head(hidden=[4]))
    stacked = stack(alone[0], [one.state_dict() for one in alone])
    ours = StackedOptimizer(dict(stacked.named_parameters()), row, decays, ["hidden0.weight", "logits.weight"])
    momentum = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    theirs = []
    for one, lr, decay in zip(alone, lrs, decays, strict=True):
        groups = [
            {"params": [p for p in one.parameters() if p.ndim == size], "weight_decay": of}
            for size, of in ((2, decay), (1, 0.0))
        ]
        theirs.append(cls(groups, lr=lr, **momentum, **args))
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 21):
        factor = 1 / count
        for parameter_name, parameter in stacked.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (count % 4 - 3)
            for place, one in enumerate(alone):
                one.get_parameter(parameter_name).grad = parameter.grad[place].clone()
        ours.step(torch.tensor(lrs, dtype=torch.float64) * factor, count)
        for one, optimizer, lr in zip(alone, theirs, lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(one.parameters(), clip_norm)
            optimizer.step()
    for place, one in enumerate(alone):
        for parameter_name, parameter in one.named_parameters():
            together = stacked.get_parameter(parameter_name)[place]
            if is_exact and clip_norm is None:
                assert torch.equal(parameter, together), parameter_name
            assert torch.allclose(parameter, together, rtol=1e-6, atol=1e-6), parameter_name
    ours.zero_grad()
    assert all(parameter.grad is None for parameter in stacked.parameters())


def alone_of(config: Config, setting: HeadSetting, name: str) -> Config:
    """The run of one of the heads by itself."""
    plain = to_plain(config)
    plain["phases"][0] |= {"heads": None, "lr": setting.lr, "weight_decay": setting.weight_decay}
    return parse(Config, plain | {"name": name, "seed": config.seed})


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": ({"schedule": "warmup_cosine", "warmup_steps": 2}, {}),
    "adam_in_parts": ({"optimizer": "adam", "accumulate": 3}, {}),
    "sgd_clipped": ({"optimizer": "sgd", "clip_norm": 0.1}, {}),
    "hidden": ({"ema_decay": 0.6, "mixup": 0.5}, {"hidden": [6], "dropout": 0.3}),
}


def seeded(config: Config, setting: HeadSetting) -> dict[str, Tensor]:
    assert setting.seed is not None
    return build_head(config.model.head, 768, 2, setting.seed).state_dict()


@pytest.mark.parametrize("name", CASES)
def test_each_head_ends_as_it_would_alone(name: str, manifest: Manifest, tmp_path: Path) -> None:
    row, head = CASES[name]
    config = config_of(manifest, tmp_path, row | {"lr": None, "heads": GRID}, head=head)
    many = train(config, loop=True).last["heads"]
    settings = config.phases[0].head_settings
    assert len(settings) == 8 and len({(s.lr, s.weight_decay, s.seed) for s in settings}) == 8
    for place in (0, 3, 6):
        setting = settings[place]
        other = alone_of(config, setting, f"alone{place}")
        job, plans = prepared(other)
        job.network.head.load_state_dict(seeded(config, setting))
        with looped(job):
            run_phases(job, plans)
        last = torch.load(other.run_dir / "checkpoints" / "head" / "last.ckpt", weights_only=True)
        for key, of in (("weights", last["network"]), ("averages", last["ema"] or {})):
            for tensor_name, tensor in many[key].items():
                assert torch.allclose(tensor[place], of[f"head.{tensor_name}"], atol=1e-6), (key, tensor_name)
