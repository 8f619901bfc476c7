"""Named streams of samples: which rows of which datasets each has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_transfer.config import Cache, Data, Stream
from lit_transfer.data import plan, reach
from lit_transfer.data.cache import ShardCache, default_folder
from lit_transfer.data.manifest import Manifest
from lit_transfer.errors import nearest, require


@dataclass(frozen=True)
class Samples:
    """A stream opened: the labelled rows of a split.

    Handed to other processes of this machine, its arrays are in memory that all of them share.

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

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """Of every manifest row, [M]; mapped where the dataset is one manifest."""
        return np.asarray(self.manifest.table["weight"].to_numpy())

    @cached_property
    def _shared(self) -> dict[str, Tensor]:
        # Tensors, which move to shared memory when they are first handed over; arrays would be copied each time.
        return {"rows": torch.tensor(self.rows), "targets": torch.tensor(self.targets)}

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "unlabelled": self.unlabelled, **self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, rows=state["rows"].numpy(), targets=state["targets"].numpy())

    @property
    def labels(self) -> Tensor:
        """The stream's own targets, [N] or [N, K], in the order of `rows`."""
        return torch.from_numpy(self.targets[self.rows])

    def loss_weights(self, rows: plan.Rows, balance: str = "none") -> NDArray[np.float32]:
        """Weights of some rows in the loss; ones where `data.order.balance` draws them by their weights already."""
        return np.ones(len(rows), np.float32) if balance == "weights" else self.weights[rows]

    def stand_in(self, row: int, balance: str, seed: int, epoch: int, attempt: int) -> int:
        """The row that is read in the place of a damaged one: of its class, or of those that are drawn at all, where
        `data.order.balance` says so. `attempt` counts from 1, for that row may be damaged, too.
        """
        rows = self.rows
        if balance == "classes":
            rows = rows[self.targets[rows] == self.targets[row]]
        elif balance == "weights":
            rows = rows[self.weights[rows] > 0]
        return plan.substitute(rows, row, self.manifest.digest, seed, epoch, attempt)

    def entries(self, rows: plan.Rows) -> int:
        """How many labelled entries the targets of some rows have."""
        targets = self.targets[rows]
        return int(np.count_nonzero(targets >= 0 if targets.ndim == 1 else ~np.isnan(targets)))


def open_stream(stream: Stream, label: str | None, seed: int, cache: ShardCache | None = None) -> Samples:
    """Open one stream of a config; `cache` holds what of it lies on another machine.

    Raises:
        UserError: the manifest, the split or the label column is missing, or no sample has a label.
    """
    for place in [stream.manifest] if isinstance(stream.manifest, str) else stream.manifest:
        require(
            not reach.is_remote(place) or reach.shown(place) == place,
            f"'{reach.shown(place)}' is given with credentials, which the run directory would keep; take them from the "
            "environment or ~/.netrc.",
        )
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
