"""`lit-transfer evaluate --run DIR [--split NAME] [--manifest DIR] [--by COLUMN]`: measure a finished run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lit_transfer.blocks import FeaturesConfig
from lit_transfer.config import Config, Stream
from lit_transfer.config import Trainer as TrainerConfig
from lit_transfer.data.manifest import is_dataset
from lit_transfer.data.streams import Samples, check_same_labels, open_stream, shard_cache
from lit_transfer.errors import UserError, require
from lit_transfer.evaluation import BATCH, Measured, Measuring, predict_samples, scaled
from lit_transfer.launch import run as run_verb
from lit_transfer.launch.options import Parser
from lit_transfer.model import portable
from lit_transfer.reading import load_any
from lit_transfer.report import table
from lit_transfer.report.split import Evaluation, check_column, write_report

AnyConfig = Config | FeaturesConfig


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="lit-transfer evaluate", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="directory of a finished run")
    parser.add_argument("--split", metavar="NAME", help="stream of the run, or split; default: test, else val")
    parser.add_argument("--manifest", metavar="DIR", help="another dataset with the run's task and classes")
    parser.add_argument("--by", metavar="COLUMN", help="also for each value of this metadata column")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: report/ in the run")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes a rank; default: the run's")
    parser.add_argument("--batch", type=int, metavar="N", help="samples per step, over all ranks")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="ranks; default: 1")
    options: argparse.Namespace = parser.parse_args(argv)
    return options


def streams_of(config: AnyConfig) -> dict[str, Stream]:
    """The streams that a config names."""
    named = {"train": config.data.train, "val": config.data.val, "test": config.data.test}
    return {name: stream for name, stream in named.items() if stream is not None}


def stream_of(config: AnyConfig, manifest: str | None, split: str | None) -> tuple[str, Stream]:
    """What to measure on, and its name: a stream of the run, or a split of its dataset or of another one."""
    named = streams_of(config)
    held_out = next((name for name in ("test", "val") if name in named), None)
    name = split or held_out
    if manifest is not None:
        place = split or named[held_out or "train"].split
        return f"{Path(manifest).resolve().name}-{place}", Stream(manifest=manifest, split=place)
    if name is None:
        raise UserError("the run has neither data.test nor data.val; name a split with --split.")
    return name, named.get(name) or Stream(manifest=config.data.train.manifest, split=name)


def open_own(run: Path, config: AnyConfig, stream: Stream, label: str | None) -> Samples:
    """A stream of the run's own datasets, as they were when it was trained.

    Raises:
        UserError: the dataset is not there, or is another one by now.
    """
    place, record = stream.manifest, run / "run.json"
    require(
        is_dataset(place),
        f"the run's dataset '{place}' is not here (a relative path counts from {Path.cwd()}); say where it is "
        "with --manifest DIR.",
    )
    require(record.is_file(), f"{record} does not exist, so the run's dataset is unknown; name one with --manifest.")
    known = json.loads(record.read_text())["fingerprint"]["data"]
    named = next(name for name, own in streams_of(config).items() if own.manifest == place)
    digest = known[named]["digest"]
    samples = open_stream(stream, label, config.seed, shard_cache(config.data.cache))
    found = samples.manifest.digest
    require(
        found == digest,
        f"'{place}' is not the run's dataset any more: its digest is {found[:12]}, the run's {digest[:12]}; "
        f"pack it again as it was, or measure it as another dataset with --manifest {place}.",
    )
    return samples


def evaluate(
    config: Measuring, model: portable.TransferModel, samples: Samples, batch: int, run_dir: Path, stream: str
) -> Evaluation:
    """Measure a run's model on a stream; every rank must call it."""
    predictions = predict_samples(config, model.network, samples, model.preprocessing, batch, run_dir, stream)
    return Evaluation(
        task=model.task,
        names=model.display,
        threshold=model.threshold,
        temperature=model.temperature,
        samples=samples,
        predictions=scaled(predictions, model.task, model.temperature),
    )


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for a fault of the input."""
    options = _arguments(argv)
    model = portable.load(options.run)
    config = load_any(options.run / "config.yaml")
    trainer = TrainerConfig(
        devices=options.devices,
        deterministic=isinstance(config, Config) and config.trainer.deterministic,
        progress=not options.json and sys.stderr.isatty(),
    )
    workers = config.data.workers if options.workers is None else options.workers
    batch = _batch_of(config) if options.batch is None else options.batch
    require(batch >= 1, f"--batch {batch} is under 1; give 1 or more.")

    name, stream = stream_of(config, options.manifest, options.split)
    label = model.info.label
    if options.manifest is None:
        samples = open_own(options.run, config, stream, label)
    else:
        samples = open_stream(stream, label, config.seed, shard_cache(config.data.cache))
    check_same_labels(samples.manifest.name, samples.manifest, label, "the run's model", model.task, model.classes)
    if options.by is not None:
        check_column(samples, options.by)
    measured = Measured(trainer, replace(config.data, workers=workers))
    evaluation = evaluate(measured, model, samples, batch, options.run, name)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return 0
    figures = {"run": model.info.provenance["run_id"], "split": stream.split} | evaluation.figures(options.by)
    folder = options.out or options.run / "report" / name
    write_report(folder, evaluation, figures, options.run / "metrics.csv")
    print((folder / "metrics.json").read_text() if options.json else as_text(evaluation, options.by))
    print(f"figures and pictures are in {folder}", file=sys.stderr)
    return 0


def _batch_of(config: AnyConfig) -> int:
    """Samples per step of a run's last phase."""
    if isinstance(config, FeaturesConfig):
        return BATCH
    assert isinstance(config.phases, list), "a run's own config has its presets expanded"
    return config.phases[-1].global_batch


def as_text(evaluation: Evaluation, by: str | None) -> str:
    """The figures as tables: overall, per class, and per value of a metadata column."""
    overall = {"samples": len(evaluation.predictions.rows), **evaluation.overall()}
    blocks = [table([overall]), table(evaluation.per_class())]
    if by is not None:
        blocks.append(table([{by: row.pop("value") or "(empty)"} | row for row in evaluation.by(by)]))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
