from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

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


def paths(net: Network, *patterns: str) -> list[str]:
    """Names of the parameters whose path begins with one of some patterns."""
    return [p.name for p in net.layout().parameters if p.path.startswith(patterns)]


def test_an_early_stage_can_train_alone_and_what_is_behind_it_stays_frozen_but_passes_gradients_on() -> None:
    net = network(dropout=0.5)
    chosen = paths(net, "blocks.1/")
    net.set_trained(chosen)
    assert net.backbone.stage_names[net.first_trained] == "blocks.1"
    assert moved(*step(net)) == set(chosen), "no buffer, and no other parameter"
    for index, name in enumerate(net.backbone.stage_names):
        training = {m.training for top in net.backbone.stage_modules(index) for m in top.modules()}
        assert name == "blocks.1" or training == {False}, name
    assert not any(m.training for m in net.head.modules()), "dropout of a frozen head is off"


@pytest.mark.parametrize("layer", [nn.Dropout(0.9), nn.BatchNorm2d(24), nn.GroupNorm(4, 24), nn.LayerNorm([24, 2, 2])])
def test_frozen_layers_are_in_eval_mode_also_behind_what_trains(layer: nn.Module) -> None:
    net = network()
    net.backbone.net.get_submodule("blocks.4.0").register_module("bn3", layer)  # in the place of a BatchNorm
    for early, late in (("stem/", False), ("blocks.4/", True)):
        net.set_trained([name for name in paths(net, early) if "bn3" not in name], "batch")
        net.train()
        assert layer.training == (late and not list(layer.parameters()))
    net.set_trained([name for name, _ in net.named_parameters()], "batch")
    assert layer.training
    net.set_trained([name for name, _ in net.named_parameters()])
    assert layer.training != isinstance(layer, nn.BatchNorm2d)


def test_drop_path_acts_in_trained_stages_alone() -> None:
    net = network("timm/test_vit")
    drop = {}
    for index in (0, 3):
        drop[index] = DropPath(0.5)
        net.backbone.net.get_submodule(f"blocks.{index}").register_module("drop_path1", drop[index])
    for chosen, expected in (("blocks.0/", (True, False)), ("blocks.3/", (False, True)), ("head/", (False, False))):
        net.set_trained(paths(net, chosen))
        net.train()
        assert (drop[0].training, drop[3].training) == expected


def test_a_trained_layer_of_a_stage_leaves_its_frozen_neighbours_alone() -> None:
    net = network()
    norms = [p.name for p in net.layout().parameters if p.is_norm]
    net.set_trained(norms, "batch")
    before, after = step(net)
    buffers = {name for name, _ in net.named_buffers()}
    assert moved(before, after) == {*norms, *buffers}, "the statistics belong to the layers that train"
    kernels = [p.name for p in net.layout().parameters if not p.is_norm]
    net.set_trained(kernels, "batch")
    assert moved(*step(net)) == {*kernels}, "and stay where those are frozen"


def test_the_layout_names_every_parameter_once_in_its_stage() -> None:
    for name in ("timm/test_efficientnet", "timm/test_vit"):
        net = network(name)
        layout = net.layout()
        assert [p.name for p in layout.parameters] == [name for name, _ in net.named_parameters()]
        assert layout.backbone == name and layout.stages == net.backbone.stage_names
        order = [*layout.stages, "head"]
        assert {p.stage for p in layout.parameters} <= set(order)
        for index, stage in enumerate(layout.stages):
            own = {name for name, _ in net.backbone.stage_parameters(index)}
            assert {p.name.removeprefix("backbone.") for p in layout.parameters if p.stage == stage} == own
            assert all(
                p.path == f"{stage}/{p.name.removeprefix('backbone.net.')}"
                for p in layout.parameters
                if p.stage == stage
            )
        assert {p.path for p in layout.parameters if p.stage == "head"} == {
            f"head/{name}" for name, _ in net.head.named_parameters()
        }


def test_the_layout_knows_norms_and_what_takes_no_decay() -> None:
    for name in ("timm/test_efficientnet", "timm/test_vit"):
        net = network(name)
        norms = {
            f"{path}.{own}"
            for path, m in net.named_modules()
            if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)
            for own, _ in m.named_parameters(recurse=False)
        }
        found = {p.name: p for p in net.layout().parameters}
        assert norms and {name for name, p in found.items() if p.is_norm} == norms
        exempt = {"backbone.net.pos_embed", "backbone.net.cls_token"} if name == "timm/test_vit" else set()
        vectors = {name for name, p in net.named_parameters() if p.ndim <= 1}
        assert exempt <= set(found) and {name for name, p in found.items() if not p.decays} == vectors | exempt
    assert network("timm/test_vit").to("meta").layout() == network("timm/test_vit").layout()


def gradients(net: Network, grad_checkpointing: bool = False) -> dict[str, Tensor]:
    """Of a training step of the last two stages and the head, with the random state of dropout the same each time."""
    stages = (*net.backbone.stage_names[-2:], "head")
    net.set_trained(paths(net, *(f"{stage}/" for stage in stages)), grad_checkpointing=grad_checkpointing)
    torch.manual_seed(7)
    loss = net.train()(images()).square().mean()
    loss.backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients_with_dropout() -> None:
    net = network("timm/test_vit", dropout=0.5)
    for module in net.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    results, kept = [], []
    for grad_checkpointing in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(gradients(net, grad_checkpointing))
        kept.append(sum(sizes))
    plain, again = results
    assert plain.keys() == again.keys() and len(plain) > 10
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert kept[1] < 0.5 * kept[0]


@pytest.fixture
def compiler() -> Iterator[None]:
    """Nothing compiled is left for other tests."""
    yield
    torch._dynamo.reset()


def assert_same_when_compiled(net: Network, stages: Sequence[str]) -> None:
    """The gradients of a phase that trains some stages are those of the same phase without torch.compile."""
    chosen = paths(net, *(f"{stage}/" for stage in stages))
    results = []
    for compiled in (True, False):
        net.set_trained(chosen, compile=compiled)
        net.train()(images()).square().mean().backward()
        results.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    ours, plain = results
    assert ours.keys() == plain.keys() == set(chosen)
    for name, expected in plain.items():
        assert torch.allclose(ours[name], expected, rtol=1e-3, atol=1e-5), name


@pytest.mark.usefixtures("compiler")
def test_the_compiled_head_gives_the_same_gradients() -> None:
    assert_same_when_compiled(network(), ["head"])


@pytest.mark.usefixtures("compiler")
def test_no_phase_takes_a_frame_compiled_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch/pytorch#139476: a frame may be taken again though other parameters need a gradient."""
    frames: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        frames.append(len(inputs))
        compiled: Callable[..., Any] = aot_eager(graph, inputs)  # which is faster than the default
        return compiled

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    net = network()
    for stages in (["top"], ["blocks.4"], ["top", "head"], ["blocks.3", "head"], ["top"]):
        before = len(frames)
        assert_same_when_compiled(net, stages)
        assert len(frames) == before + 1, "each phase compiles its own"


@pytest.mark.usefixtures("compiler")
def test_only_training_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def compile(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            compiled.append(len(x))
            return function(x)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    net = network()
    net.set_trained(paths(net, "head/"), compile=True)
    net.eval()(images())
    assert not compiled
    net.train()(images())
    assert compiled
    net.set_trained(paths(net, "head/"))
    net.train()(images())
    assert len(compiled) == 1, "and not in a later phase"


def test_batch_norms_are_found_inside_anything() -> None:
    layers = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2)]
    assert batch_norms(nn.Sequential(nn.Linear(1, 1), nn.Sequential(*layers), nn.LayerNorm(2))) == layers
