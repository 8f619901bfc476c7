"""Named streams of samples as data loaders: which rows a stream has, and batches in the order of the plan."""

from __future__ import annotations

import math
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_transfer.config import Cache, Data, Order, Stream
from lit_transfer.data import plan
from lit_transfer.data.cache import ShardCache, default_folder
from lit_transfer.data.decode import DecodeError, Preprocessing, decode
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.order import class_weights, epoch_rows
from lit_transfer.data.quarantine import DamagedSample
from lit_transfer.data.store import ShardReader
from lit_transfer.errors import UserError, nearest, require

DRAWS = 16
"""Random numbers per sample and epoch that a training batch carries for augmentation."""

SUBSTITUTES = 10
"""Samples that are tried in the place of a damaged one, itself included."""


@dataclass(frozen=True)
class Samples:
    """A stream opened: the labelled rows of a split.

    Args:
        manifest: the dataset.
        rows: manifest rows of the stream, [N], ascending.
        targets: of every manifest row: int64 [M] with -1 for missing, or float32 [M, K] with NaN for missing.
        unlabelled: samples of the split that were left out because no label is known.
    """

    manifest: Manifest
    rows: plan.Rows
    targets: NDArray[Any]
    unlabelled: int

    @property
    def weights(self) -> NDArray[np.float32]:
        """Of every manifest row, [M]; mapped, not held."""
        return np.asarray(self.manifest.table["weight"].to_numpy())

    @property
    def labels(self) -> Tensor:
        """The stream's own targets, [N] or [N, K], in the order of `rows`."""
        return torch.from_numpy(self.targets[self.rows])

    def entries(self, rows: plan.Rows) -> int:
        """How many labelled entries the targets of some rows have."""
        targets = self.targets[rows]
        return int(np.count_nonzero(targets >= 0 if targets.ndim == 1 else ~np.isnan(targets)))


def open_stream(stream: Stream, label: str | None, seed: int, cache: ShardCache | None = None) -> Samples:
    """Open one stream of a config; `cache` holds what of it lies on another machine.

    Raises:
        UserError: the manifest, the split or the label column is missing, or no sample has a label.
    """
    manifest = Manifest.open(stream.manifest, cache)
    names = [known.name for known in manifest.labels]
    require(bool(names), f"{manifest.name} has no labels; training and evaluation need a labelled dataset.")
    require(
        label is None or label in names,
        f"data.label '{label}' is not a label column of {manifest.name}; it has {', '.join(names)}."
        + nearest(label or "", names),
    )
    rows = manifest.rows(stream.split)
    targets = manifest.targets(label)
    known = targets[rows] >= 0 if targets.ndim == 1 else ~np.isnan(targets[rows]).all(axis=1)
    labelled = rows[known]
    require(len(labelled) > 0, f"no sample of split '{stream.split}' of {manifest.name} has a label.")
    if stream.fraction < 1:
        order = plan.shuffled(labelled, manifest.digest, seed, "fraction")
        labelled = np.sort(order[: plan.share(len(labelled), stream.fraction)])
    return Samples(manifest, labelled, targets, len(rows) - int(known.sum()))


def open_streams(data: Data, seed: int) -> dict[str, Samples]:
    """Open `train`, and `val` and `test` where given; all must have the task and classes of `train`."""
    named = {"train": data.train, "val": data.val, "test": data.test}
    cache = shard_cache(data.cache)
    streams = {
        name: open_stream(stream, data.label, seed, cache) for name, stream in named.items() if stream is not None
    }
    train = streams["train"].manifest
    for name, samples in streams.items():
        manifest, classes = samples.manifest, train.classes(data.label)
        check_same_labels(f"data.{name}", manifest, data.label, "data.train", train.task, classes)
    return streams


def shard_cache(settings: Cache) -> ShardCache:
    """The cache that a config asks for."""
    folder = default_folder() if settings.folder is None else Path(settings.folder)
    return ShardCache(folder, limit_bytes=int(settings.limit_gb * 1e9), timeout_s=settings.timeout_s)


def check_same_labels(
    name: str, manifest: Manifest, label: str | None, other: str, task: str, classes: tuple[str, ...]
) -> None:
    """Refuse a dataset whose task, label columns or classes are not those of another, or of a model.

    Args:
        name: of the dataset, for people.
        manifest: the dataset.
        label: its label column, where it has several.
        other: what it must agree with, for people.
        task: of that.
        classes: of that, in order; for multilabel and regression the label columns.
    """
    require(
        manifest.task == task,
        f"{name} is a {manifest.task} dataset but {other} is {task}; use a dataset of that task.",
    )
    ours = manifest.classes(label)
    missing = [c for c in classes if c not in ours]
    extra = [c for c in ours if c not in classes]
    require(
        ours == classes,
        f"{name} and {other} do not have the same columns or classes in the same order: "
        f"missing {missing}, extra {extra}; prepare the dataset with the same classes.",
    )


class SampleDataset(Dataset[dict[str, Any]]):
    """Decodes one `plan.Batch` at a time.

    An item has `image` uint8 [B, 3, canvas, canvas], `target`, `weight` [B], `row` [B], `valid` [B] (False where
    padded), `entries` (labelled ones of the whole step), `damaged` (what is known of each damaged sample), and for
    training `epoch` and `uniform` [B, DRAWS] for augmentation. A damaged sample is replaced by another of the stream
    in training, the same one wherever it is met in an epoch; elsewhere its place is padded.
    """

    def __init__(
        self,
        samples: Samples,
        preprocessing: Preprocessing,
        augment_seed: int | None,
        balance: str = "none",
    ) -> None:
        self.samples = samples
        self.preprocessing = preprocessing
        self.augment_seed = augment_seed
        self.balance = balance
        self.reader = ShardReader(samples.manifest)

    def __getitem__(self, batch: plan.Batch) -> dict[str, Any]:
        valid = batch.rows != plan.PADDING
        # A padded place repeats a picture: a black one would shift the statistics of `norm: batch`.
        rows = np.where(valid, batch.rows, (batch.rows[valid] if valid.any() else self.samples.rows)[0])
        damaged: dict[int, dict[str, Any]] = {}
        pictures = [self._picture(int(row), batch.epoch, damaged) for row in rows]
        used = np.array([row for row, _ in pictures])
        if self.augment_seed is None:
            valid &= ~np.isin(rows, list(damaged))
        item = {
            "image": torch.from_numpy(np.stack([image for _, image in pictures])),
            "target": torch.from_numpy(self.samples.targets[used]),
            "weight": torch.from_numpy(self._weights(used)),
            "row": torch.from_numpy(np.where(valid, rows, plan.PADDING)),
            "valid": torch.from_numpy(valid),
            "entries": torch.tensor(batch.entries),
            "damaged": [damaged[row] for row in dict.fromkeys(batch.rows.tolist()) if row in damaged],
        }
        if self.augment_seed is not None:
            item["epoch"] = torch.tensor(batch.epoch)
            item["uniform"] = torch.from_numpy(plan.uniforms(self.augment_seed, batch.epoch, rows, DRAWS))
        return item

    def _picture(self, row: int, epoch: int, damaged: dict[int, dict[str, Any]]) -> tuple[int, NDArray[np.uint8]]:
        """A row's canvas, or that of the row that replaces it; what is damaged is added to `damaged`."""
        for attempt in range(SUBSTITUTES):
            used = row if attempt == 0 else plan.substitute(self.samples.rows, row, epoch, attempt)
            try:
                return used, decode(self.reader.read(used), self.preprocessing)
            except (DamagedSample, DecodeError) as error:
                if attempt == 0:
                    damaged[row] = self._damage(row, error)
        raise UserError(
            f"{damaged[row]['address']}: sample {damaged[row]['key']} and {SUBSTITUTES - 1} others that could stand in "
            "for it are damaged; run `lit-transfer prepare --verify` on the dataset."
        )

    def _damage(self, row: int, error: Exception) -> dict[str, Any]:
        address, offset = self.reader.place(row)
        reason = error.reason if isinstance(error, DamagedSample) else str(error)
        key = self.samples.manifest.table["key"][row].as_py()
        return {"key": key, "address": address, "offset": offset, "reason": reason}

    def _weights(self, rows: plan.Rows) -> NDArray[np.float32]:
        """Weights in the loss; ones where the rows are drawn by their weights already."""
        return np.ones(len(rows), np.float32) if self.balance == "weights" else self.samples.weights[rows]


class TrainSampler(Sampler[plan.Batch]):
    """One rank's batches of some steps of a phase: where it goes on is one counter, the same on every rank.

    Args:
        samples: what is trained on.
        seed: of the order.
        global_batch: samples of a step.
        steps: of the phase, counted from 0; an epoch ends whenever all its samples have been seen.
        order: of an epoch.
        parts: in which a step is computed, one batch each.
        first_epoch: epochs of earlier phases.
        rank: this one.
        ranks: of all nodes.
    """

    def __init__(  # noqa: PLR0913 - a pure function of all these
        self,
        samples: Samples,
        *,
        seed: int,
        global_batch: int,
        steps: range,
        order: Order | None = None,
        parts: int = 1,
        first_epoch: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.samples = samples
        self.seed = seed
        self.global_batch = global_batch
        self.steps = steps
        self.order = order or Order()
        self.parts = parts
        self.first_epoch = first_epoch
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(self.steps) * self.parts

    def __iter__(self) -> Iterator[plan.Batch]:
        per_epoch = plan.steps_per_epoch(len(self.samples.rows), self.global_batch, self.order.last_batch)
        order, order_epoch = self.samples.rows, None
        for phase_step in self.steps:
            phase_epoch, step = divmod(phase_step, per_epoch)
            epoch = self.first_epoch + phase_epoch
            if epoch != order_epoch:
                order, order_epoch = self.epoch_rows(epoch), epoch
            rows = plan.step_rows(order, step, self.global_batch)
            entries = self.samples.entries(rows)
            for part in range(self.parts):
                mine = plan.slice_of(plan.slice_of(rows, part, self.parts), self.rank, self.ranks)
                yield plan.Batch(epoch, mine, entries)

    def epoch_rows(self, epoch: int) -> plan.Rows:
        """The rows of an epoch of the run, in order: the plan, the same on every rank."""
        samples = self.samples
        weights = None
        if self.order.balance == "classes":
            weights = class_weights(samples.targets[samples.rows])
        elif self.order.balance == "weights":
            weights = samples.weights[samples.rows].astype(np.float64)
        return epoch_rows(
            samples.rows,
            self.order,
            shards=samples.manifest.table["shard"].to_numpy(),
            weights=weights,
            global_batch=self.global_batch,
            digest=samples.manifest.digest,
            seed=self.seed,
            epoch=epoch,
        )


class EvalSampler(Sampler[plan.Batch]):
    """One rank's batches of a whole stream, in the order of the manifest."""

    def __init__(self, samples: Samples, *, global_batch: int, rank: int = 0, ranks: int = 1) -> None:
        self.samples = samples
        self.global_batch = global_batch
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return plan.steps_per_epoch(len(self.samples.rows), self.global_batch)

    def __iter__(self) -> Iterator[plan.Batch]:
        for step in range(len(self)):
            rows = plan.step_rows(self.samples.rows, step, self.global_batch)
            yield plan.Batch(0, plan.slice_of(rows, self.rank, self.ranks), self.samples.entries(rows))


def loader(dataset: SampleDataset, sampler: Sampler[plan.Batch], workers: int) -> DataLoader[dict[str, Any]]:
    """A loader of whole batches, in the sampler's order; `workers` processes, 0 decodes here."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_init_worker,
        multiprocessing_context=_forkserver() if workers else None,
    )


def _forkserver() -> ForkServerContext:
    """Workers start from a clean process: forked from here they can hang, on locks that threads of DDP held."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    if threading.current_thread() is threading.main_thread():
        # The server must outlive a signal to the process group, as its workers do; what is ignored is inherited.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGTERM, before)
    return context


def _init_worker(_: int) -> None:
    torch.set_num_threads(1)
    # A terminal and SLURM signal the whole process group; the ranks decide when to stop, and then end their workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class ImageData(pl.LightningDataModule):
    """The streams of a run as one phase reads them.

    Args:
        streams: by name; `train` and `val` are read.
        preprocessing: picture to canvas.
        seed: of the order and of augmentation.
        global_batch: samples of a step, over all ranks.
        workers: loader processes per rank.
        steps: of the phase that are still to come.
        parts: in which a step is computed.
        first_epoch: epochs of earlier phases.
        order: of an epoch of training.
    """

    def __init__(  # noqa: PLR0913 - it is handed all that it uses, by name
        self,
        streams: dict[str, Samples],
        preprocessing: Preprocessing,
        *,
        seed: int,
        global_batch: int,
        workers: int,
        steps: range = range(0),
        parts: int = 1,
        first_epoch: int = 0,
        order: Order | None = None,
    ) -> None:
        super().__init__()
        self.streams = streams
        self.preprocessing = preprocessing
        self.seed = seed
        self.global_batch = global_batch
        self.workers = workers
        self.steps = steps
        self.parts = parts
        self.first_epoch = first_epoch
        self.order = order or Order()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled batches of `train`; every rank must call it."""
        dataset = SampleDataset(self.streams["train"], self.preprocessing, self.seed, self.order.balance)
        rank, ranks = self._place()
        sampler = TrainSampler(
            self.streams["train"],
            seed=self.seed,
            global_batch=self.global_batch,
            steps=self.steps,
            order=self.order,
            parts=self.parts,
            first_epoch=self.first_epoch,
            rank=rank,
            ranks=ranks,
        )
        return loader(dataset, sampler, self.workers)

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[DataLoader[dict[str, Any]]]:
        """Batches of `val` in the order of the manifest, or none; every rank must call it."""
        return self.eval_dataloader("val") if "val" in self.streams else []

    def eval_dataloader(self, stream: str) -> DataLoader[dict[str, Any]]:
        """Every sample of a stream once, in the order of the manifest; every rank must call it."""
        dataset = SampleDataset(self.streams[stream], self.preprocessing, None)
        rank, ranks = self._place()
        rows = math.ceil(self.global_batch / self.parts)
        sampler = EvalSampler(self.streams[stream], global_batch=rows, rank=rank, ranks=ranks)
        return loader(dataset, sampler, self.workers)

    def _place(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
