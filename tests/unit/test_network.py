from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from lit_transfer.errors import UserError
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.heads import build_head
from lit_transfer.model.network import Network, batch_norms
from lit_transfer.recipe import Head, Model


@functools.cache
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network(name: str = "timm/test_efficientnet", dropout: float = 0.0) -> Network:
    torch.manual_seed(0)
    backbone = build_backbone(Model(backbone=name, weights="none"), image_size=32)
    net = Network(backbone, build_head(Head(hidden=[8], dropout=dropout), backbone.features, 3, seed=0))
    for layer in batch_norms(net):
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.normal_(std=0.1)
        layer.running_var.uniform_(0.5, 1.5)
    return net


def step(net: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state before and after a step of SGD with a large weight decay over all that has a gradient."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    net.train()(images()).square().mean().backward()
    optimizer.step()
    return before, {name: tensor.clone() for name, tensor in net.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def stage_index(net: Network, name: str) -> int:
    """The stage of a tensor of the network; one past the last for the head."""
    if name.startswith("head."):
        return len(net.backbone.stages)
    return net.backbone.stage_names.index(net.backbone.stage_of(name.removeprefix("backbone.")))


def test_a_fresh_network_trains_only_its_head() -> None:
    net = network()
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad} == {"head"}
    assert moved(*step(net)) == {f"head.{name}" for name, _ in net.head.named_parameters()}


@pytest.mark.parametrize("cut", ["all", "blocks.1", "top", "head"])
@pytest.mark.parametrize("norm", ["pretrained", "batch"])
def test_a_step_moves_what_is_behind_the_cut_and_not_a_bit_before_it(cut: str, norm: str) -> None:
    net = network()
    net.set_cut(cut, "batch" if norm == "batch" else "pretrained")
    first = net.backbone.cut_index(cut)
    changed = moved(*step(net))
    for name, parameter in net.named_parameters():
        behind = stage_index(net, name) >= first
        assert (name in changed, parameter.requires_grad, parameter.grad is not None) == (behind,) * 3, name
    for name, _ in net.named_buffers():
        assert (name in changed) == (stage_index(net, name) >= first and norm == "batch"), name


def test_frozen_stages_stay_in_eval_mode_whatever_is_called() -> None:
    net = network("timm/test_vit", dropout=0.5)
    net.set_cut("blocks.3")
    for mode in (True, False, True):
        net.train(mode)
        for index in range(len(net.backbone.stages)):
            modules = [m for top in net.backbone.stage_modules(index) for m in top.modules()]
            assert modules and all(m.training == (mode and index >= net.first_trained) for m in modules)
        assert all(m.training == mode for m in net.head.modules())


def test_thawed_batch_norm_keeps_its_statistics_unless_told_otherwise() -> None:
    net = network()
    net.set_cut("blocks.1")
    net.train()
    assert not any(layer.training for layer in batch_norms(net))
    trained = [layer for layer in batch_norms(net) if layer.weight.requires_grad]
    assert trained and len(trained) < len(batch_norms(net))
    net.set_cut("blocks.1", norm="batch")
    assert [layer for layer in batch_norms(net) if layer.training] == trained
    net.set_cut("blocks.1")
    assert not any(layer.training for layer in batch_norms(net))


def test_batch_statistics_are_those_of_the_batch() -> None:
    net = network()
    net.set_cut("all", norm="batch")
    net.train()
    first = net(images())
    for layer in batch_norms(net):
        assert layer.running_mean is not None
        layer.running_mean.add_(5.0)
    assert torch.equal(net(images()), first)
    assert not torch.allclose(net.eval()(images()), first)


def test_what_is_frozen_again_has_no_gradient_left() -> None:
    net = network()
    net.set_cut("all")
    net(images()).sum().backward()
    net.set_cut("top")
    assert all(p.grad is None for p in net.backbone.parameters())


def test_the_graph_ends_at_the_cut() -> None:
    net = network()
    seen: dict[str, tuple[bool, bool]] = {}
    for stage, cut in (("conv_stem", "blocks.1"), ("blocks.1", "blocks.1")):
        net.set_cut(cut)
        hook = net.backbone.net.get_submodule(stage).register_forward_hook(
            lambda _module, _inputs, output, stage=stage: seen.update(
                {stage: (torch.is_grad_enabled(), output.requires_grad)}
            )
        )
        net.train()(images())
        hook.remove()
    assert seen == {"conv_stem": (False, False), "blocks.1": (True, True)}


def test_every_cut_gives_the_same_logits() -> None:
    net = network().eval()
    cuts = ["all", *net.backbone.stage_names, "head"]
    logits = []
    for cut in cuts:
        net.set_cut(cut)
        logits.append(net(images()).detach())
    assert all(torch.equal(logits[0], other) for other in logits)
    assert logits[0].shape == (4, 3)


def test_an_unknown_cut_names_the_stages() -> None:
    with pytest.raises(UserError, match=r"'blocks.9' is not a stage of timm/test_efficientnet"):
        network().set_cut("blocks.9")


def test_batch_norms_are_found_inside_anything() -> None:
    layers = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2)]
    assert batch_norms(nn.Sequential(nn.Linear(1, 1), nn.Sequential(*layers), nn.LayerNorm(2))) == layers
