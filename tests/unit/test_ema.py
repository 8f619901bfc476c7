from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_transfer.model.ema import Ema


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


def wandered(net: nn.Module, then: Callable[[], None], steps: int = 5) -> None:
    """A walk of what trains, and of the buffers."""
    for _ in range(steps):
        with torch.no_grad():
            for tensor in [*(p for p in net.parameters() if p.requires_grad), *net.buffers()]:
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype))
        then()


def test_it_is_the_average_of_torch_after_every_step() -> None:
    net = network()
    ema, theirs = Ema(net, 0.9), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    theirs.update_parameters(net)  # its first call copies
    names = {name for name, p in net.named_parameters() if p.requires_grad}

    def compare() -> None:
        ema.update()
        theirs.update_parameters(net)
        averages = dict(theirs.module.named_parameters())
        assert ema.weights.keys() == names == {"1.weight", "1.bias", "2.weight", "2.bias"}
        assert all(torch.allclose(ema.weights[name], averages[name], atol=1e-6) for name in names)

    wandered(net, compare)


def test_a_decay_of_nothing_follows_the_network() -> None:
    net = network()
    ema = Ema(net, 0.0)
    wandered(net, ema.update)
    assert all(torch.allclose(ema.weights[name], net.get_parameter(name)) for name in ema.weights)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_swapping_exchanges_both_and_a_second_time_takes_it_back_to_the_bit() -> None:
    net = network()
    ema = Ema(net, 0.9)
    wandered(net, ema.update)
    own, averages = copies(net.state_dict()), copies(ema.weights)
    ema.swap()
    state = net.state_dict()
    assert all(torch.equal(state[name], averages.get(name, own[name])) for name in state), "buffers stay"
    assert all(torch.equal(ema.weights[name], own[name]) for name in averages)
    assert not torch.equal(state["2.weight"], own["2.weight"])
    ema.swap()
    assert all(torch.equal(tensor, own[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(tensor, averages[name]) for name, tensor in ema.weights.items())


def test_going_on_from_a_checkpoint_is_going_on() -> None:
    net, other = network(), network()
    ema, later = Ema(net, 0.9), Ema(other, 0.9)
    wandered(net, ema.update)
    other.load_state_dict(net.state_dict())
    saved = copies(ema.weights)
    later.load(saved)
    for average, of in ((ema, net), (later, other)):
        torch.manual_seed(1)
        wandered(of, average.update, steps=2)
    assert all(torch.equal(ema.weights[name], later.weights[name]) for name in ema.weights)
    assert not torch.equal(saved["2.weight"], later.weights["2.weight"]), "and the checkpoint's tensors are its own"
    with pytest.raises(AssertionError, match="other parameters"):
        later.load({"0.weight": torch.zeros(4, 3)})
