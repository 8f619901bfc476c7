"""What the tests of a result share: the digits of scikit-learn packed for any task, and a tiny network."""

from __future__ import annotations

import csv
import functools
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.packing.items import Pack
from lit_transfer.data.packing.pack import pack
from lit_transfer.data.streams import Samples, open_streams
from lit_transfer.evaluation import conclude
from lit_transfer.launch.train import prepare_job
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.heads import build_head
from lit_transfer.model.network import Network
from lit_transfer.model.portable import Description
from lit_transfer.objectives.losses import outputs
from lit_transfer.phases.job import Job
from lit_transfer.phases.run import run_phases
from lit_transfer.phases.table import PhasePlan
from lit_transfer.reading import parse, to_plain
from lit_transfer.recipe import Model
from lit_transfer.tracking import ENVIRONMENT

PREPROCESSING = Preprocessing(
    size=32,
    canvas=36,
    fit="crop",
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
COLUMNS = {
    "multiclass": ["parity"],
    "ordinal": ["step"],
    "multilabel": ["odd", "big"],
    "regression": ["value", "ink"],
}
SHAPES = [
    ("L", (37, 33)),
    ("RGB", (9, 41)),
    ("RGBA", (64, 32)),
    ("P", (33, 33)),
    ("I;16", (20, 31)),
    ("1", (8, 8)),
]


@functools.cache
def _digits() -> Any:
    return load_digits()


def picture(index: int) -> Image.Image:
    """A digit, in turns in another mode, size and shape."""
    mode, size = SHAPES[index % len(SHAPES)]
    image = Image.fromarray((_digits().images[index] * 15).astype("uint8")).resize(size, Image.Resampling.NEAREST)
    return image.point(lambda v: v * 256, "I").convert("I;16") if mode == "I;16" else image.convert(mode)


def digits(root: Path, task: str = "multiclass", count: int = 48, weighted: bool = False, **options: Any) -> Manifest:
    """A packed dataset of digits in splits train, val and test, with the metadata column `digit`."""
    root.mkdir(parents=True)
    lines = ["path,parity,step,odd,big,value,ink,digit" + (",weight" if weighted else "")]
    for i in range(count):
        label = int(_digits().target[i])
        picture(i).save(root / f"{i}.png")
        weight = f",{0.5 + i % 3}" if weighted else ""
        names = f"{('even', 'odd')[label % 2]},{label // 4},{label % 2},{int(label > 4) if i % 7 else ''}"
        lines.append(f"{i}.png,{names},{label},{_digits().images[i].mean():.3f},{label}{weight}")
    (root / "digits.csv").write_text("\n".join(lines) + "\n")
    splits = {"train": 0.5, "val": 0.25, "test": 0.25}
    source, out = str(root / "digits.csv"), str(root / "packed")
    settings = {"labels": COLUMNS[task], "task": task, "splits": splits, "workers": 1} | options
    return pack(Pack(source=source, out=out, **settings)).manifest


def tiny_config(manifest: Manifest, runs: Path) -> Config:
    """A run of one short phase of a tiny network."""
    streams = {name: {"manifest": str(manifest.path), "split": name} for name in ("train", "val", "test")}
    return parse(
        Config,
        {
            "name": "tiny",
            "runs_dir": str(runs),
            "data": streams | {"workers": 0},
            "image": {"size": 32, "crop": 0.9},
            "model": {
                "backbone": "timm/test_resnet",
                "weights": "none",
                "head": {"hidden": [8], "dropout": 0.2},
            },
            "phases": [{"name": "head", "max_epochs": 1, "lr": 0.01, "global_batch": 16}],
            "activations": {"store": "off"},
            "trainer": {"progress": False, "accelerator": "cpu"},
            "tracking": {"wandb": "off"},
        },
    )


def fine_tuning(manifest: Manifest, runs: Path, phases: list[dict[str, Any]], **sections: Any) -> Config:
    """A run of given phases of a tiny network with BatchNorm, whose every step is logged."""
    plain = to_plain(tiny_config(manifest, runs))
    plain |= {"model": {"backbone": "timm/test_efficientnet", "weights": "none"}, "phases": phases}
    plain["trainer"]["log_every_steps"] = 1
    return parse(Config, plain | sections)


def metric_rows(config: Config) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with (config.run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tiny_network(model: Model, task: str, classes: int) -> Network:
    """A network with random weights whose outputs differ between pictures."""
    torch.manual_seed(0)
    backbone = build_backbone(model, image_size=PREPROCESSING.size)
    network = Network(backbone, build_head(model.head, backbone.features, outputs(task, classes), seed=0))
    with torch.no_grad():
        for (
            name,
            buffer,
        ) in network.named_buffers():  # fresh running statistics would hide that they were lost
            if "running" in name:
                buffer.sub_(0.1 * torch.rand_like(buffer))
        logits = network.head.get_submodule("logits")
        assert isinstance(logits, nn.Linear)
        logits.weight.normal_(std=10.0)
        logits.bias.sub_(network.eval()(torch.randn(16, 3, PREPROCESSING.size, PREPROCESSING.size)).mean(0))
    return network.eval()


def streams_of(config: Config) -> dict[str, Samples]:
    return open_streams(config.data, config.seed)


def describe(config: Config, manifest: Manifest, threshold: list[float] | None = None) -> Description:
    """The description of a network for a dataset, with a provenance as a run writes it."""
    return Description(
        task=manifest.task,
        label=None,
        classes=manifest.classes(),
        display=manifest.display(),
        threshold=threshold,
        preprocessing=PREPROCESSING,
        model=config.model,
        provenance={
            "run_id": "tiny-00000000",
            "commit": None,
            "versions": {"torch": torch.__version__},
            "dataset": {"digest": manifest.digest, "samples": manifest.splits},
            "weights": {
                "weights": "file:net.pth",
                "origin": "file:net.pth",
                "sha256": "ab" * 32,
                "licence": None,
            },
            "config": {"name": config.name},
            "metrics": {"test/accuracy": 0.75, "test/auroc": float("nan"), "val/accuracy": 1.0},
        },
    )


def prepared(config: Config, **changes: Any) -> tuple[Job, list[PhasePlan]]:
    """A run made, or opened again, as `train` would in a process of its own."""
    job, plans = prepare_job(config, **changes)
    os.environ.pop(ENVIRONMENT)
    return job, plans


def finished_run(config: Config) -> dict[str, Any]:
    """Train and conclude a run; returns its summary."""
    job, plans = prepared(config)
    return conclude(job, run_phases(job, plans))
