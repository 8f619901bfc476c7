"""Samples of one group, such as views of one thing: cross-validation never fits to some and holds others out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from digits import digits, fine_tuning
from numpy.typing import NDArray

from lit_transfer.blocks import FeaturesConfig
from lit_transfer.comparison import fit_heads
from lit_transfer.config import Stream
from lit_transfer.data.streams import Samples, open_stream
from lit_transfer.errors import UserError
from lit_transfer.features.fitting import Choosing, Training, check_targets, fit_head, make_folds
from lit_transfer.features.initialise import check_start, fit_linear_head
from lit_transfer.features.table import FeatureTable, groups_of
from lit_transfer.reading import parse

VIEWS = 10
GROUPS = np.repeat(np.arange(30), VIEWS)
CLASSES = (GROUPS % 3 == 0).astype(np.int64)


def views(seed: int = 0) -> NDArray[np.float64]:
    """Ten views each of 30 things, all alike but for noise, which say nothing of their class."""
    random = np.random.default_rng(seed)
    things = random.normal(size=(30, 6))
    return things[GROUPS] + 0.01 * random.normal(size=(300, 6))


@pytest.mark.parametrize("name", ["knn", "rbf_svm", "logistic_regression"])
def test_what_is_learned_by_heart_does_not_count(name: str) -> None:
    choosing = Choosing("auroc", 5, 0)
    alone = Training("multiclass", views(), CLASSES, None, (6,))
    scores = [fit_head(name, given, choosing).score for given in (alone, replace(alone, groups=GROUPS))]  # type: ignore[arg-type]
    assert scores[1] < 0.75
    assert scores[0] > 0.99 or name == "logistic_regression"
    assert scores[0] > scores[1]


def test_folds_tear_no_group_and_have_every_class() -> None:
    folds = make_folds(CLASSES, GROUPS, Choosing("accuracy", 5, 0))
    assert len(folds) == 5 and sorted(np.concatenate([held for _, held in folds])) == list(range(300))
    for fitted, held in folds:
        assert not set(GROUPS[fitted]) & set(GROUPS[held])
        assert set(CLASSES[fitted]) == set(CLASSES[held]) == {0, 1}
    few = np.where(CLASSES == 0, GROUPS % 3, GROUPS)  # two groups of the first class
    assert len(make_folds(CLASSES, few, Choosing("accuracy", 5, 0))) == 2
    with pytest.raises(UserError, match=r"^the 3 groups of the training samples cannot be dealt into 2 folds that"):
        make_folds(np.array([0, 1, 1, 2, 2, 0]), np.array([0, 0, 1, 1, 2, 2]), Choosing("accuracy", 5, 0))


def test_a_class_of_one_group_is_refused() -> None:
    with pytest.raises(UserError, match=r"class b has 1 training group\(s\) of samples, but cross-validation needs 2"):
        check_targets("multiclass", np.array([0, 0, 1, 1]), ["a", "b"], np.array([0, 1, 2, 2]))
    labels = np.array([[0.0], [0.0], [1.0], [1.0]])
    with pytest.raises(UserError, match=r"label a has 1 training group\(s\) of samples without it"):
        check_targets("multilabel", labels, ["a"], np.array([0, 0, 1, 2]))
    with pytest.raises(UserError, match=r"class a has 1 training group\(s\)"):
        fit_linear_head("multiclass", torch.zeros(4, 2), np.array([0, 0, 1, 1]), None, ("a", "b"), 0, np.arange(4) // 2)


def grouped(folder: Path, groups: list[str | None]) -> Samples:
    """The training digits with groups by their place."""
    manifest = digits(folder / "digits")
    samples = open_stream(Stream(manifest=str(manifest.path), split="train"), None, seed=0)
    column: list[str | None] = [None] * manifest.table.num_rows
    for row, group in zip(samples.rows, groups, strict=True):
        column[row] = group
    place = manifest.table.column_names.index("group")
    table = manifest.table.set_column(place, "group", pa.array(column, pa.string()))
    return replace(samples, manifest=replace(manifest, table=table))


def test_groups_are_those_of_the_manifest_and_who_has_none_stands_alone(tmp_path: Path) -> None:
    samples = grouped(tmp_path, ["a", "b", "a", None, None, *"cdefghijklmnopqrstu"])
    found = groups_of(samples, samples.rows)
    assert found is not None and found[0] == found[2] and len(set(found)) == 23
    part = groups_of(samples, samples.rows[[4, 2, 0, 3]])
    assert part is not None and len({*part}) == 3 and part[1] == part[2]
    assert groups_of(samples, samples.rows[1:]) is None, "no two share one"


def test_heads_of_a_dataset_are_fitted_by_its_groups(tmp_path: Path) -> None:
    """Also the start of a head; each class is one group here, which no fold may tear apart."""
    samples = grouped(tmp_path, ["a", "b"] * 12)
    samples = replace(samples, targets=np.zeros_like(samples.targets))
    samples.targets[samples.rows] = np.arange(24) % 2
    stream = {"manifest": str(samples.manifest.path), "split": "train"}
    plain = {"name": "a", "data": {"train": stream}, "backbones": [{"model": {"backbone": "timm/test_resnet"}}]}
    config = parse(FeaturesConfig, plain | {"heads": ["lda"], "progress": False})
    features = FeatureTable(samples, samples.rows, torch.randn(24, 4))
    with pytest.raises(UserError, match="the 2 groups of the training samples cannot be dealt"):
        fit_heads(config, {"train": features}, [4])


def test_a_start_that_groups_forbid_is_refused_before_any_work(tmp_path: Path) -> None:
    samples = grouped(tmp_path, ["a"] * 24)
    config = fine_tuning(samples.manifest, tmp_path, [{"name": "head", "max_epochs": 1, "lr": 0.01}])
    check_start(config, samples)
    head = replace(config.model.head, init="logistic_regression")
    with pytest.raises(UserError, match=r"has 1 training group\(s\) of samples, but cross-validation needs 2"):
        check_start(replace(config, model=replace(config.model, head=head)), samples)
