"""Where the work is placed does not change it: one rank, two ranks, and two ranks that take a step in two parts.

24 samples in batches of 7 leave padded places on rank 1, and in batches of 23 a step in which it has no sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits
from ranks import Left, State, differing, train, write_config


def phase(name: str, train: object, batch: int, **settings: Any) -> dict[str, Any]:
    rates = {"lr": 0.005} | ({} if train == "head" else {"backbone_lr": 0.001})
    return {"name": name, "train": train, "max_epochs": 1, "global_batch": batch} | rates | settings


FROM_3 = {"from": "blocks.3"}
COSINE = {"schedule": "warmup_cosine", "warmup_steps": 1, "weight_decay": 0.01}
# Adam divides by the size of a gradient: where that is nearly zero, its own eps makes a large step of a rounding.
ADAM = {"optimizer_args": {"eps": 1e-4}}


@dataclass(frozen=True)
class Case:
    """A run: its phases, and what else is special about it; `exact` where nothing depends on the placement."""

    phases: list[dict[str, Any]]
    exact: bool = True
    task: str = "multiclass"
    sections: dict[str, Any] = field(default_factory=dict)


CASES = {
    "freeze_thaw": Case(
        [
            phase("head", "head", 7, max_epochs=2, **ADAM),
            phase("thaw", FROM_3, 23, max_epochs=2, ema_decay=0.5, **COSINE, **ADAM),
            phase("all", "all", 7, optimizer="sgd", clip_norm=0.1, layer_decay=0.8),
        ]
    ),
    "missing_labels": Case(
        [phase("head", "head", 7, **ADAM), phase("thaw", FROM_3, 7, optimizer="sgd")], task="multilabel"
    ),
    # In bf16, and with BatchNorm over half a batch, ranks round and normalise apart: near, but not the same.
    "bf16": Case(
        [phase("head", "head", 7), phase("thaw", FROM_3, 23)],
        exact=False,
        sections={"trainer": {"precision": "bf16-mixed"}},
    ),
    "scratch": Case(
        [phase("all", "all", 10, norm="batch", max_epochs=2)],
        exact=False,
        sections={"data": {"val": None}},
    ),
}
PARTS = {name: case for name, case in CASES.items() if case.exact}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Left]:
    """What the runs of each case left, by (case, placement): `1` and `2` ranks, and `parts`: 2 ranks and 2 parts."""
    left: dict[tuple[str, str], Left] = {}
    manifests: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("ranks")
    for task in {case.task for case in CASES.values()}:
        manifests[task] = digits(root / task, task=task, weighted=True).path
    for ranks in (1, 2):
        folder = root / str(ranks)
        folder.mkdir()
        placed = {(name, str(ranks)): (case, case.phases) for name, case in CASES.items()}
        if ranks == 2:
            placed |= {(name, "parts"): (case, in_two_parts(case)) for name, case in PARTS.items()}
        files = {
            key: write_config(folder, "-".join(key), manifests[case.task], ranks, phases, **case.sections)
            for key, (case, phases) in placed.items()
        }
        found = train(list(files.values()))
        left |= {key: found[file.stem] for key, file in files.items()}
    return left


def in_two_parts(case: Case) -> list[dict[str, Any]]:
    return [row | {"accumulate": 2} for row in case.phases]


def assert_close(a: State, b: State, tolerance: float) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_ranks_are_equal_to_the_bit_after_every_phase(trained: dict[tuple[str, str], Left], name: str) -> None:
    for number, _ in enumerate(CASES[name].phases, start=1):
        for placement in ("2", "parts") if CASES[name].exact else ("2",):
            left = trained[name, placement]
            assert differing(left.network(number, rank=0), left.network(number, rank=1)) == []


@pytest.mark.parametrize("name", CASES)
def test_each_phase_moves_what_it_trains_and_nothing_else_by_a_bit(
    trained: dict[tuple[str, str], Left], name: str
) -> None:
    frozen = {
        "head": ("backbone.",),
        "thaw": ("backbone.net.conv_stem", "backbone.net.bn1", *(f"backbone.net.blocks.{i}." for i in range(3))),
        "all": (),
    }
    left = trained[name, "2"]
    for number, row in enumerate(CASES[name].phases):
        before, after = left.network(number), left.network(number + 1)
        statistics = {name for name in after if "running" in name or "num_batches" in name}
        trains = {name for name in after if not name.startswith(frozen[row["name"]])} - statistics
        assert set(differing(before, after)) == (trains | statistics if row.get("norm") == "batch" else trains)


@pytest.mark.parametrize("name", CASES)
def test_one_rank_and_two_give_the_same_weights(trained: dict[tuple[str, str], Left], name: str) -> None:
    exact = CASES[name].exact
    for number, _ in enumerate(CASES[name].phases, start=1):
        one, two = (trained[name, ranks].network(number) for ranks in ("1", "2"))
        kept = [tensor for tensor in one if exact or "running" not in tensor]
        assert_close({n: one[n] for n in kept}, {n: two[n] for n in kept}, 1e-5 if exact else 0.05)


@pytest.mark.parametrize("name", PARTS)
def test_a_step_in_two_parts_on_two_ranks_is_the_step_of_one(trained: dict[tuple[str, str], Left], name: str) -> None:
    for number, _ in enumerate(CASES[name].phases, start=1):
        whole, parts = (trained[name, placement] for placement in ("2", "parts"))
        assert_close(whole.network(number), parts.network(number), 1e-5)
    ends = [[left.end(i)["step"] for i, _ in enumerate(CASES[name].phases)] for left in (whole, parts)]
    assert ends[0] == ends[1]
