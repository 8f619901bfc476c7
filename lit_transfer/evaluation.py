"""Measures a network on a stream, and turns a finished run into figures, pictures and a portable model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lit_transfer.config import Data, Trainer
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.quarantine import FILE_NAME as QUARANTINE
from lit_transfer.data.quarantine import Quarantine
from lit_transfer.data.streams import Samples
from lit_transfer.files import write_json
from lit_transfer.model.module import Predictions, TransferModule
from lit_transfer.model.network import Network
from lit_transfer.model.portable import Description, save_portable
from lit_transfer.objectives.calibration import calibration_metrics, fit_temperature, rescale
from lit_transfer.objectives.decisions import choose_threshold
from lit_transfer.phases.checkpoint import PhaseFiles, PhaseResult
from lit_transfer.phases.job import Job
from lit_transfer.phases.stored import read_choice
from lit_transfer.phases.trainer import check_machine, predict_stream, ranks_of
from lit_transfer.reading import to_plain
from lit_transfer.report.cuts import plot_cuts
from lit_transfer.report.split import Evaluation, write_report

BATCH = 64
"""Samples per step, where a run had no steps."""


class Measuring(Protocol):
    """What measuring needs of a config."""

    @property
    def trainer(self) -> Trainer:
        """Ranks."""
        ...

    @property
    def data(self) -> Data:
        """Workers, and how much may be damaged."""
        ...


@dataclass(frozen=True)
class Measured:
    """Ranks and data of one measurement."""

    trainer: Trainer
    data: Data


def predict_samples(
    config: Measuring,
    network: Network,
    samples: Samples,
    preprocessing: Preprocessing,
    batch: int,
    run: Path,
    stream: str,
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


def scaled(predictions: Predictions, task: str, temperature: float | None) -> Predictions:
    """Predictions with their probabilities scaled by a temperature; the same ones for None."""
    return replace(predictions, probabilities=rescale(task, predictions.probabilities, temperature))


def conclude(job: Job, results: Sequence[PhaseResult]) -> dict[str, Any]:
    """Measure a trained network, leave the result and return the summary; every rank must call it.

    The temperature, if any, and then the threshold are chosen on `val`. Rank 0 writes, `summary.json` last: it marks
    the run as finished.
    """
    # Nothing trains any more; this also keeps `norm: batch` from averaging its statistics once more.
    job.network.set_cut("head")
    said = _predict_splits(job)
    temperature, threshold, unscaled = _choose(job, said.get("val"))
    evaluations = {split: _evaluation(job, split, said[split], temperature, threshold) for split in said}
    figures = {f"{split}/{name}": v for split, e in evaluations.items() for name, v in e.overall().items()}
    summary = figures | unscaled | _records(job, results) | {"temperature": temperature, "threshold": threshold}
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_portable(job.run.folder / "model", job.network, _description(job, temperature, threshold, figures))
        pictures = {"run": _plot_choices(job, results)} | {
            split: write_report(job.run.folder / "report" / split, e, e.figures(), job.run.folder / "metrics.csv")
            for split, e in evaluations.items()
        }
        _send(job, summary, pictures)
        write_json(job.run.folder / "summary.json", summary)
    if dist.is_initialized():
        dist.barrier()
    return summary


def _plot_choices(job: Job, results: Sequence[PhaseResult]) -> list[Path]:
    """A picture of what the activation store would take and save, for each phase in which that was measured."""
    pictures = []
    for result in results:
        choice = read_choice(PhaseFiles(job.run.checkpoints(result.name)))
        if choice and choice.weighed:
            pictures.append(job.run.folder / "report" / f"activations_{result.name}.png")
            plot_cuts(choice.weighed, result.name, choice.why, pictures[-1])
    return pictures


def _predict_splits(job: Job) -> dict[str, Predictions]:
    """What the network says of `test` and `val`, as far as the run has them."""
    assert isinstance(job.config.phases, list), "expanded"
    batch = job.config.phases[-1].global_batch
    return {
        split: predict_samples(
            job.config, job.network, job.streams[split], job.preprocessing, batch, job.run.folder, split
        )
        for split in ("test", "val")
        if split in job.streams
    }


def _choose(job: Job, val: Predictions | None) -> tuple[float | None, list[float] | None, dict[str, float]]:
    """Temperature and threshold by validation, and its calibration before the temperature, as keys of the summary."""
    if val is None:
        return None, None, {}
    task, objective = job.streams["train"].manifest.task, job.config.objective
    temperature, unscaled = None, {}
    if objective.temperature_scaling:
        temperature = fit_temperature(task, val.probabilities, val.targets)
        before = calibration_metrics(task, val.probabilities, val.targets)
        unscaled = {f"val/{name}_unscaled": value for name, value in before.items()}
    probabilities = rescale(task, val.probabilities, temperature)
    return temperature, choose_threshold(task, probabilities, val.targets, objective.threshold_metric), unscaled


def _evaluation(
    job: Job, split: str, predictions: Predictions, temperature: float | None, threshold: list[float] | None
) -> Evaluation:
    manifest = job.streams["train"].manifest
    return Evaluation(
        task=manifest.task,
        names=manifest.display(job.config.data.label),
        threshold=threshold,
        temperature=temperature,
        samples=job.streams[split],
        predictions=scaled(predictions, manifest.task, temperature),
    )


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


def _description(
    job: Job, temperature: float | None, threshold: list[float] | None, figures: dict[str, float]
) -> Description:
    config, manifest = job.config, job.streams["train"].manifest
    return Description(
        task=manifest.task,
        label=config.data.label,
        classes=manifest.classes(config.data.label),
        display=manifest.display(config.data.label),
        temperature=temperature,
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
