"""Every task keeps its labels, missing ones included, and refuses what does not fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import column, packed, table

from lit_transfer.data.packing.labels import strata
from lit_transfer.errors import UserError


def test_several_class_columns_and_display_names(tmp_path: Path) -> None:
    file = table(tmp_path / "in", "path,a,b", ["1.png,x,10", "2.png,y,9", "3.png,x,"])
    names = tmp_path / "names.csv"
    names.write_text("class,display\nx,A cross\ny,A fork\n9,Nine\n10,Ten\nz,unused\n")
    options: dict[str, Any] = {"labels": ["a", "b"], "splits": {"all": 1.0}}
    manifest = packed(file, tmp_path / "out", display_names=str(names), **options)
    assert manifest.classes("a") == ("x", "y") and manifest.display("a") == ("A cross", "A fork")
    assert manifest.classes("b") == ("9", "10") and manifest.display("b") == ("Nine", "Ten")
    assert column(manifest, "label.b") == {"1.png": 1, "2.png": 0, "3.png": None}
    names.write_text("class,display\nx,A cross\n")
    with pytest.raises(UserError, match="no display name for 'y'"):
        packed(file, tmp_path / "other", display_names=str(names), **options)
    with pytest.raises(UserError, match="does not have one list of classes"):
        packed(file, tmp_path / "other", classes=["x", "y"], **options)
    with pytest.raises(UserError, match=r"no label column 'aa'; its columns are path, a, b. Did you mean 'a'"):
        packed(file, tmp_path / "other", labels=["aa"])


def test_multilabel_with_missing_cells(tmp_path: Path) -> None:
    file = table(tmp_path / "in", "path,car,tree", ["1.png,1,0", "2.png,,1", "3.png,,", "4.png,0,TRUE"])
    options: dict[str, Any] = {"task": "multilabel", "labels": ["car", "tree"], "splits": {"all": 1.0}}
    manifest = packed(file, tmp_path / "out", **options)
    assert manifest.classes() == ("car", "tree")
    rows = np.argsort(manifest.table["source"].to_numpy())
    expected = np.array([[1, 0], [np.nan, 1], [np.nan, np.nan], [0, 1]], dtype=np.float32)
    assert np.array_equal(manifest.targets()[rows], expected, equal_nan=True)
    table(tmp_path / "in", "path,car,tree", ["1.png,2,0"])
    with pytest.raises(UserError, match=r"label 'car' of sample '1.png' is '2'; multilabel takes 0, 1"):
        packed(file, tmp_path / "other", **options)


def test_ordinal_needs_an_order(tmp_path: Path) -> None:
    file = table(tmp_path / "in", "path,label", ["1.png,mild", "2.png,none", "3.png,severe", "4.png,"])
    options: dict[str, Any] = {"task": "ordinal", "splits": {"all": 1.0}}
    with pytest.raises(UserError, match=r"is ordinal, but its classes mild, none, severe are not numbers"):
        packed(file, tmp_path / "out", **options)
    manifest = packed(file, tmp_path / "out", classes=["none", "mild", "severe"], **options)
    assert column(manifest, "label.label") == {"1.png": 1, "2.png": 0, "3.png": 2, "4.png": None}
    with pytest.raises(UserError, match="'severe', which is not among the 2 classes"):
        packed(file, tmp_path / "other", classes=["none", "mild"], **options)
    numbers = table(tmp_path / "n", "path,label", ["1.png,10", "2.png,-1", "3.png,2.5"])
    assert packed(numbers, tmp_path / "numbers", **options).classes() == ("-1", "2.5", "10")


def test_regression(tmp_path: Path) -> None:
    file = table(tmp_path / "in", "path,age,size", ["1.png,1.5,2", "2.png,,-3e2", "3.png,nan,0"])
    options: dict[str, Any] = {"task": "regression", "labels": ["age", "size"], "splits": {"all": 1.0}}
    manifest = packed(file, tmp_path / "out", **options)
    rows = np.argsort(manifest.table["source"].to_numpy())
    expected = np.array([[1.5, 2], [np.nan, -300], [np.nan, 0]], dtype=np.float32)
    assert np.array_equal(manifest.targets()[rows], expected, equal_nan=True)
    assert np.array_equal(manifest.targets("size")[rows], expected[:, 1:]) and manifest.classes() == (
        "age",
        "size",
    )
    table(tmp_path / "in", "path,age,size", ["1.png,inf,2"])
    with pytest.raises(UserError, match="is 'inf'; regression takes finite numbers"):
        packed(file, tmp_path / "other", **options)


def test_all_labels_missing_is_fine_where_classes_are_given(tmp_path: Path) -> None:
    file = table(tmp_path / "in", "path,label", ["1.png,", "2.png,"])
    manifest = packed(file, tmp_path / "out", classes=["a", "b"], splits={"all": 1.0})
    assert manifest.targets().tolist() == [-1, -1]


def test_strata() -> None:
    types = ["mono", "poly", "mono"]
    assert strata("multiclass", [[0, 1, None]], [types], 3) == [
        [(0, 0, "mono")],
        [(0, 1, "poly")],
        [(0, None, "mono")],
    ]
    assert strata("multilabel", [[1, 0, None], [1, 0, 1]], [], 3) == [
        [(0, 1), (1, 1)],
        [(-1, None)],
        [(1, 1)],
    ]
    assert strata("regression", [[1.0, 9.0, None]], [], 3) == [[(0, 0)], [(0, 5)], [(0, None)]]
    assert strata("none", [], [types], 3) == [
        [(-1, None, "mono")],
        [(-1, None, "poly")],
        [(-1, None, "mono")],
    ]
