"""`lit-transfer predict --run DIR IMAGE...`: name pictures (files, folders, globs) with a finished run.

A picture that cannot be read becomes a row with its error, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_transfer.data.decode import EXTENSIONS, DecodeError
from lit_transfer.data.packing.names import natural_key
from lit_transfer.errors import require
from lit_transfer.files import finite_or_null, write_text
from lit_transfer.launch import run as run_verb
from lit_transfer.launch.options import Parser
from lit_transfer.model import portable
from lit_transfer.model.portable import Prediction, TransferModel
from lit_transfer.report import table

MANY = 64
"""Pictures from which on progress is shown."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture: what the model says and the milliseconds that it took, or why not."""

    image: str
    prediction: Prediction | None = None
    ms: float | None = None
    error: str | None = None


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="lit-transfer predict", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="finished run, or its model folder")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder (with all below) or pattern")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="names per picture; default: 3")
    parser.add_argument("--format", choices=tuple(WRITERS), default="table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="pictures at once; default: 16")
    options: argparse.Namespace = parser.parse_args(argv)
    return options


def find_images(argument: str) -> list[Path]:
    """The pictures that a file, folder or pattern stands for, in natural order; empty if there are none."""
    path = Path(argument)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file()]
        return sorted(found, key=lambda p: natural_key(p.as_posix()))
    if path.exists():
        return [path]
    matches = sorted(glob.glob(argument, recursive=True), key=natural_key)  # noqa: PTH207 - also absolute patterns
    return [image for match in matches for image in find_images(match)]


def rows(model: TransferModel, arguments: Sequence[str], batch: int) -> Iterator[Row]:
    """A row for each argument that names no picture, then one for each picture, in the order of the arguments."""
    found = [(argument, find_images(argument)) for argument in arguments]
    paths = list(dict.fromkeys(path for _, images in found for path in images))
    for argument, images in found:
        if not images:
            why = "holds no pictures" if Path(argument).is_dir() else "no such file"
            yield Row(image=_shown(argument), error=why)
    with tqdm(total=len(paths), unit=" pictures", disable=len(paths) < MANY) as bar:
        for start in range(0, len(paths), batch):
            chunk = paths[start : start + batch]
            yield from _predict(model, chunk)
            bar.update(len(chunk))


def _predict(model: TransferModel, paths: Sequence[Path]) -> Iterator[Row]:
    inputs: list[Tensor | str] = []
    seconds = []
    for path in paths:
        began = time.perf_counter()
        inputs.append(_read(model, path))
        seconds.append(time.perf_counter() - began)
    readable = [image for image in inputs if isinstance(image, Tensor)]
    began = time.perf_counter()
    said = iter(_forward(model, readable))
    share = (time.perf_counter() - began) / max(1, len(readable))
    for path, image, decoding in zip(paths, inputs, seconds, strict=True):
        if isinstance(image, str):
            yield Row(image=_shown(path), error=image)
        else:
            ms = 1000 * (decoding + share)
            yield Row(image=_shown(path), prediction=model.describe(next(said)), ms=ms)


def _read(model: TransferModel, path: Path) -> Tensor | str:
    """The network input of a file, or why there is none."""
    try:
        return model.preprocess(path)
    except DecodeError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def _forward(model: TransferModel, images: Sequence[Tensor]) -> list[Tensor]:
    if not images:
        return []
    device = next(model.parameters()).device
    return list(model(torch.stack(list(images)).to(device)).cpu())  # the copy back also waits for the device


def _shown(path: str | Path) -> str:
    """A path as text that can be written anywhere, also if its bytes are no UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def as_table(found: Sequence[Row], model: TransferModel, top: int) -> str:
    """Aligned text: a line a picture."""
    regression = model.task == "regression"
    lines: list[dict[str, object]] = []
    for row in found:
        line: dict[str, object] = {"image": row.image, "ms": row.ms, "error": row.error}
        if row.prediction:
            pairs = _top(row.prediction, model, top)
            line["prediction"] = "; ".join(row.prediction.decision) or "(none)"
            line["values" if regression else "probabilities"] = ", ".join(
                f"{name} {value:.4g}" if regression else f"{name} {value:.3f}" for name, value in pairs
            )
        lines.append(line)
    said = ["values"] if regression else ["prediction", "probabilities"]
    failed = ["error"] if any(row.error for row in found) else []
    note = "ms: milliseconds to read and decode the picture, and its share of its batch's forward pass"
    return table(lines, ["image", *said, "ms", *failed]) + "\n\n" + note + "\n"


def as_csv(found: Sequence[Row], model: TransferModel, top: int) -> str:
    """A line a picture; names and probabilities in columns of their own, targets of a regression by name."""
    file = io.StringIO()
    regression = model.task == "regression"
    places = range(1, min(top, len(model.display)) + 1)
    scores = list(model.display) if regression else [c for k in places for c in (f"name_{k}", f"probability_{k}")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", *([] if regression else ["prediction"]), *scores, "ms", "error"])
    for row in found:
        said: list[object] = [""] * (len(scores) + (not regression))
        if row.prediction:
            pairs = _top(row.prediction, model, top)
            values = [value for _, value in pairs] if regression else [cell for pair in pairs for cell in pair]
            said = [*([] if regression else ["; ".join(row.prediction.decision)]), *values]
        writer.writerow([row.image, *said, "" if row.ms is None else f"{row.ms:.3f}", row.error or ""])
    return file.getvalue()


def as_json(found: Sequence[Row], model: TransferModel, top: int) -> str:
    """A list of objects; `prediction` is a name, a list of labels, or values by target; NaN is null."""
    plain = finite_or_null([_plain(row, model, top) for row in found])
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(row: Row, model: TransferModel, top: int) -> dict[str, Any]:
    said: dict[str, Any] = {"prediction": None}
    if row.prediction and model.task == "regression":
        said = {"prediction": dict(row.prediction.scores)}
    elif row.prediction:
        decision: Any = row.prediction.decision
        said = {
            "prediction": list(decision) if model.task == "multilabel" else decision[0],
            "top": [{"name": name, "probability": p} for name, p in _top(row.prediction, model, top)],
        }
    return {"image": row.image, **said, "ms": row.ms, "error": row.error}


def _top(prediction: Prediction, model: TransferModel, top: int) -> tuple[tuple[str, float], ...]:
    return prediction.scores if model.task == "regression" else prediction.scores[:top]


WRITERS = {"table": as_table, "csv": as_csv, "json": as_json}


def main(argv: Sequence[str]) -> int:
    """Exit status 0, 1 if any picture could not be read, 2 for a fault of the input."""
    options = _arguments(argv)
    require(options.top >= 1, f"--top {options.top} is under 1; give 1 or more.")
    require(options.batch >= 1, f"--batch {options.batch} is under 1; give 1 or more.")
    model = portable.load(options.run).to("cuda" if torch.cuda.is_available() else "cpu")
    found = list(rows(model, options.images, options.batch))
    text = WRITERS[options.format](found, model, options.top)
    if options.out:
        write_text(options.out, text)
    else:
        print(text, end="")
    return int(any(row.error for row in found))


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
