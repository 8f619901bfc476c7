from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from layouts import NETWORKS, STAGES, config, real, row, small

from lit_transfer.errors import UserError
from lit_transfer.model.network import Layout
from lit_transfer.phases.presets import expand
from lit_transfer.phases.table import PhasePlan, check_metrics, resolve
from lit_transfer.reading import to_plain

NO_VAL = {"data": {"train": {"manifest": "x", "split": "train"}}}


def planned(layout: Layout, **settings: Any) -> PhasePlan:
    (plan,) = resolve(config([row(**settings)]), layout, samples=17)
    return plan


def names(layout: Layout, *stages: str) -> list[str]:
    return [p.name for p in layout.parameters if p.stage in stages]


@pytest.mark.parametrize(
    ("train", "cut", "trained"),
    [
        ("head", "head", ()),
        ("all", "stem", STAGES),
        ({"from": "stem"}, "stem", STAGES),
        ({"from": "blocks.1"}, "blocks.1", ("blocks.1", "top")),
        ({"last": 1}, "top", ("top",)),
        ({"last": 4}, "stem", STAGES),
        ({"params": ["blocks.0/*", "head/*"]}, "blocks.0", ("blocks.0",)),
    ],
)
def test_resolve_says_what_trains_and_for_how_long(train: Any, cut: str, trained: tuple[str, ...]) -> None:
    rates = {} if train == "head" else {"backbone_lr": 0.01}
    plan = planned(small(), train=train, global_batch=8, **rates)
    assert plan.cut == cut
    assert list(plan.trained) and set(plan.trained) == set(names(small(), *trained, "head"))
    assert plan.rates == {"head": 0.1} | ({"backbone": 0.01} if trained else {})
    assert (plan.steps_per_epoch, plan.max_steps) == (3, 6), "the last batch holds one sample"


@pytest.mark.parametrize("max_steps", [1, 2, 100])
def test_max_steps_is_taken_as_it_is(max_steps: int) -> None:
    plan = planned(small(), max_epochs=None, max_steps=max_steps, global_batch=8)
    assert (plan.steps_per_epoch, plan.max_steps) == (3, max_steps)


@pytest.mark.parametrize("network", NETWORKS)
def test_groups_split_by_stage_and_decay_in_the_order_of_the_stages(network: str) -> None:
    layout = real(network)
    plan = planned(layout, train="all", backbone_lr=0.01, layer_decay=0.5, weight_decay=0.3)
    parts = list(dict.fromkeys(group.rate_name for group in plan.groups))
    assert parts == [*layout.stages, "head"] == list(plan.rates)
    assert sorted(plan.trained) == sorted(p.name for p in layout.parameters), "each parameter once"
    decays = {p.name: p.decays for p in layout.parameters}
    for group in plan.groups:
        kind = group.name.rpartition("/")[2]
        assert {decays[name] for name in group.parameters} == {kind == "decay"}
        assert group.weight_decay == (0.3 if kind == "decay" else 0.0)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("train", "frozen"),
    [("head", "stem blocks top"), ("all", ""), ({"last": 1}, "stem blocks"), ({"from": "blocks.0"}, "stem")],
)
def test_groups_cover_what_trains_and_nothing_twice(network: str, train: Any, frozen: str) -> None:
    layout = real(network)
    plan = planned(layout, train=train, **({} if train == "head" else {"backbone_lr": 0.01}))
    kept = [stage for stage in layout.stages if stage.split(".")[0] not in frozen.split()]
    assert sorted(plan.trained) == sorted(names(layout, *kept, "head"))


@pytest.mark.parametrize("network", NETWORKS)
def test_layer_decay_gives_absolute_rates(network: str) -> None:
    layout = real(network)
    count = len(layout.stages)
    plan = planned(layout, train="all", lr=0.3, backbone_lr=0.02, layer_decay=0.7)
    rates = {stage: 0.02 * 0.7 ** (count - 1 - index) for index, stage in enumerate(layout.stages)}
    assert plan.rates == pytest.approx(rates | {"head": 0.3}, rel=1e-12)


def test_layer_decay_counts_from_the_last_stage_wherever_training_begins() -> None:
    whole = planned(small(), train="all", backbone_lr=0.02, layer_decay=0.5).rates
    assert whole == {"stem": 0.0025, "blocks.0": 0.005, "blocks.1": 0.01, "top": 0.02, "head": 0.1}
    for train in ({"from": "blocks.1"}, {"last": 2}, {"params": ["blocks.1/*", "top/*", "head/*"]}):
        part = planned(small(), train=train, backbone_lr=0.02, layer_decay=0.5)
        assert part.rates == {key: whole[key] for key in ("blocks.1", "top", "head")}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_first_block_only(network: str) -> None:
    layout = real(network)
    plan = planned(layout, train={"params": ["blocks.0/*"]}, lr=None, backbone_lr=0.01)
    assert list(plan.rates.items()) == [("backbone", 0.01)]
    assert sorted(plan.trained) == sorted(names(layout, "blocks.0")) and plan.cut == "blocks.0"


@pytest.mark.parametrize("network", NETWORKS)
def test_biases_only(network: str) -> None:
    layout = real(network)
    plan = planned(layout, train={"params": ["*.bias"]}, backbone_lr=0.01, weight_decay=0.3)
    assert [group.name for group in plan.groups] == ["backbone/no_decay", "head/no_decay"]
    assert plan.groups[1].parameters == ("head.hidden0.bias", "head.logits.bias")
    assert set(plan.trained) == {p.name for p in layout.parameters if p.name.endswith(".bias")}


@pytest.mark.parametrize(("network", "count"), [("timm/test_efficientnet", 26), ("timm/test_vit", 26)])
def test_norms_only(network: str, count: int) -> None:
    layout = real(network)
    plan = planned(layout, train={"params": ["norms"]}, lr=None, backbone_lr=0.01)
    found = [name for name in plan.trained if re.search(r"\.(bn\d|norm\d?)\.(weight|bias)$", name)]
    assert len(found) == len(plan.trained) == count
    assert not any(name.startswith("head.") for name in found)


def test_patterns_with_rates_of_their_own() -> None:
    plan = planned(small(), train={"params": {"stem/*": 0.5, "head/*": 2}}, lr=None)
    assert plan.rates == {"stem/*": 0.5, "head/*": 2.0}
    assert [group.name for group in plan.groups] == [
        "stem/*/decay",
        "stem/*/no_decay",
        "head/*/decay",
        "head/*/no_decay",
    ]
    assert set(plan.trained) == set(names(small(), "stem", "head"))


def test_patterns_may_overlap_where_they_agree() -> None:
    agreed = {"params": {"stem/*": 0.5, "*.bias": 0.5}}
    trained = planned(small(), train=agreed, lr=None).trained
    assert sorted(trained) == sorted(
        {*names(small(), "stem"), *(p.name for p in small().parameters if "bias" in p.name)}
    )
    same = planned(small(), train={"params": ["norms", "*.bias"]}, backbone_lr=0.01)
    assert len(set(same.trained)) == len(same.trained) == 2 * len(STAGES) + 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"train": {"from": "block.1"}, "backbone_lr": 0.1},
            "phase 'a': train.from 'block.1' is not a stage of timm/net; its stages are stem, blocks.0, blocks.1, top. "
            "Did you mean 'blocks.1'?",
        ),
        (
            {"train": {"last": 5}, "backbone_lr": 0.1},
            "phase 'a': train.last 5 is over the 4 stages of timm/net (stem, blocks.0, blocks.1, top).",
        ),
        (
            {"train": {"params": ["head/*", "layer4/*"]}},
            "phase 'a': train.params 'layer4/*' matches no parameter, so it trains nothing; a pattern is `norms` or a "
            "glob over STAGE/NAME, such as stem/stem.conv.weight.",
        ),
        (
            {"train": {"params": {"stem/*": 0.5, "*.bias": 0.25}}, "lr": None},
            "phase 'a': train.params 'stem/*' and '*.bias' both match stem/stem.bn.bias with different rates, "
            "0.5 and 0.25; make them exclude each other.",
        ),
        (
            {"train": {"params": ["head/*", "norms"]}},
            "phase 'a': train.params 'norms' matches stem/stem.bn.weight, which trains at backbone_lr, but it is not",
        ),
        (
            {"train": {"params": ["*.bias"]}, "lr": None, "backbone_lr": 0.1},
            "phase 'a': train.params '*.bias' matches head/logits.bias, which trains at lr, but it is not given.",
        ),
        (
            {"schedule": "warmup_cosine", "warmup_steps": 6, "global_batch": 8},
            "phase 'a': warmup_steps 6 is not below its 6 steps; lower it.",
        ),
        (
            {"train": {"params": ["stem/*"]}, "backbone_lr": 0.1},
            "phase 'a': lr 0.1 is the head's learning rate, but no pattern matches it; remove it, or add head/*.",
        ),
        (
            {"mixup": 0.2, "global_batch": 1},
            "phase 'a': mixup and cutmix need 2 samples or more on a rank at once, but global_batch 1 in 1 part(s) "
            "over 1 rank(s) leaves one; raise global_batch.",
        ),
        (
            {"cutmix": 1.0, "global_batch": 4, "accumulate": 4},
            "phase 'a': mixup and cutmix need 2 samples or more on a rank at once, but global_batch 4 in 4 part(s) ",
        ),
    ],
)
def test_rules_that_need_the_network_or_the_size_of_the_dataset(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(said)) as caught:
        planned(small(), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("ranks", "batch"), [(2, 2), (4, 4), (4, 8)])
def test_mixing_needs_two_rows_on_each_rank(ranks: int, batch: int) -> None:
    trainer = {"accelerator": "cpu", "devices": ranks}
    for settings in ({"mixup": 0.2}, {"cutmix": 0.2}):
        parts = {"accumulate": batch // ranks, "global_batch": batch}
        with pytest.raises(
            UserError, match=rf"^phase 'a': mixup and cutmix need .* over {ranks} rank\(s\) leaves one; "
        ):
            resolve(config([row(**settings, **parts)], trainer=trainer), small(), samples=17)
        resolve(config([row(**settings, **parts | {"global_batch": batch + 1})], trainer=trainer), small(), samples=17)


@pytest.mark.parametrize(
    ("order", "batch", "said"),
    [
        (
            {"partitions": 3},
            8,
            "phase 'a': global_batch 8 is not a multiple of data.order.partitions 3, of which it takes equal shares; "
            "change one of them.",
        ),
        (
            {"last_batch": "drop"},
            18,
            "phase 'a': global_batch 18 is over the 17 samples, and data.order.last_batch drop leaves no step; lower "
            "it, or keep the last batch.",
        ),
    ],
)
def test_the_order_must_fit_the_batch(order: dict[str, Any], batch: int, said: str) -> None:
    def resolved(batch: int) -> PhasePlan:
        data = config([row()]).data
        plain = {"train": to_plain(data)["train"], "order": order}
        (plan,) = resolve(config([row(global_batch=batch)], data=plain), small(), samples=17)
        return plan

    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        resolved(batch)
    assert resolved(6).steps_per_epoch == (3 if "partitions" in order else 2)


def test_a_network_without_normalisation_layers_has_no_norms() -> None:
    plain = dataclasses.replace(small(), parameters=tuple(p for p in small().parameters if not p.is_norm))
    with pytest.raises(UserError, match=r"train\.params 'norms' matches no parameter"):
        planned(plain, train={"params": ["norms", "head/*"]}, backbone_lr=0.01)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"restore_best": True}, "restore_best"),
        ({"until": {"metric": "val/loss", "patience": 1}}, "until"),
        ({"until": {"metric": "val/loss", "below": 0.5}}, "until"),
        ({"schedule": "plateau"}, "schedule plateau"),
        ({"validate_every_steps": 2}, "validate_every_steps"),
    ],
)
def test_what_needs_validation_says_so(settings: dict[str, Any], needs: str) -> None:
    assert planned(small(), **settings)
    with pytest.raises(UserError, match=f"^phase 'a': {needs} needs validation; give data.val.$"):
        resolve(config([row(**settings)], **NO_VAL), small(), samples=17)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"until": {"metric": "val/f1", "patience": 1}}, "until.metric"),
        ({"until": {"metric": "val/f1", "above": 0.9}}, "until.metric"),
        ({"schedule": "plateau", "schedule_args": {"metric": "val/f1"}}, "schedule_args.metric"),
    ],
)
def test_a_metric_to_watch_must_be_one_of_the_task(settings: dict[str, Any], place: str) -> None:
    watching = config([row(**settings)])
    phases = expand(watching, STAGES, 17)
    check_metrics(watching, phases, ["accuracy", "f1"])
    with pytest.raises(UserError, match=rf"^phase 'a': {place} 'val/f1' is not a metric .*'val/f2'"):
        check_metrics(watching, phases, ["accuracy", "f2"])


def test_what_names_the_best_must_be_a_metric_of_the_task() -> None:
    settings = config([row()], monitor="val/accuracy")
    with pytest.raises(UserError, match=r"^monitor 'val/accuracy' is not a metric of this task; there are val/loss, "):
        check_metrics(settings, expand(settings, STAGES, 17), ["f1"])
    plateau = config([row(schedule="plateau")])
    check_metrics(plateau, expand(plateau, STAGES, 17), [])  # val/loss is always there
    without = config([row()], monitor="val/f9", **NO_VAL)
    check_metrics(without, expand(without, STAGES, 17), [])


def test_a_plan_is_plain_data() -> None:
    plan = planned(small(), train="all", backbone_lr=0.01)
    assert dataclasses.replace(plan) == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.cut = "all"  # type: ignore[misc]
