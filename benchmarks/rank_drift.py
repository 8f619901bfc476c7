"""Do the ranks stay equal once a backbone is thawed? One network, one dataset and one seed, trained by four tools.

    .venv/bin/python benchmarks/rank_drift.py

Each tool trains the head for 2 epochs on the frozen backbone, then everything for 2 more, on 2 gloo ranks, as its own
documentation says and with its defaults. After every epoch the ranks compare all parameters: the figure is the
largest absolute difference between two ranks, and 0 means equal to the bit. The second figure is how far the running
statistics of the frozen BatchNorm had moved when it was thawed. The result goes to benchmarks/rank_drift.json.

finetuning-scheduler and fastai live in an environment of their own under the user's cache folder, made on the first
run; it borrows torch from this one, so that all are measured on the same build.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

RANKS, EPOCHS, THAW_EPOCH = 2, 4, 2
GLOBAL_BATCH, TRAIN, VAL = 32, 512, 128
HEAD_LR, BACKBONE_LR, SEED = 1e-3, 1e-4, 0
STEPS_PER_EPOCH = TRAIN // GLOBAL_BATCH
RIVALS = ("finetuning-scheduler==2.14.1", "lightning==2.6.6", "fastai==2.8.12", "accelerate==1.15.0")
PACKAGES = ("torch", "pytorch-lightning", *(name.partition("==")[0] for name in RIVALS), "lit_transfer")


class Net(nn.Module):
    """Two convolutions with BatchNorm for digits `[B, 3, 8, 8]`; says where lit_transfer may cut it."""

    stages = (("block1", ("block1",)), ("block2", ("block2",)))
    classifier = "fc"

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.block2 = nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Digits `[B, 3, 8, 8]` in [-1, 1] -> logits `[B, 10]`."""
        return self.fc(self.block2(self.block1(images)))  # type: ignore[no-any-return]


def start() -> Net:
    """The weights that every tool begins with."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return Net()


class Digits:
    """The pictures as a map-style dataset, for `lit_transfer` to pack."""

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # the rivals' programs read tensors and do without

        digits = load_digits()
        self.images, self.labels = (digits.images * 15).astype("uint8"), digits.target

    def __len__(self) -> int:
        return TRAIN + VAL

    def __getitem__(self, index: int) -> dict[str, Any]:
        split = "train" if index < TRAIN else "val"
        return {"image": self.images[index], "label": int(self.labels[index]), "split": split}


def spread(rows: Tensor) -> float:
    """The largest absolute difference between two rows of `[ranks, values]`."""
    return float((rows.amax(0) - rows.amin(0)).max())


def rank_difference(parameters: Iterable[nn.Parameter]) -> float:
    """The largest absolute difference of a parameter between two ranks; every rank must call it."""
    mine = torch.cat([parameter.detach().flatten() for parameter in parameters])
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return spread(torch.stack(rows))


class Measure:
    """What is measured at the end of each epoch, on every rank; `rows` holds one mapping an epoch."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        self.backbone, self.head = backbone, head
        self.before = self._values("running"), self._values("weight")
        self.rows: list[dict[str, float]] = []

    def __call__(self) -> None:
        """Measure now; every rank must call it."""
        self.rows.append(
            {
                "backbone": rank_difference(self.backbone.parameters()),
                "head": rank_difference(self.head.parameters()),
                "statistics_moved": float((self._values("running") - self.before[0]).abs().max()),
                "backbone_moved": float((self._values("weight") - self.before[1]).abs().max()),
            }
        )

    def _values(self, kind: str) -> Tensor:
        state = self.backbone.state_dict()
        return torch.cat([tensor.flatten() for name, tensor in state.items() if kind in name])


def watcher(base: type, measure: Measure) -> Any:
    """A Lightning callback that measures each time an epoch's steps are done, however the tool counts its epochs."""

    class Watcher(base):  # type: ignore[misc]  # pytorch_lightning's and lightning's differ
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step % STEPS_PER_EPOCH == 0:
                measure()

    return Watcher()


def loaders(folder: Path, batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation batches of the tensors that the driver wrote."""
    train, val = torch.load(folder / "digits.pt", weights_only=True)
    shuffled = DataLoader(TensorDataset(*train), batch_size=batch_size, shuffle=True)
    return shuffled, DataLoader(TensorDataset(*val), batch_size=batch_size)


def fit_with_lightning(pl: ModuleType, callback: Any, folder: Path) -> Measure:
    """Train by a Lightning whose callback does the freezing and thawing."""

    class Classifier(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            net = start()
            self.backbone, self.head = nn.Sequential(net.block1, net.block2), net.fc

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.head.parameters(), lr=HEAD_LR, weight_decay=0)

    pl.seed_everything(SEED)
    module = Classifier()
    measure = Measure(module.backbone, module.head)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        max_epochs=EPOCHS,
        callbacks=[callback, watcher(pl.Callback, measure)],
        default_root_dir=folder / "lightning",
        enable_progress_bar=False,
    )
    trainer.fit(module, *loaders(folder, GLOBAL_BATCH // RANKS))
    return measure


def backbone_finetuning(folder: Path) -> Measure:
    """Lightning's `BackboneFinetuning`, its defaults but for the epoch."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import BackboneFinetuning

    return fit_with_lightning(pl, BackboneFinetuning(unfreeze_backbone_at_epoch=THAW_EPOCH), folder)


def finetuning_scheduler(folder: Path, **options: Any) -> Measure:
    """finetuning-scheduler with an explicit schedule of two phases, its defaults but for `options`."""
    import lightning.pytorch as pl
    from finetuning_scheduler import FinetuningScheduler

    schedule = {
        0: {"params": ["head.*"], "max_transition_epoch": THAW_EPOCH},
        1: {"params": ["backbone.*"], "lr": BACKBONE_LR},
    }
    return fit_with_lightning(pl, FinetuningScheduler(ft_schedule=schedule, **options), folder)


def fastai(folder: Path) -> Measure:
    """fastai's `fine_tune`, which wraps the network anew for each of its two fits."""
    import fastai.callback.schedule  # noqa: F401 - gives Learner its fine_tune
    from fastai.basics import Callback, DataLoaders, Learner, params, set_seed
    from fastai.distributed import DistributedDL

    def broadcast(self: Any, indices: list[int], rank: int) -> list[int]:
        shared = torch.tensor(indices)
        dist.broadcast(shared, rank)
        return shared.tolist()

    DistributedDL._broadcast = broadcast  # fastai's own goes through CUDA, which gloo does not need
    set_seed(SEED)
    net = start()
    backbone = nn.Sequential(net.block1, net.block2)
    measure = Measure(backbone, net.fc)

    class Watcher(Callback):  # type: ignore[misc]
        def after_train(self) -> None:
            measure()

    train, val = torch.load(folder / "digits.pt", weights_only=True)
    batches = DataLoaders.from_dsets(TensorDataset(*train), TensorDataset(*val), bs=GLOBAL_BATCH // RANKS, device="cpu")
    learner = Learner(
        batches,
        net,
        loss_func=nn.CrossEntropyLoss(),
        splitter=lambda _: [params(backbone), params(net.fc)],
        cbs=[Watcher()],
    )
    with learner.distrib_ctx(sync_bn=False, cpu=True):  # there is no SyncBatchNorm on the CPU
        learner.fine_tune(EPOCHS - THAW_EPOCH, base_lr=HEAD_LR, freeze_epochs=THAW_EPOCH)
    return measure


def our_settings(folder: Path) -> dict[str, Any]:
    """The config of our run: two phases, the head and then all of it."""
    head = {"name": "head", "train": "head", "max_epochs": THAW_EPOCH, "lr": HEAD_LR}
    thaw = {"name": "thaw", "train": "all", "max_epochs": EPOCHS - THAW_EPOCH, "lr": HEAD_LR}
    streams = {split: {"manifest": str(folder / "packed"), "split": split} for split in ("train", "val")}
    return {
        "name": "rank_drift",
        "runs_dir": str(folder / "runs"),
        "seed": SEED,
        "data": streams | {"workers": 0},
        "image": {"size": 8, "crop": 1.0, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
        "model": {"backbone": "rank_drift:start", "weights": "none"},
        "phases": [row | {"global_batch": GLOBAL_BATCH} for row in (head, thaw | {"backbone_lr": BACKBONE_LR})],
        "trainer": {"accelerator": "cpu", "devices": RANKS, "progress": False},
        "tracking": {"wandb": "off"},
    }


def ours(folder: Path) -> Measure:
    """lit_transfer, from the same weights of the head, too."""
    import pytorch_lightning as pl

    from lit_transfer.config import Config
    from lit_transfer.launch.train import prepare_job
    from lit_transfer.phases.run import run_phases
    from lit_transfer.reading import parse

    job, plans = prepare_job(parse(Config, our_settings(folder)))
    job.network.head.get_submodule("logits").load_state_dict(start().fc.state_dict())
    measure = Measure(job.network.backbone, job.network.head)
    run_phases(job, plans, callbacks=[watcher(pl.Callback, measure)])
    return measure


TOOLS: dict[str, Callable[[Path], Measure]] = {
    "BackboneFinetuning": backbone_finetuning,
    "finetuning-scheduler": finetuning_scheduler,
    "finetuning-scheduler, restore_best=False": partial(finetuning_scheduler, restore_best=False),
    "fastai": fastai,
    "lit_transfer": ours,
}


def train(tool: str, folder: Path) -> None:
    """One rank of one tool; rank 0 leaves rows and versions in `result.json`."""
    measure = TOOLS[tool](folder)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        (folder / "result.json").write_text(json.dumps({"epochs": measure.rows, "versions": versions(PACKAGES)}))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed here."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def rivals_python() -> str:
    """The interpreter of the rivals' environment; makes it if it is not there."""
    key = hashlib.sha256(f"{RIVALS}{sys.prefix}{sys.version}{torch.__version__}".encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = cache / "lit_transfer" / f"rivals-{key}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file():
        print(f"making the rivals' environment in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        inside = sysconfig.get_path("purelib", vars={"base": str(folder)})
        (Path(inside) / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        subprocess.run([python, "-m", "pip", "install", "-qq", *RIVALS], check=True)
        ready.touch()
    return str(python)


def write_digits(folder: Path) -> None:
    """The pictures twice: packed for lit_transfer, and as the tensors that it makes of them for the others."""
    from lit_transfer.data.packing.items import Pack
    from lit_transfer.data.packing.pack import pack

    digits = Digits()
    pack(Pack(source="rank_drift:Digits", out=str(folder / "packed"), workers=1))
    images = (torch.from_numpy(digits.images).float() / 255 - 0.5) / 0.5
    images, labels = images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(digits.labels)
    splits = [slice(0, TRAIN), slice(TRAIN, TRAIN + VAL)]
    torch.save([(images[split].clone(), labels[split].clone()) for split in splits], folder / "digits.pt")


def run(tool: str) -> dict[str, Any]:
    """Train with one tool in processes of its own; what rank 0 wrote.

    Raises:
        RuntimeError: the tool failed; with the end of what it printed.
    """
    python = rivals_python() if tool.startswith(("finetuning-scheduler", "fastai")) else sys.executable
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"] if tool == "fastai" else []
    environment = {name: text for name, text in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digits(folder)
        command = [python, *launcher, str(Path(__file__).absolute()), "--train", tool, str(folder)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{tool} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def table(tools: dict[str, list[dict[str, float]]]) -> str:
    """The largest difference between ranks by tool and epoch, in Markdown."""
    epochs = [f"epoch {i + 1}, {'frozen' if i < THAW_EPOCH else 'thawed'}" for i in range(EPOCHS)]
    lines = [["", *epochs, "frozen BatchNorm moved"], ["---", *["---:"] * (EPOCHS + 1)]]
    for tool, rows in tools.items():
        figures = [max(row["backbone"], row["head"]) for row in rows]
        lines.append([tool, *(f"{figure:.2g}" for figure in (*figures, rows[THAW_EPOCH - 1]["statistics_moved"]))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Train with all tools, print the table and write benchmarks/rank_drift.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs=2, metavar=("TOOL", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train[0], Path(options.train[1]))
        return
    from lit_transfer.files import write_json

    results = {}
    for tool in TOOLS:
        print(f"training with {tool}", flush=True)
        results[tool] = run(tool)
    rows = {tool: result["epochs"] for tool, result in results.items()}
    found = {name: text for result in results.values() for name, text in result["versions"].items()}
    settings = {"ranks": RANKS, "epochs": EPOCHS, "thaw_epoch": THAW_EPOCH, "steps_per_epoch": STEPS_PER_EPOCH}
    write_json(Path(__file__).with_suffix(".json"), settings | {"versions": found, "tools": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
