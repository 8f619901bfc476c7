"""The run directory, the one metrics writer of a run, and Weights & Biases."""

from __future__ import annotations

import csv
import io
import json
import netrc
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from lit_transfer.blocks import FeaturesConfig
from lit_transfer.config import Config
from lit_transfer.errors import UserError
from lit_transfer.files import replacing, write_json, write_text
from lit_transfer.reading import to_plain, to_yaml

ENVIRONMENT = "LIT_TRANSFER_RUN"
"""Tells the ranks that a process starts which run directory it has opened, and whether that was there before."""


def commit() -> str | None:
    """The commit of the checkout this runs from, with `+changes` if it is not clean; None elsewhere."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    if tracked.returncode:  # installed inside somebody else's repository
        return None
    return head + ("+changes" if status.stdout.strip() else "")


class Run:
    """A run directory: `config.yaml`, `run.json`, `metrics.csv`, `checkpoints/`, `summary.json` and `model/`.

    Args:
        folder: the run directory.
        record: what `run.json` holds: `id`, `created`, `commit`, the versions in use, `fingerprint`, and `earlier` ones
            that --allow-changed-plan has replaced.
        resumed: whether the directory was there before.
    """

    def __init__(self, folder: Path, record: dict[str, Any], resumed: bool) -> None:
        self.folder = folder
        self.record = record
        self.resumed = resumed

    @property
    def id(self) -> str:
        """Never changes over the life of the run; also its Weights & Biases id."""
        return str(self.record["id"])

    def checkpoints(self, phase: str) -> Path:
        """The folder of a phase's checkpoints."""
        return self.folder / "checkpoints" / phase

    def summary(self) -> dict[str, Any] | None:
        """`summary.json` of a finished run, or None."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None


def open_run(
    config: Config | FeaturesConfig,
    fingerprint: dict[str, Any],
    compare: Callable[[Any, Any], list[str]],
    *,
    allow_changes: bool = False,
) -> Run:
    """Make the run directory, or open it again to go on.

    The process that starts the ranks decides once, and hands the decision to them through the environment. With
    `allow_changes` another fingerprint takes the place of the run's, and `run.json` keeps the old one and the changes.

    Raises:
        UserError: the directory is that of another run; the differences are listed.
    """
    folder = config.run_dir.absolute()
    handed = json.loads(os.environ.get(ENVIRONMENT, "null"))
    path = folder / "run.json"
    if handed and handed["folder"] == str(folder):
        return Run(folder, json.loads(path.read_text()), handed["resumed"])
    resumed = path.is_file()
    if resumed:
        record = json.loads(path.read_text())
        changed = compare(record["fingerprint"], json.loads(json.dumps(fingerprint)))
        if changed and not allow_changes:
            remedy = "choose another name, or remove the directory"
            if isinstance(config, Config):  # what is trained can go on; what is fitted is fitted anew
                remedy = (
                    "choose another name, remove the directory, or go on under the new ones with --allow-changed-plan"
                )
            raise UserError(f"{config.run_dir} holds a run with other settings ({'; '.join(changed[:8])}); {remedy}.")
        if changed:
            earlier = {"until": _now(), "changes": changed, "fingerprint": record["fingerprint"]}
            record = record | {"fingerprint": fingerprint, "earlier": [*record.get("earlier", []), earlier]}
            (folder / "summary.json").unlink(missing_ok=True)  # the run may not be finished any more
            write_text(folder / "config.yaml", to_yaml(config))
            write_json(path, record)
    else:
        record = {
            "id": f"{config.name}-{secrets.token_hex(4)}",
            "created": _now(),
            "commit": commit(),
            "versions": {"torch": torch.__version__, "pytorch_lightning": version("pytorch-lightning")},
            "fingerprint": fingerprint,
        }
        write_text(folder / "config.yaml", to_yaml(config))
        write_json(path, record)
    os.environ[ENVIRONMENT] = json.dumps({"folder": str(folder), "resumed": resumed})
    return Run(folder, record, resumed)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class MetricsFile:
    """`metrics.csv`: a row per (phase, epoch, step), written by rank 0 only.

    Values logged at one step share a row; a metric seen for the first time adds a column.
    """

    KEYS = ("phase", "epoch", "step")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            # A disk that was full has cut the last row short.
            self.rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        self._columns: list[str] = []  # so the first row added writes the whole file anew
        self._last_at = 0  # where its last row begins

    def drop_after(self, phase: str, step: int, finished: list[str]) -> None:
        """Forget rows that a resumed run will write again: of `phase` after `step`, and of later phases."""
        kept = [
            row for row in self.rows if row["phase"] in finished or (row["phase"] == phase and int(row["step"]) <= step)
        ]
        if len(kept) < len(self.rows):
            self.rows = kept
            self._rewrite()

    def add(self, phase: str, epoch: int, step: int, values: dict[str, float]) -> None:
        """Append values at a step of the run."""
        keys = {"phase": phase, "epoch": str(epoch), "step": str(step)}
        row = keys | {name: f"{value:.6g}" for name, value in values.items()}
        is_new = not self.rows or any(self.rows[-1][key] != keys[key] for key in self.KEYS)
        if is_new:
            self.rows.append(row)
        else:
            self.rows[-1] |= row
        if set(row) <= set(self._columns):
            self._write_last(is_new)
        else:
            self._rewrite()

    def _write_last(self, is_new: bool) -> None:
        """Append the last row, or write it again; the checkpoint of its step is not written yet."""
        with self.path.open("r+", newline="") as file:
            self._last_at = file.seek(0, os.SEEK_END) if is_new else file.seek(self._last_at)
            file.truncate()
            csv.DictWriter(file, self._columns).writerow(self.rows[-1])

    def _rewrite(self) -> None:
        self._columns = list(dict.fromkeys([*self.KEYS, *self._columns, *(name for row in self.rows for name in row)]))
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows[:-1])
            self._last_at = file.tell()
            writer.writerows(self.rows[-1:])


def wandb_logger(config: Config, run: Run) -> WandbLogger | None:
    """Lightning's logger with the run's own id, or None where tracking is off. Offline without a key."""
    mode = config.tracking.wandb
    if mode == "off":
        return None
    offline = mode == "offline" or (mode == "auto" and not _has_wandb_key())
    os.environ.setdefault("WANDB_SILENT", "true")
    record = {key: run.record[key] for key in ("commit", "versions")}
    record["dataset_digest"] = run.record["fingerprint"]["data"]["train"]["digest"]
    return WandbLogger(
        project=config.tracking.project,
        entity=config.tracking.entity,
        name=config.name,
        id=run.id,
        group=config.tracking.group,
        tags=config.tracking.tags,
        job_type="train",
        save_dir=str(run.folder),
        offline=offline,
        resume="allow",
        config=to_plain(config) | record,
    )


def _has_wandb_key() -> bool:
    """Whether a key is in the environment, or where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Recorder:
    """Writes a phase's curves: learning rates, loss, metrics, images per second, share of time spent waiting.

    Its totals are in the checkpoint, so a resumed phase counts the whole of its work.
    """

    def __init__(  # noqa: PLR0913 - it is handed all that it uses, by name
        self,
        metrics: MetricsFile,
        logger: WandbLogger | None,
        *,
        phase: str,
        first_epoch: int,
        first_step: int,
        samples: int,
        global_batch: int,
        steps_per_epoch: int,
        log_every_steps: int,
    ) -> None:
        self.metrics = metrics
        self.logger = logger
        self.phase = phase
        self.first_epoch, self.first_step = first_epoch, first_step
        self.samples, self.global_batch, self.steps_per_epoch = samples, global_batch, steps_per_epoch
        self.log_every_steps = log_every_steps
        self.totals = dict.fromkeys(("seconds", "train_seconds", "wait_seconds", "checkpoint_seconds", "images"), 0.0)
        self._started = self._mark = self._waiting_since = time.perf_counter()
        self._window = dict.fromkeys(("images", "seconds", "wait"), 0.0)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the phase so far, validation and checkpoints included."""
        return self.totals["seconds"] + time.perf_counter() - self._started

    def state(self) -> dict[str, float]:
        """Totals of the phase, kept over a stop."""
        return self.totals | {"seconds": self.seconds}

    def go_on_from(self, state: dict[str, float]) -> None:
        """Go on from the totals of a checkpoint."""
        self.totals = dict(state)

    def mark(self) -> None:
        """What follows counts for the next step; what came since the last one does not."""
        self._mark = self._waiting_since = time.perf_counter()

    def part_ended(self) -> None:
        """What follows is waiting for the next part of the step."""
        self._waiting_since = time.perf_counter()

    def batch_came(self) -> None:
        """What passed since the last part of a step ended was waiting."""
        waited = time.perf_counter() - self._waiting_since
        self.totals["wait_seconds"] += waited
        self._window["wait"] += waited

    def step_ended(self, step: int) -> bool:
        """Count a step of the phase, from 1; whether it has a row: every `log_every_steps` and epoch."""
        seconds = time.perf_counter() - self._mark
        place = (step - 1) % self.steps_per_epoch
        images = min(self.global_batch, self.samples - place * self.global_batch)
        self.totals["images"] += images
        self.totals["train_seconds"] += seconds
        self._window["images"] += images
        self._window["seconds"] += seconds
        return (self.first_step + step) % self.log_every_steps == 0 or place + 1 == self.steps_per_epoch

    def write_step(self, step: int, loss: float, rates: Mapping[str, float]) -> None:
        """Write the row of a step: its loss and learning rates, and the speed since the last such row."""
        speed = {
            "images_per_s": self._window["images"] / self._window["seconds"],
            "data_wait_share": self._window["wait"] / self._window["seconds"],
        }
        self.write(step, {"train/loss": loss, **{f"lr/{name}": lr for name, lr in rates.items()}, **speed})
        self._window = dict.fromkeys(self._window, 0.0)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time of a checkpoint."""
        start = time.perf_counter()
        yield
        self.totals["checkpoint_seconds"] += time.perf_counter() - start

    @rank_zero_only
    def write(self, step: int, values: dict[str, float]) -> None:
        """Write values at a step of the phase; only rank 0 does."""
        epoch = self.first_epoch + (step - 1) // self.steps_per_epoch
        self.metrics.add(self.phase, epoch, self.first_step + step, values)
        if self.logger:
            self.logger.log_metrics(values | {"epoch": float(epoch)}, step=self.first_step + step)
