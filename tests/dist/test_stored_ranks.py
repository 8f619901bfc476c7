"""Ranks that read stored activations: built together, equal to each other, to one rank, and to ranks that compute.

64 samples of train and 32 of val are in batches of 32 a rank, with which the plain prefix is exact to the bit.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits
from ranks import Left, State, differing, start, train, write_config

RATES = {"lr": 0.005, "global_batch": 64, "optimizer_args": {"eps": 1e-4}}
TOP = {"name": "top", "train": {"last": 2}, "max_epochs": 2, "backbone_lr": 0.001, **RATES}
ALL = {"name": "all", "train": "all", "max_epochs": 1, "backbone_lr": 0.001, **RATES}
DEEPER = {"name": "deeper", "train": {"from": "blocks.3"}, "max_epochs": 1, "backbone_lr": 0.001, **RATES}
HEAD = {"name": "head", "max_epochs": 2, **RATES}
RUNS = {"first": [TOP, DEEPER], "later": [ALL, TOP], "head": [HEAD]}
"""What is stored in the phase in which the ranks start, what behind a phase that computes, and pooled features."""
EXACT = {"store": "require", "prefix": "plain", "dtype": "float32", "views": 3}
PARTS = {"first": (2 * 4 + 2) + (4 + 2), "later": 2 * 4 + 2, "head": 2 * 4 + 2}
"""Parts of 16 records: 4 for each epoch's view of train, and 2 of val."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset."""
    return digits(tmp_path_factory.mktemp("digits") / "digits", count=128).path


def configs(folder: Path, manifest: Path, ranks: int, settings: dict[str, Any], names: list[str]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [
        write_config(
            folder, name, manifest, ranks, RUNS[name], activations=settings | {"folder": str(folder / f"store-{name}")}
        )
        for name in names
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, manifest: Path) -> dict[str, Left]:
    """What the runs left: on two ranks, on one, and on two that compute; `folder` of the first has the stores."""
    root = tmp_path_factory.mktemp("ranks")
    two = configs(root / "two", manifest, 2, EXACT, [*RUNS])
    off = configs(root / "off", manifest, 2, EXACT | {"store": "off"}, [*RUNS])
    one = configs(root / "one", manifest, 1, EXACT, ["first"])
    left = {f"two {file.stem}": Left(file.with_suffix("")) for file in two}
    left |= {f"off {file.stem}": Left(file.with_suffix("")) for file in off}
    train([*two, *off], "small_parts")
    return left | {"one first": train(one, "small_parts")["first"]}


def events(store: Path) -> list[dict[str, Any]]:
    logs = store.glob("*/log-*.jsonl")
    return [json.loads(line) | {"shelf": log.parent.name} for log in logs for line in log.read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_each_part_is_built_once_by_one_of_the_ranks(trained: dict[str, Left], name: str) -> None:
    found = events(trained[f"two {name}"].folder.parent / f"store-{name}")
    built = Counter((event["shelf"], event["part"]) for event in found)
    assert {event["event"] for event in found} == {"built"} and set(built.values()) == {1}
    assert len(built) == PARTS[name]
    assert len({event["pid"] for event in found}) == 2, "both have a share"


@pytest.mark.parametrize("name", RUNS)
def test_ranks_are_equal_and_have_what_ranks_that_compute_have(trained: dict[str, Left], name: str) -> None:
    stored, computed = (trained[f"{how} {name}"] for how in ("two", "off"))
    for phase in range(1, len(RUNS[name]) + 1):
        assert differing(stored.network(phase, rank=0), stored.network(phase, rank=1)) == []
        if name == "head":  # which one rank trains for all
            assert_close(stored.network(phase), computed.network(phase))
        else:
            assert differing(stored.network(phase), computed.network(phase)) == []
    assert differing(computed.network(0), computed.network(1)) != []


def test_one_rank_and_two_give_the_same_weights(trained: dict[str, Left]) -> None:
    for phase in (1, 2):
        assert_close(*(trained[f"{ranks} first"].network(phase) for ranks in ("one", "two")))


def assert_close(given: State, wanted: State) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(given[name], tensor, rtol=1e-5, atol=1e-5)


def test_where_one_rank_cannot_store_all_compute_or_all_stop(
    trained: dict[str, Left], manifest: Path, tmp_path: Path
) -> None:
    auto = configs(tmp_path / "auto", manifest, 2, EXACT | {"store": "auto"}, ["first"])
    required = configs(tmp_path / "required", manifest, 2, EXACT, ["first"])
    done = start([*auto, *required], "full_disk")
    told = f"activations cannot be stored in {tmp_path / 'auto' / 'store-first'}: No space left on device"
    assert f"phase top computes its frozen stages in each epoch: {told}" in done.stdout, done.stdout + done.stderr
    left = Left(auto[0].with_suffix(""))
    for phase in (1, 2):
        assert differing(left.network(phase, rank=0), left.network(phase, rank=1)) == []
        assert differing(left.network(phase), trained["off first"].network(phase)) == []
    assert done.returncode != 0
    assert "No space left on device, but activations.store is require; make room" in done.stdout + done.stderr
    assert not (tmp_path / "required" / "runs" / "first" / "checkpoints" / "top" / "last.ckpt").exists()
