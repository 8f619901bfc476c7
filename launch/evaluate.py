"""`lit-transfer evaluate --run DIR [--split NAME] [--manifest DIR] [--by COLUMN]`: measure a finished run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lit_transfer.config import Config, Stream
from lit_transfer.config import Trainer as TrainerConfig
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.module import Samples, open_stream
from lit_transfer.errors import UserError, require
from lit_transfer.evaluation import Evaluation, check_column, predict_samples, write_report
from lit_transfer.launch import run as run_verb
from lit_transfer.model import portable
from lit_transfer.phases.table import expand
from lit_transfer.reading import load
from lit_transfer.report import table


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lit-transfer evaluate", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="directory of a finished run")
    parser.add_argument("--split", metavar="NAME", help="stream of the run, or split; default: test, else val")
    parser.add_argument("--manifest", metavar="DIR", help="another dataset with the run's task and classes")
    parser.add_argument("--by", metavar="COLUMN", help="also for each value of this metadata column")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: report/ in the run")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes a rank; default: the run's")
    parser.add_argument("--batch", type=int, metavar="N", help="samples per step, over all ranks")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="ranks; default: 1")
    parser.add_argument("--precision", choices=("32", "bf16-mixed", "16-mixed"), help="default: the run's")
    return parser.parse_args(argv)


def stream_of(config: Config, manifest: str | None, split: str | None) -> tuple[str, Stream]:
    """What to measure on, and its name: a stream of the run, or a split of its dataset or of another one."""
    named = {"test": config.data.test, "val": config.data.val, "train": config.data.train}
    held_out = next((name for name in ("test", "val") if named[name] is not None), None)
    name = split or held_out
    if manifest is not None:
        known = named["train" if held_out is None else held_out]
        assert known is not None, "every run has data.train"
        place = split or known.split
        return f"{Path(manifest).resolve().name}-{place}", Stream(manifest=manifest, split=place)
    if name is None:
        raise UserError("the run has neither data.test nor data.val; name a split with --split.")
    return name, named.get(name) or Stream(manifest=config.data.train.manifest, split=name)


def check_labels(manifest: Manifest, label: str | None, model: portable.TransferModel) -> None:
    """Refuse a dataset whose task or classes are not those of the model."""
    require(
        manifest.task == model.task,
        f"{manifest.path} is a {manifest.task} dataset but the run's model is {model.task}; "
        "use a dataset of that task.",
    )
    classes = manifest.classes(label)
    missing = [c for c in model.classes if c not in classes]
    extra = [c for c in classes if c not in model.classes]
    require(
        classes == model.classes,
        f"{manifest.path} does not have the classes or columns of the run's model in the same order: "
        f"missing {missing}, extra {extra}; prepare it with the same classes.",
    )


def evaluate(config: Config, model: portable.TransferModel, samples: Samples, batch: int) -> Evaluation:
    """Measure a model on a stream; every rank must call it."""
    return Evaluation(
        task=model.task,
        names=model.display,
        threshold=model.threshold,
        samples=samples,
        predictions=predict_samples(config, model.network, samples, model.preprocessing, batch),
    )


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for a fault of the input."""
    options = _arguments(argv)
    model = portable.load(options.run)
    config: Config = load(options.run / "config.yaml")
    trainer = TrainerConfig(
        devices=options.devices,
        precision=options.precision or config.trainer.precision,
        deterministic=config.trainer.deterministic,
        progress=not options.json and sys.stderr.isatty(),
    )
    workers = config.data.workers if options.workers is None else options.workers
    batch = expand(config)[-1].global_batch if options.batch is None else options.batch
    require(batch >= 1, f"--batch {batch} is under 1.")
    config = replace(config, trainer=trainer, data=replace(config.data, workers=workers))

    name, stream = stream_of(config, options.manifest, options.split)
    samples = open_stream(stream, model.info.label, config.seed)
    check_labels(samples.manifest, model.info.label, model)
    if options.by is not None:
        check_column(samples, options.by)
    evaluation = evaluate(config, model, samples, batch)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return 0
    figures = {"run": model.info.provenance["run_id"], "split": stream.split} | evaluation.figures(options.by)
    folder = options.out or options.run / "report" / name
    write_report(folder, evaluation, figures, options.run / "metrics.csv")
    print((folder / "metrics.json").read_text() if options.json else as_text(evaluation, options.by))
    print(f"figures and pictures are in {folder}", file=sys.stderr)
    return 0


def as_text(evaluation: Evaluation, by: str | None) -> str:
    """The figures as tables: overall, per class, and per value of a metadata column."""
    overall = {"samples": len(evaluation.predictions.rows), **evaluation.overall()}
    blocks = [table([overall]), table(evaluation.per_class())]
    if by is not None:
        blocks.append(table([{by: row.pop("value") or "(empty)"} | row for row in evaluation.by(by)]))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
