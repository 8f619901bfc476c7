"""What damaged samples change in a step, and that a validation meets each sample once."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from one_step import PLAIN, ROWS, batch_of, gradient, made, whole
from torch import Tensor

from lit_transfer.data.plan import PADDING, slice_of
from lit_transfer.data.quarantine import Quarantine
from lit_transfer.errors import UserError
from lit_transfer.model.augment import eval_input
from lit_transfer.model.module import Batch
from lit_transfer.objectives.losses import loss_rows
from lit_transfer.recipe import Objective


def test_damaged_samples_of_all_ranks_count_and_too_many_end_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"key": "a", "address": "x.tar", "offset": 512, "reason": "cut"}
    module = made(quarantine=Quarantine(None, max_bad_fraction=2 / ROWS))
    monkeypatch.setattr(module, "_all_reduce", lambda tensor: tensor * 2)  # another rank met as many
    module.training_step(whole() | {"damaged": [entry]}, 0)
    with pytest.raises(UserError, match=f"^4 of the {ROWS} samples of data.train are damaged"):
        module.training_step(whole() | {"damaged": [entry]}, 0)
    module.training_step(whole() | {"damaged": [entry], "epoch": torch.tensor(1)}, 0)


LABELLED = torch.tensor([[1, 0, float("nan")], [1, 1, 0], [0, float("nan"), float("nan")]])


def of_labels(rows: np.ndarray[Any, Any], planned: int, damaged: int) -> Batch:
    """A batch whose rows have 2, 3 or 1 labels by their number."""
    batch = batch_of(rows, planned)
    return batch | {"target": LABELLED[batch["row"].clamp(min=0) % 3], "damaged": [{}] * damaged}


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_stand_ins_with_other_numbers_of_labels_still_give_the_mean(
    parts: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """17 labels were planned; those of the stand-ins, on the last rank and in the last part, make it 23."""
    monkeypatch.setattr(Quarantine, "add", lambda *_: None)
    rows = np.arange(ROWS)
    batch, expected = of_labels(rows, 17, 0), made()
    logits = expected(eval_input(batch["image"], PLAIN))
    values, counts = loss_rows("multilabel", logits, batch["target"], Objective(), None)
    mean = (values * batch["weight"]).sum() / 23
    assert counts.sum() == 23
    torch.autograd.backward(mean)

    told: list[list[Tensor]] = [[] for _ in range(parts)]
    for knows in (False, True):  # the sums of all ranks are known when each has been asked once
        module = made(world_size=ranks, parts=parts, quarantine=Quarantine(None, 1.0))
        module.task = "multilabel"
        for rank in range(ranks):
            for part in range(parts):
                mine = slice_of(slice_of(rows, rank, ranks), part, parts)
                monkeypatch.setattr(
                    module,
                    "_all_reduce",
                    lambda own, of=told[part], knows=knows: torch.stack(of).sum(0) if knows else of.append(own) or own,
                )
                last = (rank, part) == (ranks - 1, parts - 1)
                loss = module.training_step(of_labels(mine, 17, damaged=int(last)), part)
                torch.autograd.backward(loss / parts / ranks)
    assert module.train_loss == pytest.approx(mean.item(), rel=1e-5)
    module.on_before_optimizer_step(cast(Any, None))
    assert torch.allclose(gradient(module), gradient(expected), atol=1e-6)


def test_without_damage_the_gradient_is_left_to_the_bit() -> None:
    """Also where the sum of the labels, in fp32, would not be what was planned."""
    module = made(quarantine=Quarantine(None, 1.0))
    module.task = "multilabel"
    torch.autograd.backward(module.training_step(of_labels(np.arange(ROWS), 17, 0), 0))
    weight = module.get_parameter("network.layer.weight")
    before = weight.grad.clone()
    module.on_before_optimizer_step(cast(Any, None))
    assert torch.equal(weight.grad, before)


@pytest.mark.parametrize(
    ("rows", "damaged", "told"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9], 0, "11 valid samples, 10 of them different, and left out 0"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, PADDING], 0, "10 valid samples, 10 of them different, and left out 0"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 1, "11 valid samples, 11 of them different, and left out 1"),
    ],
)
def test_a_validation_that_does_not_meet_each_sample_once_is_an_error_on_every_rank(
    rows: list[int], damaged: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has its share of the rows, and is told of the others'."""
    own = [torch.tensor(rows[:6]), torch.tensor(rows[6:])]
    for rank in range(2):
        module = made(world_size=2, eval_stream="test")
        monkeypatch.setattr(module, "_gather", lambda tensor: torch.cat(own))
        monkeypatch.setattr(module, "_all_reduce", lambda tensor: torch.tensor(float(damaged)))
        module._eval_rows = [{"row": own[rank]}]
        with pytest.raises(UserError, match=rf"measured {told} damaged, but data\.test has 11 in the manifest"):
            module.on_validation_epoch_end()
