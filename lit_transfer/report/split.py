"""The figures and pictures of one split: what the network said of a stream, judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_transfer.data.decode import open_rgb
from lit_transfer.data.packing.names import natural_key
from lit_transfer.data.store import ShardReader
from lit_transfer.data.streams import Samples
from lit_transfer.errors import nearest, require
from lit_transfer.files import write_json
from lit_transfer.model.module import Predictions
from lit_transfer.objectives.calibration import calibration_metrics, reliability
from lit_transfer.objectives.decisions import decide
from lit_transfer.objectives.metrics import confusion, metrics, per_class
from lit_transfer.report.diagrams import plot_confusion, plot_predictions, plot_reliability, plot_roc, short
from lit_transfer.report.plots import contact_sheet, plot_curves

MISTAKES = 24  # pictures on the sheet of the worst ones


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a network said of a stream, and all that is needed to judge it.

    Args:
        task: of the dataset.
        names: of classes, labels or targets, as people read them.
        threshold: of the decision, or None.
        temperature: that the probabilities were scaled by, or None.
        samples: the stream.
        predictions: of every sample of the stream.
    """

    task: str
    names: tuple[str, ...]
    threshold: list[float] | None
    temperature: float | None = None
    samples: Samples
    predictions: Predictions

    def overall(self) -> dict[str, float]:
        """The task's figures over the stream (see `objectives/metrics.py` and `objectives/calibration.py`)."""
        return self._measure(self.predictions.probabilities, self.predictions.targets)

    def _measure(self, said: Tensor, targets: Tensor) -> dict[str, float]:
        figures = metrics(self.task, said, targets, self.threshold)
        return figures | calibration_metrics(self.task, said, targets)

    def per_class(self) -> list[dict[str, Any]]:
        """A row of figures for each class, label or target."""
        said, targets = self.predictions.probabilities, self.predictions.targets
        return [dict(row) for row in per_class(self.task, said, targets, self.threshold, self.names)]

    def by(self, column: str) -> list[dict[str, Any]]:
        """A row of figures for each value of a metadata column, in natural order; None where it is empty.

        Raises:
            UserError: the dataset has no such metadata column.
        """
        check_column(self.samples, column)
        table = self.samples.manifest.table
        values = table[f"meta.{column}"].take(self.predictions.rows).to_pylist()
        rows = []
        for value in sorted(set(values), key=lambda v: (v is None, natural_key(v or ""))):
            place = torch.tensor([v == value for v in values])
            said, targets = self.predictions.probabilities[place], self.predictions.targets[place]
            rows.append({"value": value, "samples": int(place.sum()), **self._measure(said, targets)})
        return rows

    def figures(self, by: str | None = None) -> dict[str, Any]:
        """All figures as plain values, as they stand in `metrics.json`."""
        return {
            "dataset": self.samples.manifest.digest,
            "task": self.task,
            "samples": len(self.predictions.rows),
            "unlabelled": self.samples.unlabelled,
            "threshold": self.threshold,
            "temperature": self.temperature,
            "overall": self.overall(),
            "per_class": self.per_class(),
            "by": {} if by is None else {by: self.by(by)},
        }

    def badness(self) -> Tensor:
        """How wrong each decision is, [N, 1] or [N, K] over labels or targets; -inf where right or missing.

        The probability kept from the truth, for ordinal plus the distance in classes; for regression the
        distance in standard deviations of the true values.
        """
        said, targets = self.predictions.probabilities.double(), self.predictions.targets
        decided = decide(self.task, self.predictions.probabilities, self.threshold)
        if self.task == "regression":
            spread = torch.tensor([float(t[~t.isnan()].double().std()) for t in targets.unbind(1)])
            return ((said - targets).abs() / spread.nan_to_num(0).where(spread > 0, 1)).nan_to_num(-math.inf)
        if self.task == "multilabel":
            wrong = ~targets.isnan() & (decided != (targets == 1))
            return torch.where(wrong, (said - targets).abs(), -math.inf)
        kept = 1 - said.gather(1, targets.clamp(min=0)[:, None])
        distance = (decided - targets).abs()[:, None] if self.task == "ordinal" else torch.zeros_like(kept)
        return torch.where(((targets >= 0) & (decided != targets))[:, None], kept + distance, -math.inf)

    def caption(self, place: int, column: int) -> str:
        """Three lines on a sample: what it is, what was said of it, and where it came from."""
        said, target = self.predictions.probabilities[place], self.predictions.targets[place]
        source = self.samples.manifest.table["source"][int(self.predictions.rows[place])].as_py()
        if self.task == "regression":
            lines = [f"{self.names[column]}: {float(target[column]):.4g}", f"said: {float(said[column]):.4g}"]
        elif self.task == "multilabel":
            yes = bool(target[column] == 1)
            lines = [
                f"{self.names[column]}: {'yes' if yes else 'no'}",
                f"said: {'no' if yes else 'yes'}, p(yes) {float(said[column]):.2f}",
            ]
        else:
            decided = int(decide(self.task, said[None], self.threshold)[0])
            told = f"said: {self.names[decided]} ({float(said[decided]):.2f})"
            lines = [f"true: {self.names[int(target)]}", told]
        return "\n".join([*lines, str(source).rpartition("/")[2]])


def check_column(samples: Samples, column: str) -> None:
    """Refuse a name that is no metadata column of the stream's dataset."""
    manifest = samples.manifest
    columns = [name.removeprefix("meta.") for name in manifest.table.column_names if name.startswith("meta.")]
    require(
        column in columns,
        f"{manifest.path} has no metadata column '{column}'; it has {', '.join(columns) or 'none'}."
        + nearest(column, columns),
    )


def write_report(folder: Path, evaluation: Evaluation, figures: dict[str, Any], curves: Path) -> list[Path]:
    """Write `metrics.json`, the task's pictures, and curves if `curves` is there; returns the pictures."""
    write_json(folder / "metrics.json", figures)
    task, names, threshold = evaluation.task, evaluation.names, evaluation.threshold
    said, targets = evaluation.predictions.probabilities, evaluation.predictions.targets
    pictures = []
    if task in ("multiclass", "ordinal"):
        pictures.append(folder / "confusion.png")
        plot_confusion(confusion(task, said, targets, threshold), names, pictures[-1])
    if task in ("multiclass", "multilabel"):
        pictures.append(folder / "roc.png")
        plot_roc(said, targets, names, pictures[-1], threshold[0] if threshold and task == "multiclass" else None)
        pictures.append(folder / "reliability.png")
        plot_reliability(reliability(task, said, targets), pictures[-1], *_axes_of_reliability(task, names))
    if task in ("multilabel", "regression"):
        pictures.append(folder / "predictions.png")
        plot_predictions(task, said, targets, names, pictures[-1])
    pictures.append(folder / "mistakes.png")
    write_mistakes(evaluation, pictures[-1])
    if curves.is_file():
        pictures.append(folder / "curves.png")
        plot_curves(curves, pictures[-1])
    return pictures


def _axes_of_reliability(task: str, names: Sequence[str]) -> tuple[str, str]:
    """What confidence and accuracy mean there, for people."""
    if task == "multilabel":
        return "probability of a label", "share of entries with the label"
    if len(names) == 2:
        return f"probability of {short(names[1])}", f"share of {short(names[1])}"
    return "probability of the likeliest class", "share of right ones"


def write_mistakes(evaluation: Evaluation, path: Path) -> None:
    """The pictures of the worst mistakes on one sheet, the worst first, with true and predicted names."""
    worst, column = evaluation.badness().max(dim=1)
    order = [i for i in worst.argsort(descending=True, stable=True).tolist()[:MISTAKES] if worst[i] > -math.inf]
    reader = ShardReader(evaluation.samples.manifest)
    images = [open_rgb(reader.read(int(evaluation.predictions.rows[i]))) for i in order]
    contact_sheet(images, [evaluation.caption(i, int(column[i])) for i in order], path)
