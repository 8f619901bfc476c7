"""What `benchmarks/rank_drift.py` measures is there when it is there, and the page on it says what can be run."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lit_transfer.config import Config
from lit_transfer.config import Trainer as TrainerConfig
from lit_transfer.data.module import ImageData
from lit_transfer.data.streams import open_streams
from lit_transfer.model.augment import eval_input, settle_image
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.network import Layout, Network
from lit_transfer.phases.table import resolve
from lit_transfer.reading import parse, read_yaml
from lit_transfer.recipe import Model
from lit_transfer.schedule import SCHEDULES, Phase, Until

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "rank_drift.py"
PAGE = (ROOT / "docs" / "coming_from.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
PLANTED = """
import json
import torch
import torch.distributed as dist
import rank_drift

dist.init_process_group("gloo")
net = rank_drift.start()
backbone = torch.nn.Sequential(net.block1, net.block2)
measure = rank_drift.Measure(backbone, net.fc)
measure()
with torch.no_grad():
    net.block2[0].weight[3, 2, 1, 0] += 0.25 * dist.get_rank()
    net.fc.bias[7] -= 0.5 * dist.get_rank()
net.block1[1].running_var[5] += 2.0
measure()
if dist.get_rank() == 0:
    print(json.dumps(measure.rows))
dist.destroy_process_group()
"""


@pytest.fixture
def rank_drift(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, importable by its name as it is when it runs."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("rank_drift")


def by_value(images: torch.Tensor, labels: torch.Tensor) -> list[list[float]]:
    """Pictures with their labels in an order of their own: packing shuffles them."""
    return sorted(torch.cat([images.flatten(1), labels[:, None].float()], 1).tolist())


def test_a_planted_drift_is_found_where_it_was_planted(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(tmp_path / "planted.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = json.loads(done.stdout)
    assert set(before.values()) == {0.0}
    expected = {"backbone": 0.25, "head": 0.5, "statistics_moved": 2.0, "backbone_moved": 0.0}
    assert after == pytest.approx(expected, abs=1e-6)


def test_ours_does_not_drift_and_trains_what_it_says(rank_drift: ModuleType) -> None:
    rows = rank_drift.run("lit_transfer")["epochs"]
    assert len(rows) == rank_drift.EPOCHS
    assert {row[name] for row in rows for name in ("backbone", "head", "statistics_moved")} == {0.0}
    frozen, thawed = rows[: rank_drift.THAW_EPOCH], rows[rank_drift.THAW_EPOCH :]
    assert all(row["backbone_moved"] == 0 for row in frozen)
    assert all(row["backbone_moved"] > 1e-4 for row in thawed)


def test_all_tools_are_given_the_same_pictures(rank_drift: ModuleType, tmp_path: Path) -> None:
    rank_drift.write_digits(tmp_path)
    config = parse(Config, rank_drift.our_settings(tmp_path))
    streams = open_streams(config.data, config.seed)
    _, preprocessing = settle_image(config.image, config.image)
    data = ImageData(streams, preprocessing, seed=0, global_batch=rank_drift.VAL, first_epoch=0, workers=0)
    batch = next(iter(data.val_dataloader()))
    theirs = torch.load(tmp_path / "digits.pt", weights_only=True)[1]
    assert by_value(eval_input(batch["image"], preprocessing), batch["target"]) == by_value(*theirs)


@pytest.fixture(scope="module")
def layout() -> Layout:
    """The network that the examples speak of."""
    backbone = build_backbone(Model(backbone="torchvision/resnet18", weights="none"), image_size=32, device="meta")
    return Network(backbone, torch.nn.Linear(backbone.features, 2, device="meta")).layout()


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_page_is_a_schedule(example: str, layout: Layout) -> None:
    streams = {name: {"manifest": "packed", "split": name} for name in ("train", "val")}
    plain = {"name": "example", "data": streams, "model": {"backbone": layout.backbone}} | read_yaml(example)
    plans = resolve(parse(Config, plain), layout, samples=1000)
    assert len(plans) == len({plan.phase.name for plan in plans}) > 0


def test_every_key_that_the_page_names_is_there() -> None:
    cells = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("| `") or line.startswith("| a ")]
    named = {
        key for cell in cells for code in re.findall(r"`(.*?)`", cell) for key in re.findall(r"\b([a-z_]+): ", code)
    }
    phase = {*Phase.__dataclass_fields__, *Until.__dataclass_fields__, "from", "last", "params"}
    known = phase | {key for args in SCHEDULES.values() for key in args} | set(TrainerConfig.__dataclass_fields__)
    assert len(named) > 10
    assert named <= known


def test_the_page_shows_what_was_measured(rank_drift: ModuleType) -> None:
    measured = json.loads(SCRIPT.with_suffix(".json").read_text())
    assert list(measured["tools"]) == list(rank_drift.TOOLS)
    assert rank_drift.table(measured["tools"]) in PAGE
