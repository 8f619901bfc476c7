"""The table of figures in `benchmarks/README.md` is what the files of results give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lit_transfer.tracking import commit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU, GPU = "cpu-some-2-cores", "some-gpu"


@pytest.fixture
def table(import_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return import_benchmark("table")


def write(folder: Path, name: str, machine: str, ratios: dict[str, float], **settings: list[str]) -> None:
    result = {"hardware": machine, "versions": {}, "ratios": ratios} | settings
    (folder / f"{name}-{machine}.json").write_text(json.dumps(result))


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if f"`[{name}]`" in line]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_page_is_what_the_results_give(table: ModuleType) -> None:
    page = (BENCHMARKS / "README.md").read_text()
    assert page == table.with_tables(page, BENCHMARKS / "results"), "run `python benchmarks/table.py`"


def test_files_of_a_machine_share_a_column_and_missed_aims_are_told(table: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "store", CPU, {"stored_epoch": 812.3, "loop_over_bare": 1.2612, "peak_memory": 0.9})
    write(tmp_path, "elpv", CPU, {"elpv_auroc": 0.9442})
    rivals = "time_to_auc_093_worst_rival"
    write(tmp_path, "rivals", CPU, {rivals: 5.0}, lower_bounds=[rivals])
    write(tmp_path, "rivals", GPU, {rivals: 2.5}, lower_bounds=[rivals])
    write(tmp_path, "store", GPU, {"stored_epoch": 99.9, "loop_over_bare": 1.2499})
    text = table.table(tmp_path)
    assert text.splitlines()[0] == f"|  | aim, CPU | aim, GPU | {CPU} | {GPU} |"
    assert cells(text, "stored_epoch") == ["500 or more", "100 or more", "812.3", "99.90 (missed)"]
    assert cells(text, "loop_over_bare") == ["1.25 or less", "1.25 or less", "1.261 (missed)", "1.250"]
    assert cells(text, rivals) == ["5 or more", "3 or more", "at least 5.000", "at least 2.500 (not shown to be met)"]
    assert cells(text, "peak_memory") == ["reported", "reported", "0.9000", "not measured"]
    assert cells(text, "elpv_auroc") == ["0.9442 or more", "0.9442 or more", "0.9442", "not measured"]


def test_a_result_names_its_machine_and_every_figure_is_one_of_the_table(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    path = table.write_result("store", {"loop_over_bare": 1.3}, {"seconds": [1.0]})
    found = json.loads(path.read_text())
    assert path == tmp_path / f"store-{found['hardware']}.json"
    assert found["ratios"] == {"loop_over_bare": 1.3} and found["measured"] == {"seconds": [1.0]}
    assert found["versions"]["torch"] and found["commit"] == commit()
    assert capsys.readouterr().out == "loop_over_bare 1.300 (missed); aim 1.25 or less\n"
    with pytest.raises(AssertionError, match="stored_epochs"):
        table.write_result("store", {"stored_epochs": 1.3}, {})


def test_a_result_without_ratios_has_no_column_but_views_have_a_table(table: ModuleType, tmp_path: Path) -> None:
    assert table.views_tables(tmp_path) == "Not measured."
    rows = [
        {"seed": seed, "accuracy": accuracy, "auroc": 0.9, "val_auroc": 0.93, "seconds": seconds, "building_s": 20.4}
        for seed, accuracy, seconds in ((0, 0.85, 100.0), (1, 0.87, 130.4))
    ]
    result = {"hardware": CPU, "versions": {}, "ratios": {}, "measured": {"runs": {"views 4": rows}}}
    (tmp_path / f"views-{CPU}.json").write_text(json.dumps(result))
    assert table.machines(tmp_path) == {}
    text = table.views_tables(tmp_path)
    assert "| views 4 | 2 | 0.8600 (0.8500 to 0.8700) | 0.9000 (0.9000 to 0.9000) |" in text
    assert "| 115 (100 to 130) | 20 (20 to 20) |" in text
    assert f"(results/views-{CPU}.png)" in text
    marks = ("BEGIN", "END"), ("ELPV_BEGIN", "ELPV_END"), ("VIEWS_BEGIN", "VIEWS_END")
    tables = "between\n".join(f"{getattr(table, begin)}old{getattr(table, end)}\n" for begin, end in marks)
    page = f"# Top\n{tables}end\n"
    made = table.with_tables(page, tmp_path)
    assert text in made and "old" not in made and made.count("\nbetween\n") == 2 and made.endswith("end\n")
    assert table.with_tables(made, tmp_path) == made
