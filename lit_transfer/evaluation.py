"""Measures a network on a stream, and turns a finished run into figures, pictures and a portable model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_transfer.config import Config
from lit_transfer.data.decode import Preprocessing, open_rgb
from lit_transfer.data.packing.names import natural_key
from lit_transfer.data.quarantine import FILE_NAME as QUARANTINE
from lit_transfer.data.quarantine import Quarantine
from lit_transfer.data.store import ShardReader
from lit_transfer.data.streams import Samples
from lit_transfer.errors import nearest, require
from lit_transfer.files import write_json
from lit_transfer.model.module import Predictions, TransferModule
from lit_transfer.model.network import Network
from lit_transfer.model.portable import Description, save_portable
from lit_transfer.objectives.decisions import choose_threshold, decide
from lit_transfer.objectives.metrics import confusion, metrics, per_class
from lit_transfer.phases.checkpoint import PhaseResult
from lit_transfer.phases.run import Job
from lit_transfer.phases.trainer import check_machine, predict_stream, ranks_of
from lit_transfer.reading import to_plain
from lit_transfer.report import contact_sheet, plot_confusion, plot_curves, plot_predictions, plot_roc

MISTAKES = 24  # pictures on the sheet of the worst ones


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a network said of a stream, and all that is needed to judge it.

    Args:
        task: of the dataset.
        names: of classes, labels or targets, as people read them.
        threshold: of the decision, or None.
        samples: the stream.
        predictions: of every sample of the stream.
    """

    task: str
    names: tuple[str, ...]
    threshold: list[float] | None
    samples: Samples
    predictions: Predictions

    def overall(self) -> dict[str, float]:
        """The task's figures over the stream (see `objectives/metrics.py`)."""
        return metrics(self.task, self.predictions.probabilities, self.predictions.targets, self.threshold)

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
            figures = metrics(self.task, said, targets, self.threshold)
            rows.append({"value": value, "samples": int(place.sum()), **figures})
        return rows

    def figures(self, by: str | None = None) -> dict[str, Any]:
        """All figures as plain values, as they stand in `metrics.json`."""
        return {
            "dataset": self.samples.manifest.digest,
            "task": self.task,
            "samples": len(self.predictions.rows),
            "unlabelled": self.samples.unlabelled,
            "threshold": self.threshold,
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


def predict_samples(
    config: Config, network: Network, samples: Samples, preprocessing: Preprocessing, batch: int, run: Path, stream: str
) -> Predictions:
    """What a network says of a stream in 32-bit precision, as the portable model computes it, on the config's ranks
    and workers; every rank must call it. Damaged samples are left out, and listed in the run directory `run`.
    """
    module = TransferModule(
        network,
        task=samples.manifest.task,
        preprocessing=preprocessing,
        quarantine=Quarantine(run / QUARANTINE, config.data.max_bad_fraction),
        eval_stream=stream,
    )
    trainer = replace(config.trainer, precision="32")
    return predict_stream(trainer, module, samples, global_batch=batch, workers=config.data.workers)


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
    if task in ("multilabel", "regression"):
        pictures.append(folder / "predictions.png")
        plot_predictions(task, said, targets, names, pictures[-1])
    pictures.append(folder / "mistakes.png")
    write_mistakes(evaluation, pictures[-1])
    if curves.is_file():
        pictures.append(folder / "curves.png")
        plot_curves(curves, pictures[-1])
    return pictures


def write_mistakes(evaluation: Evaluation, path: Path) -> None:
    """The pictures of the worst mistakes on one sheet, the worst first, with true and predicted names."""
    worst, column = evaluation.badness().max(dim=1)
    order = [i for i in worst.argsort(descending=True, stable=True).tolist()[:MISTAKES] if worst[i] > -math.inf]
    reader = ShardReader(evaluation.samples.manifest)
    images = [open_rgb(reader.read(int(evaluation.predictions.rows[i]))) for i in order]
    contact_sheet(images, [evaluation.caption(i, int(column[i])) for i in order], path)


def conclude(job: Job, results: Sequence[PhaseResult]) -> dict[str, Any]:
    """Measure a trained network, leave the result and return the summary; every rank must call it.

    The threshold is chosen on `val`. Rank 0 writes, `summary.json` last: it marks the run as finished.
    """
    # Nothing trains any more; this also keeps `norm: batch` from averaging its statistics once more.
    job.network.set_cut("head")
    evaluations = _evaluate_splits(job)
    figures = {f"{split}/{name}": v for split, e in evaluations.items() for name, v in e.overall().items()}
    threshold = next((e.threshold for e in evaluations.values()), None)
    summary = figures | _records(job, results) | {"threshold": threshold}
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_portable(job.run.folder / "model", job.network, _description(job, threshold, figures))
        pictures = {
            split: write_report(job.run.folder / "report" / split, e, e.figures(), job.run.folder / "metrics.csv")
            for split, e in evaluations.items()
        }
        _send(job, summary, pictures)
        write_json(job.run.folder / "summary.json", summary)
    if dist.is_initialized():
        dist.barrier()
    return summary


def _evaluate_splits(job: Job) -> dict[str, Evaluation]:
    """`test` and `val` of a run, as far as it has them, with the threshold that `val` gives."""
    manifest = job.streams["train"].manifest
    assert isinstance(job.config.phases, list), "expanded"
    batch = job.config.phases[-1].global_batch
    said = {
        split: predict_samples(
            job.config, job.network, job.streams[split], job.preprocessing, batch, job.run.folder, split
        )
        for split in ("test", "val")
        if split in job.streams
    }
    threshold = None
    if "val" in said:
        val, metric = said["val"], job.config.objective.threshold_metric
        threshold = choose_threshold(manifest.task, val.probabilities, val.targets, metric)
    return {
        split: Evaluation(
            task=manifest.task,
            names=manifest.display(job.config.data.label),
            threshold=threshold,
            samples=job.streams[split],
            predictions=predictions,
        )
        for split, predictions in said.items()
    }


def _records(job: Job, results: Sequence[PhaseResult]) -> dict[str, Any]:
    """What a run cost and what it was computed on, as flat keys."""
    values: dict[str, Any] = {}
    for result in results:
        for field in ("seconds", "images_per_s", "data_wait_share", "peak_memory_mib", "epochs", "steps"):
            values[f"{field}/{result.name}"] = getattr(result, field)
        values[f"ended/{result.name}"] = result.reason
    damaged = Counter(entry["stream"] for entry in Quarantine(job.run.folder / QUARANTINE).entries())
    values["seconds/total"] = sum(result.seconds for result in results)
    return values | {
        **{f"samples/{split}": len(stream.rows) for split, stream in job.streams.items()},
        **{f"damaged/{split}": damaged[split] for split in job.streams if damaged[split]},
        "dataset_digest": job.streams["train"].manifest.digest,
        "run_id": job.run.id,
        "commit": job.run.record["commit"],
        "ranks": ranks_of(job.config.trainer),
        "device": torch.cuda.get_device_name() if check_machine(job.config.trainer) else "cpu",
        "precision": job.config.trainer.precision,
        "peak_memory_mib": max(result.peak_memory_mib for result in results),
    }


def _description(job: Job, threshold: list[float] | None, figures: dict[str, float]) -> Description:
    config, manifest = job.config, job.streams["train"].manifest
    return Description(
        task=manifest.task,
        label=config.data.label,
        classes=manifest.classes(config.data.label),
        display=manifest.display(config.data.label),
        threshold=threshold,
        preprocessing=job.preprocessing,
        model=config.model,
        provenance={
            "run_id": job.run.id,
            "commit": job.run.record["commit"],
            "versions": job.run.record["versions"],
            "dataset": {
                "digest": manifest.digest,
                "samples": {split: len(stream.rows) for split, stream in job.streams.items()},
            },
            "weights": job.network.backbone.provenance,
            "config": to_plain(config),
            "metrics": figures,
        },
    )


def _send(job: Job, summary: dict[str, Any], pictures: dict[str, list[Path]]) -> None:
    """Summary values to Weights & Biases; pictures only if the config says so."""
    if job.logger is None:
        return
    job.logger.experiment.summary.update(summary)
    if job.config.tracking.media:
        for split, paths in pictures.items():
            for path in paths:
                job.logger.log_image(f"{split}/{path.stem}", [str(path)])
