"""Classical heads fitted to features, judged on the splits, and the best one left as the result of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_transfer.blocks import ClassicalHead, Combination, FeaturesConfig
from lit_transfer.config import Trainer
from lit_transfer.errors import require
from lit_transfer.evaluation import BATCH, Measured, predict_samples
from lit_transfer.features.fitting import Choosing, FittedHead, Training, fit_head, why_not_fitted
from lit_transfer.features.table import FeatureTable, groups_of
from lit_transfer.model.classical import Classical
from lit_transfer.model.joined import Blocks
from lit_transfer.model.module import Predictions, measured
from lit_transfer.model.network import Network
from lit_transfer.model.portable import Description, save_portable
from lit_transfer.objectives.decisions import choose_threshold
from lit_transfer.objectives.losses import loss_rows
from lit_transfer.reading import to_plain
from lit_transfer.recipe import Objective
from lit_transfer.report.heads import HeadRow
from lit_transfer.report.split import Evaluation, write_report
from lit_transfer.tracking import Run

_CHUNK = 1024
"""Samples that a head is given at once: kernels and distances grow with them."""


@dataclass(frozen=True)
class Verdict:
    """What is said of the held-out streams, and the threshold that validation has chosen for it."""

    evaluations: dict[str, Evaluation]
    threshold: list[float] | None

    def figures(self) -> dict[str, float]:
        """By split and name."""
        return {f"{split}/{name}": v for split, e in self.evaluations.items() for name, v in e.overall().items()}


@dataclass(frozen=True)
class Judged:
    """A fitted head, and what it says of the held-out streams by their features."""

    fitted: FittedHead
    verdict: Verdict


def fit_heads(
    config: FeaturesConfig, features: Mapping[str, FeatureTable], widths: Sequence[int]
) -> tuple[list[Judged], dict[ClassicalHead, str]]:
    """Fit all heads of a config to `train`, and judge them on the other streams.

    Returns:
        Those that were fitted, and why others were not.
    """
    train = features["train"]
    training = _training(train, widths)
    choosing = Choosing(config.monitor.removeprefix("val/"), config.folds, config.seed)
    judged, skipped = [], {}
    for name in tqdm(config.kinds, unit="head", desc="fitting heads", disable=not config.progress):
        reason = why_not_fitted(name, len(train.rows))
        if reason:
            skipped[name] = reason
        else:
            judged.append(_judge(config, fit_head(name, training, choosing), features))
    return judged, skipped


def _training(train: FeatureTable, widths: Sequence[int]) -> Training:
    samples = train.samples
    weights = samples.weights[train.rows].astype(np.float64)
    return Training(
        samples.manifest.task,
        train.values.double().numpy(),
        samples.targets[train.rows],
        None if (weights == weights[0]).all() else weights,
        tuple(widths),
        groups_of(samples, train.rows),
    )


def _judge(config: FeaturesConfig, fitted: FittedHead, features: Mapping[str, FeatureTable]) -> Judged:
    said = {name: _predict(fitted.head, own) for name, own in features.items() if name != "train"}
    return Judged(fitted, _verdict(config, said, features))


def _verdict(config: FeaturesConfig, said: Mapping[str, Predictions], features: Mapping[str, FeatureTable]) -> Verdict:
    manifest, val = features["train"].samples.manifest, said.get("val")
    task, metric = manifest.task, config.threshold_metric
    threshold = choose_threshold(task, val.probabilities, val.targets, metric) if val else None
    evaluations = {
        name: Evaluation(
            task=task,
            names=manifest.display(config.data.label),
            threshold=threshold,
            samples=features[name].samples,
            predictions=predictions,
        )
        for name, predictions in said.items()
    }
    return Verdict(evaluations, threshold)


def _predict(head: Classical, features: FeatureTable) -> Predictions:
    """What a head says of a stream."""
    target = torch.from_numpy(features.samples.targets[features.rows])
    logits = torch.cat([head(chunk) for chunk in torch.split(features.values, _CHUNK)])
    value, count = loss_rows(head.task, logits, target, Objective(), None)
    weight = torch.from_numpy(features.samples.loss_weights(features.rows))
    rows = {"row": torch.from_numpy(features.rows), "value": value * weight, "count": count}
    return measured(head.task, {**rows, "logits": logits, "target": target})[0]


def choose(judged: Sequence[Judged], monitor: str) -> Judged:
    """The head of the largest figure on validation; without a validation stream, in cross-validation.

    Raises:
        UserError: the figure is undefined for all.
    """
    has_val = "val" in judged[0].verdict.evaluations
    values = [one.verdict.figures()[monitor] if has_val else one.fitted.score for one in judged]
    require(
        any(math.isfinite(value) for value in values),
        f"{monitor} is undefined for every head, so none is the best; a class may be missing from data.val: monitor "
        "val/accuracy instead.",
    )
    return judged[max(range(len(judged)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])]


def head_rows(
    heads: Sequence[ClassicalHead], judged: Sequence[Judged], skipped: Mapping[ClassicalHead, str], chosen: Judged
) -> list[HeadRow]:
    """A row a head, in the order of the config."""
    by_name = {one.fitted.name: one for one in judged}
    return [
        HeadRow(head=name, note=skipped[name]) if name in skipped else _row(by_name[name], by_name[name] is chosen)
        for name in heads
    ]


def _row(judged: Judged, chosen: bool) -> HeadRow:
    fitted = judged.fitted
    settings = [
        ", ".join(f"{key} {value:g}" for key, value in one.settings.items() if value is not None)
        for one in fitted.classifiers
    ]
    return HeadRow(
        head=fitted.name,
        settings="; ".join(dict.fromkeys(filter(None, settings))),
        score=fitted.score,
        figures=judged.verdict.figures(),
        seconds=fitted.seconds,
        note="; ".join(fitted.notes),
        chosen=chosen,
    )


@dataclass(frozen=True)
class Result:
    """What a run of `features` has come to.

    Args:
        config: of the run.
        run: its directory.
        blocks: its backbones, on the CPU.
        norms: of their vectors over the training stream [blocks].
        features: by stream.
        fitted: the chosen head.
    """

    config: FeaturesConfig
    run: Run
    blocks: Blocks
    norms: Tensor
    features: Mapping[str, FeatureTable]
    fitted: FittedHead


def conclude_features(result: Result) -> dict[str, float | int | str | list[float] | None]:
    """Measure the chosen head and its backbones as one network on pictures, write the portable model and the report,
    and return the figures of the summary.

    What `evaluate` says later is the same; by stored features it may differ as far as these are rounded.
    """
    config, run, features = result.config, result.run, result.features
    network = Network(result.blocks.joined(result.norms), result.fitted.head)
    ranks = Measured(Trainer(devices=1, accelerator=config.accelerator, progress=config.progress), config.data)
    said = {
        name: predict_samples(ranks, network, own.samples, result.blocks.common, BATCH, run.folder, name)
        for name, own in features.items()
        if name != "train"
    }
    verdict = _verdict(config, said, features)
    save_portable(run.folder / "model", network, _description(result, network, verdict))
    for split, evaluation in verdict.evaluations.items():
        write_report(run.folder / "report" / split, evaluation, evaluation.figures(), run.folder / "metrics.csv")
    damaged = {name: len(own.samples.rows) - len(own.rows) for name, own in features.items()}
    return {
        **verdict.figures(),
        f"cv_{config.monitor.removeprefix('val/')}": result.fitted.score,
        **{f"samples/{name}": len(own.samples.rows) for name, own in features.items()},
        **{f"damaged/{name}": count for name, count in damaged.items() if count},
        "head": result.fitted.name,
        "features": sum(result.blocks.widths),
        "threshold": verdict.threshold,
        "dataset_digest": features["train"].samples.manifest.digest,
        "run_id": run.id,
        "commit": run.record["commit"],
    }


def _description(result: Result, network: Network, verdict: Verdict) -> Description:
    config, record = result.config, result.run.record
    manifest = result.features["train"].samples.manifest
    return Description(
        task=manifest.task,
        label=config.data.label,
        classes=manifest.classes(config.data.label),
        display=manifest.display(config.data.label),
        threshold=verdict.threshold,
        preprocessing=result.blocks.common,
        model=Combination(blocks=list(result.blocks.settings), head=result.fitted.name),
        provenance={
            "run_id": result.run.id,
            "commit": record["commit"],
            "versions": record["versions"],
            "dataset": {
                "digest": manifest.digest,
                "samples": {name: len(own.samples.rows) for name, own in result.features.items()},
            },
            "weights": network.backbone.provenance,
            "config": to_plain(config),
            "metrics": verdict.figures(),
        },
    )
