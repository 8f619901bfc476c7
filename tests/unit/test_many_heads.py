"""Many heads of a phase: the best by validation goes on, all are told of, and what they need is checked first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits, metric_rows, prepared
from loops import assert_same, assert_same_runs, config_of, looped, stopped, train

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.errors import UserError
from lit_transfer.launch import main
from lit_transfer.model.module import LossNotFinite, Stopped
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.steps import StopSignal
from lit_transfer.reading import parse
from lit_transfer.schedule import HeadSetting, Phase

DROPOUT = {"dropout": 0.5}
GRID = {"lr": [0.3, 0.01], "weight_decay": [0.0, 0.1], "seeds": [1, 2]}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "data", weighted=True)


def phase(**row: Any) -> Phase:
    return parse(Phase, {"name": "a", "max_epochs": 1} | row)


def told(config: Config) -> dict[str, Any]:
    """What `heads.json` says."""
    found: dict[str, Any] = json.loads((config.run_dir / "checkpoints" / "head" / "heads.json").read_text())
    return found


WILD = {"heads": {"seeds": [0, 1, 2, 3, 4]}, "optimizer": "sgd", "validate_every_steps": 1, "global_batch": 10}
"""Heads that lead in turns, one of them at the last of 9 steps alone, and another one has been better before."""


@pytest.mark.parametrize(
    "row", [{}, {"ema_decay": 0.5}, {"restore_best": True}, {"restore_best": True, "ema_decay": 0.5}]
)
@pytest.mark.parametrize("monitor", ["val/loss", "val/auroc"])
def test_the_best_by_validation_goes_on(
    row: dict[str, Any], monitor: str, manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(manifest, tmp_path, WILD | row, monitor=monitor)
    left = train(config, loop=True)
    heads, seen = told(config)["heads"], left.last["heads"]["seen"]
    sign = 1 if monitor == "val/loss" else -1
    value = "best" if row.get("restore_best") else monitor
    (chosen,) = [place for place, head in enumerate(heads) if head["goes_on"]]
    assert sign * heads[chosen][value] == min(sign * head[value] for head in heads)
    assert [head["seed"] for head in heads] == [0, 1, 2, 3, 4] and {head["lr"] for head in heads} == {0.01}
    assert [head["best"] for head in heads] == pytest.approx(seen["best"].tolist())
    curve = [float(row[monitor]) for row in left.rows if row[monitor]]
    assert len(curve) == 9 and sign * min(sign * value for value in curve) == pytest.approx(
        sign * min(sign * head["best"] for head in heads), rel=1e-5
    ), "the curve is that of the best head at each validation"
    if not row.get("restore_best"):
        own, of = (left.last["heads"][key] for key in ("weights", "averages" if "ema_decay" in row else "weights"))
        assert all(torch.equal(left.last["network"][f"head.{name}"], t[chosen]) for name, t in own.items())
        assert_same(
            {name.removeprefix("head."): t for name, t in left.final.items()}, {n: t[chosen] for n, t in of.items()}
        )
    printed = capsys.readouterr().out
    assert f"phase head: 5 heads by {monitor}; all stand in heads.json" in printed
    (best,) = [line for line in printed.splitlines() if line.startswith("*")]
    assert best.split()[3] == str(heads[chosen]["seed"])


def test_restore_best_ends_with_the_head_and_the_step_of_the_best_validation(
    manifest: Manifest, tmp_path: Path
) -> None:
    """Its metrics, measured anew, are those that were the best."""
    config = config_of(manifest, tmp_path, WILD | {"restore_best": True}, head=DROPOUT)
    left = train(config, loop=True)
    (chosen,) = [head for head in told(config)["heads"] if head["goes_on"]]
    losses = [float(row["val/loss"]) for row in left.rows]
    assert losses[chosen["best_step"] - 1] == min(losses) and chosen["best_step"] < 9, "or there is nothing to see"
    frozen = config_of(manifest, tmp_path, {"lr": 1e-30, "max_steps": 1}, name="again", head=DROPOUT)
    job, plans = prepared(frozen)
    job.network.load_state_dict(left.final)
    with looped(job):
        run_phases(job, plans)
    again = [row["val/loss"] for row in metric_rows(frozen)]
    assert float(again[0]) == pytest.approx(chosen["best"], rel=1e-5)


@pytest.mark.parametrize("step", [2, 5])
def test_many_heads_that_were_stopped_go_on_to_the_same_bits(step: int, manifest: Manifest, tmp_path: Path) -> None:
    row = {"lr": None, "heads": GRID, "ema_decay": 0.7, "restore_best": True, "mixup": 0.4}
    config = config_of(manifest, tmp_path, row, head={"hidden": [4], "dropout": 0.3})
    straight = train(replace(config, name="straight"), loop=True)
    stopped(config, step, loop=True)
    left = train(config, loop=True)
    assert_same_runs(left, straight)
    assert told(config) == told(replace(config, name="straight"))


def test_a_head_that_fails_spoils_no_other_and_all_that_fail_end_the_run(manifest: Manifest, tmp_path: Path) -> None:
    row = {"lr": None, "optimizer": "sgd", "max_epochs": 2, "ema_decay": 0.5}
    with_one = config_of(manifest, tmp_path, row | {"heads": {"lr": [1e38, 0.01]}}, name="one")
    sound = config_of(manifest, tmp_path, row | {"heads": {"lr": [0.02, 0.01]}}, name="sound")
    failed, fine = train(with_one, loop=True), train(sound, loop=True)
    assert not failed.last["heads"]["weights"]["logits.weight"][0].isfinite().all()
    for name, tensor in failed.last["heads"]["weights"].items():
        assert torch.allclose(tensor[1], fine.last["heads"]["weights"][name][1], atol=1e-7)
    first, second = told(with_one)["heads"]
    assert (first["goes_on"], first["val/loss"]) == (False, None) and second["goes_on"]
    with pytest.raises(LossNotFinite, match="train/loss is"):
        train(config_of(manifest, tmp_path, row | {"heads": {"lr": [1e38, 2e38]}}, name="all"), loop=True)


def test_another_grid_starts_anew_and_other_rates_go_on(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"lr": None, "heads": {"lr": [0.1, 0.01], "seeds": [0, 1]}}
    config = config_of(manifest, tmp_path, row)
    stopped(config, 5, loop=True)
    for heads, said in (
        ({"lr": [0.2, 0.01], "seeds": [0, 1]}, "phase head goes on from step 5 of 12 steps"),
        ({"lr": [0.2, 0.01], "seeds": [0, 2]}, "phase head trains otherwise than before, and starts anew"),
    ):
        changed = config_of(manifest, tmp_path, row | {"heads": heads})
        job, plans = prepared(changed, allow_changed_plan=True)
        with looped(job), pytest.MonkeyPatch.context() as patch:
            patch.setattr(StopSignal, "__call__", lambda _: True)
            with pytest.raises(Stopped):
                run_phases(job, plans)
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"heads": {}}, "heads describes one head; give a list of 2 or more, or write lr and weight_decay in the"),
        ({"heads": {"lr": [0.1]}}, "heads describes one head; give a list of 2 or more"),
        ({"heads": {"lr": [0.1, 0.0]}}, "heads.lr [0.0] is not positive."),
        ({"heads": {"weight_decay": [0.1, -1.0]}}, "heads.weight_decay [-1.0] is not zero or more."),
        ({"heads": {"seeds": [1, 1]}}, "heads.seeds [1, 1] names one twice; remove it."),
        ({"lr": 0.1, "heads": {"lr": [0.1, 1]}}, "lr 0.1 and heads.lr [0.1, 1.0] are both given; remove one."),
        (
            {"lr": 0.1, "weight_decay": 0.3, "heads": {"weight_decay": [0.1, 1]}},
            "weight_decay 0.3 and heads.weight_decay [0.1, 1.0] are both given; remove one.",
        ),
        ({"heads": {"seeds": [0, 1]}}, "lr is missing; it is the head's learning rate."),
        (
            {"lr": 0.1, "train": "all", "backbone_lr": 0.1, "heads": {"seeds": [0, 1]}},
            "heads trains heads alone, but train is 'all'; write head.",
        ),
        (
            {"lr": 0.1, "optimizer": "rmsprop", "heads": {"seeds": [0, 1]}},
            "heads needs optimizer adamw or adam or sgd, not rmsprop.",
        ),
        (
            {"lr": 0.1, "optimizer_args": {"amsgrad": True}, "heads": {"seeds": [0, 1]}},
            "optimizer_args ['amsgrad'] cannot be given to heads; remove them.",
        ),
        (
            {"lr": 0.1, "cutmix": 0.5, "heads": {"seeds": [0, 1]}},
            "cutmix has no meaning for heads on stored features; remove it.",
        ),
    ],
)
def test_heads_that_cannot_be_are_refused_with_a_sentence(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        phase(**row)
    assert said in str(caught.value)


def test_every_combination_is_a_head() -> None:
    both = phase(heads={"lr": [0.1, 0.2], "weight_decay": [0.0, 0.3]})
    assert both.head_settings == [HeadSetting(lr, decay, None) for lr in (0.1, 0.2) for decay in (0.0, 0.3)]
    assert both.head_lr == 0.2
    seeds = phase(lr=0.5, weight_decay=0.7, heads={"seeds": [3, 4]})
    assert seeds.head_settings == [HeadSetting(0.5, 0.7, 3), HeadSetting(0.5, 0.7, 4)] and seeds.head_lr == 0.5
    assert phase(lr=0.5).head_settings == []


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"val": None}}, "phase 'head': heads needs validation; give data.val."),
        (
            {"activations": {"store": "off"}},
            "phase 'head': heads trains on stored features, but activations.store is off; write auto or require.",
        ),
    ],
)
def test_heads_need_validation_and_stored_features(
    sections: dict[str, Any], said: str, manifest: Manifest, tmp_path: Path
) -> None:
    config = config_of(manifest, tmp_path, {"lr": None, "heads": GRID}, data=sections.get("data", {}))
    if "activations" in sections:
        config = replace(config, activations=replace(config.activations, store="off"))
    with pytest.raises(UserError) as caught:
        prepared(config)
    assert str(caught.value) == said


def test_a_plan_says_which_heads_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = "{manifest: nowhere, split: train}"
    (tmp_path / "heads.yaml").write_text(
        f"name: heads\ndata: {{train: {stream}, val: {stream}}}\nmodel: {{backbone: timm/test_resnet, weights: none}}\n"
        "phases: [{name: a, max_epochs: 1, heads: {lr: [0.1, 0.001], seeds: [1, 2, 3]}}]\ntrainer: {accelerator: cpu}\n"
    )
    assert main(["plan", "--config", str(tmp_path / "heads.yaml"), "--samples", "100"]) == 0
    printed = capsys.readouterr().out
    assert "also in a: 6 heads at once on stored features: lr 0.1 0.001, seeds 1 2 3\n" in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("a  ") and "constant" in line]
    assert "0.001 to 0.1" in row
