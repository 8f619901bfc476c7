from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_transfer.model.heads import build_head
from lit_transfer.recipe import Head


def test_linear_head_has_weight_bias_and_optional_dropout() -> None:
    plain = build_head(Head(), 512, 3, seed=0)
    assert [type(layer) for layer in plain] == [nn.Linear]
    assert plain(torch.zeros(2, 512)).tolist() == [[0.0] * 3] * 2
    dropped = build_head(Head(dropout=0.25), 512, 3, seed=0)
    assert [type(layer) for layer in dropped] == [nn.Dropout, nn.Linear]
    assert dropped[0].p == 0.25
    assert list(plain.state_dict()) == list(dropped.state_dict()) == ["logits.weight", "logits.bias"]


def test_mlp_head_is_linear_relu_dropout_per_hidden_layer() -> None:
    head = build_head(Head(hidden=[32, 16], dropout=[0.5, 0.0]), 64, 5, seed=0)
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Linear]
    assert [list(p.shape) for name, p in head.named_parameters() if "weight" in name] == [
        [32, 64],
        [16, 32],
        [5, 16],
    ]
    both = build_head(Head(hidden=[32, 16], dropout=0.5), 64, 5, seed=0)
    assert [layer.p for layer in both if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    assert list(both.state_dict()) == list(head.state_dict())


@pytest.mark.parametrize("head", [Head(), Head(hidden=[256])])
def test_initial_values_come_from_the_seed_alone(head: Head) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_head(head, 1000, 100, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the global random state moved"
    torch.manual_seed(2)
    again, other = (
        build_head(head, 1000, 100, seed=7).state_dict(),
        build_head(head, 1000, 100, seed=8).state_dict(),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["logits.weight"], other["logits.weight"])


def test_scale_of_initial_values() -> None:
    head = build_head(Head(hidden=[512]), 800, 100, seed=0).state_dict()
    assert head["hidden0.weight"].std() == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert head["logits.weight"].std() == pytest.approx(0.01, rel=0.02)
    assert not head["hidden0.bias"].any() and not head["logits.bias"].any()
