"""What `rivals.py` has every tool train on, and the runs: kept as files, one a tool, setting and seed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rank_drift import rivals_python
from table import hardware

from lit_transfer.config import Augment, Config
from lit_transfer.data.store import ShardReader
from lit_transfer.data.streams import Samples
from lit_transfer.errors import require
from lit_transfer.files import finite_or_null, write_json, write_text
from lit_transfer.launch.train import prepare_setup
from lit_transfer.phases.job import Setup
from lit_transfer.reading import load, to_plain, to_yaml
from lit_transfer.schedule import Phase
from lit_transfer.tracking import commit

EPOCHS = 8  # of a rival's schedule where that has a length
OURS = "lit_transfer"
RIVALS = ("BackboneFinetuning", "finetuning-scheduler", "fastai", "timm")
GRID = {"default": 1.0, "higher": 3.0, "lower": 1 / 3}
PROGRAM = Path(__file__).with_name("rivals_programs.py").absolute()

Record = dict[str, Any]


def comparable_setup(path: Path, fraction: float) -> Setup:
    """What our config trains, its phases a plain list.

    Args:
        path: of the config.
        fraction: of the samples of each stream.

    Raises:
        UserError: the rivals cannot do the same.
    """
    config = load(path, cls=Config)
    data = config.data
    require(data.val is not None, f"{path} has no data.val, on which the time is measured; add it.")
    assert data.val
    train, val = (replace(stream, fraction=fraction) for stream in (data.train, data.val))
    setup: Setup
    setup, plans = prepare_setup(replace(config, data=replace(data, train=train, val=val)))
    backbone, augment = config.model.backbone, config.augment
    require(backbone.startswith("timm/"), f"model.backbone {backbone} is not of timm, as the rivals' is; name another.")
    known = Augment(flip_h=augment.flip_h, flip_v=augment.flip_v, quarter_turns=augment.quarter_turns)
    require(augment == known, f"augment of {path} has more than flips and quarter turns, which rivals lack; remove it.")
    batches = {plan.phase.global_batch for plan in plans}
    require(len(batches) == 1, f"phases of {path} have global_batch {sorted(batches)}; give all the rivals' one.")
    every = {plan.phase.validate_every_steps for plan in plans} - {None}
    require(not every, f"validate_every_steps {every} of {path}: rivals validate each epoch; remove it.")
    return setup


def task_of(setup: Setup, auc: float) -> Record:
    """What all tools have in common, as plain values; `auc` is the aim."""
    config, phases = setup.config, setup.config.phases
    assert isinstance(phases, list), "expanded"
    train, val = setup.streams["train"], setup.streams["val"]
    classes = train.manifest.classes(config.data.label)
    require(len(classes) == 2, f"the rivals' AUC is of two classes, but {train.manifest.name} has {len(classes)}.")
    return {
        "auc": auc,
        "hardware": hardware(),
        "backbone": config.model.backbone.removeprefix("timm/"),
        "weights_sha256": setup.network.backbone.provenance["sha256"],
        "dataset_digest": train.manifest.digest,
        "samples": {"train": len(train.rows), "val": len(val.rows)},
        "classes": len(classes),
        **setup.preprocessing.to_plain(),
        **{key: getattr(config.augment, key) for key in ("flip_h", "flip_v", "quarter_turns")},
        "batch": phases[0].global_batch,
        "workers": config.data.workers,
        "epochs": EPOCHS,
    }


def write_material(folder: Path, setup: Setup, task: Record) -> None:
    """The pictures as files, a folder a class, and the weights as a state_dict; kept if they are there.

    Raises:
        UserError: the folder holds those of another task.
    """
    mark = folder / "task.json"
    if mark.is_file():
        check_same(mark, json.loads(mark.read_text()), task)
        return
    shutil.rmtree(folder, ignore_errors=True)
    for split in ("train", "val"):
        _write_pictures(folder / split, setup.streams[split])
    torch.save(setup.network.backbone.net.state_dict(), folder / "weights.pt")
    write_json(mark, task)  # last: it says that all is there


def _write_pictures(folder: Path, samples: Samples) -> None:
    """The files of a stream, byte for byte; Pillow goes by the content, not by the suffix."""
    reader = ShardReader(samples.manifest)
    for row, label in zip(samples.rows.tolist(), samples.labels.tolist(), strict=True):
        path = folder / str(label) / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.read(row))


def check_same(path: Path, found: Mapping[str, Any], wanted: Record) -> None:
    """Refuse a file that was written for something else."""
    plain = json.loads(json.dumps(finite_or_null(wanted)))
    differing = sorted(key for key in {*found, *plain} if found.get(key) != plain.get(key))
    require(not differing, f"{path} is of another {', '.join(differing)}; remove it, or choose another --folder.")


def at_rates(phase: Phase, factor: float) -> Phase:
    """A phase with all its learning rates times a factor."""
    lr, backbone_lr = (None if rate is None else rate * factor for rate in (phase.lr, phase.backbone_lr))
    heads = phase.heads and replace(phase.heads, lr=[rate * factor for rate in phase.heads.lr])
    own = phase.train["params"] if isinstance(phase.train, dict) and "params" in phase.train else None
    train = {"params": {key: rate * factor for key, rate in own.items()}} if isinstance(own, dict) else phase.train
    return replace(phase, lr=lr, backbone_lr=backbone_lr, heads=heads, train=train)


class Runs:
    """Finished runs as files.

    Args:
        folder: of the files.
        setup: of our config.
        task: what all tools have in common.
        limit: seconds of a rival, in multiples of what ours took.
        limit_s: the same in seconds, in its place.
    """

    def __init__(self, folder: Path, setup: Setup, task: Record, limit: float, limit_s: float | None) -> None:
        self.folder, self.config, self.task = folder, setup.config, task
        self.limit, self.limit_s = limit, limit_s
        write_material(folder / "material", setup, task)

    def read(self, tool: str, setting: str, seed: int) -> Record | None:
        """A finished run, or None; `UserError` for one of another task or, if it is ours, config."""
        path = self._path(tool, setting, seed)
        if not path.is_file():
            return None
        record: Record = json.loads(path.read_text())
        check_same(path, record["identity"], self._identity(tool))
        return record

    def run(self, tool: str, setting: str, seed: int) -> None:
        """Train with a tool in a process of its own, unless that is done.

        Raises:
            RuntimeError: it failed; with the end of what it printed.
        """
        if self.read(tool, setting, seed):
            return
        limit_s = None if tool == OURS else self._limit_s(seed)
        print(f"{tool}, {setting}, seed {seed}" + (f", limit {limit_s:.0f} s" if limit_s else ""), flush=True)
        request: Record = {"task": self.task, "material": str((self.folder / "material").absolute())}
        request |= {"limit_s": limit_s, "factor": GRID[setting], "seed": seed}
        path = self._path(tool, setting, seed)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            write_json(Path(name) / "request.json", request)
            write_text(Path(name) / "config.yaml", self._config_text(GRID[setting]))
            result = _train(tool, Path(name).absolute(), path.with_suffix(".log"))
        write_json(path, {"identity": self._identity(tool), "commit": commit(), "limit_s": limit_s} | result)

    def _limit_s(self, seed: int) -> float:
        if self.limit_s:
            return self.limit_s
        ours = self.read(OURS, "default", seed)
        require(ours is not None, f"a rival's limit follows from {OURS}, seed {seed}; run it first, or give --limit_s.")
        assert ours
        return self.limit * float(ours["curve"][-1][0])

    def _config_text(self, factor: float) -> str:
        assert isinstance(self.config.phases, list), "expanded"
        return to_yaml(replace(self.config, phases=[at_rates(phase, factor) for phase in self.config.phases]))

    def _identity(self, tool: str) -> Record:
        return self.task | ({"config": to_plain(self.config)} if tool == OURS else {})

    def _path(self, tool: str, setting: str, seed: int) -> Path:
        return self.folder / f"{tool}-{setting}-{seed}.json"


def _train(tool: str, scratch: Path, log: Path) -> Record:
    """What a program leaves in a folder that holds its request."""
    environment = {name: text for name, text in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable if tool == OURS else rivals_python(), str(PROGRAM), tool, str(scratch)]
    with log.open("w") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed:\n{log.read_text()[-4000:]}")
    result: Record = json.loads((scratch / "result.json").read_text())
    return result
