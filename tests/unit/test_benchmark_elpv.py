"""The figures of `benchmarks/elpv.py` are those of the run, and its table has all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from digits import digits, finished_run, tiny_config

from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import pack


@pytest.fixture
def elpv(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("elpv")


def test_figures_are_those_of_the_run_and_of_each_type(
    elpv: ModuleType, import_benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    digits(tmp_path / "cells")
    listing = tmp_path / "cells" / "digits.csv"
    header, *lines = listing.read_text().splitlines()
    types = [f"{line.rpartition(',')[0]},{('mono', 'poly')[i // 2 % 2]}" for i, line in enumerate(lines)]
    listing.write_text("\n".join([header.replace("digit", "type"), *types]))
    out = str(tmp_path / "packed")
    splits = {"train": 0.4, "val": 0.2, "test": 0.4}
    packed = pack(Pack(source=str(listing), out=out, labels=["parity"], splits=splits, stratify=["type"], workers=1))
    config = tiny_config(packed.manifest, tmp_path)
    summary = finished_run(replace(config, objective=replace(config.objective, threshold_metric="accuracy")))
    found = elpv.figures(config.run_dir)
    for name in elpv.ELPV_FIGURES:
        assert found["single"]["all"][name] == pytest.approx(summary[f"test/{name}"], abs=1e-6)
    for how in ("single", "averaged"):
        each = [found[how][kind]["accuracy"] for kind in elpv.CELL_TYPES]
        assert min(each[1:]) <= each[0] <= max(each[1:]), "all cells are those of both types"
    assert found["single"] != found["averaged"]
    (tmp_path / "elpv-cpu.json").write_text(json.dumps({"hardware": "cpu", "measured": {"splits": [found, found]}}))
    text = import_benchmark("table").elpv_tables(tmp_path)
    assert f"{found['averaged']['poly']['auroc']:.4f} +- 0.0000" in text and "Deitsch 2019" in text
