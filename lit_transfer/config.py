"""One run as frozen, keyword-only dataclasses. YAML keys are field names; units stand in names.

The rules that need only the config are in each `__post_init__`; rules that also need the backbone's stages
or the dataset are in `phases/table.py`. What is learned stands in `recipe.py`, a row of
the phase table in `schedule.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_transfer.errors import require
from lit_transfer.recipe import Model, Objective
from lit_transfer.schedule import Phase


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A named stream of samples.

    Args:
        manifest: folder or address of a dataset that `lit-transfer prepare` made, or a list of them: one dataset.
        split: split of that dataset, such as `train`.
        fraction: share of the split to use, in (0, 1]; the same samples for the same dataset and seed.
    """

    manifest: str | list[str]
    split: str
    fraction: float = 1.0

    def __post_init__(self) -> None:
        require(
            0 < self.fraction <= 1,
            f"fraction {self.fraction} is outside (0, 1]; use 1.0 for the whole split.",
        )


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where shards that lie on a server or in a bucket are kept on this machine. It changes no figure.

    Args:
        folder: on a local disk; runs and users may share it. null is `lit_transfer` in $XDG_CACHE_HOME or ~/.cache.
        limit_gb: most that it may hold, in 10^9 bytes; what was used longest ago goes first. 0 keeps nothing.
        timeout_s: seconds without a byte after which a connection is given up and tried again.
    """

    folder: str | None = None
    limit_gb: float = 100.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        require(
            0 <= self.limit_gb < float("inf"),
            f"data.cache.limit_gb {self.limit_gb} is not a number of at least 0; use 0 to keep nothing.",
        )
        require(self.timeout_s > 0, f"data.cache.timeout_s {self.timeout_s} is not positive; use 30 or so.")


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which samples an epoch of training has, and how they are mixed. It never depends on ranks, nodes or workers.

    Args:
        balance: `none` has each sample once an epoch; `classes` has every class as often; `weights` has samples in
            proportion to the dataset's weight column, which the loss then leaves out.
        block_shards: shards whose samples are mixed with each other; null mixes all of a partition.
        partitions: parts of the dataset of which each global batch has equal shares; where nodes divide them, a node
            reads its own part. They must divide global_batch.
        last_batch: what becomes of an epoch's last batch where it is not full.
    """

    balance: Literal["none", "classes", "weights"] = "none"
    block_shards: int | None = None
    partitions: int = 1
    last_batch: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        for name in ("block_shards", "partitions"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.order.{name} {value} is under 1.")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from.

    Args:
        train: what is trained on.
        val: what thresholds, the best epoch and early stopping are chosen on.
        test: what the final figures are computed on.
        label: label column to learn, where a multiclass, ordinal or regression dataset has several.
        workers: loader processes per rank; 0 decodes in the training process. On a CPU that one reads stored
            activations whatever this is.
        order: of the samples of an epoch of training.
        max_bad_fraction: share of an epoch's samples that may be damaged before the run stops (one that `order.balance`
            draws several times counts as often); they are replaced in training, left out of figures, and listed in the
            run's `quarantine.jsonl`.
        cache: for shards that are not on this machine.
    """

    train: Stream
    val: Stream | None = None
    test: Stream | None = None
    label: str | None = None
    workers: int = 2
    order: Order = field(default_factory=Order)
    max_bad_fraction: float = 0.001
    cache: Cache = field(default_factory=Cache)

    def __post_init__(self) -> None:
        require(
            0 <= self.max_bad_fraction < 1,
            f"data.max_bad_fraction {self.max_bad_fraction} is outside [0, 1).",
        )
        require(self.workers >= 0, f"data.workers {self.workers} is negative; use 0 or more.")


@dataclass(frozen=True, kw_only=True)
class Image:
    """How a picture becomes the network's input; `null` takes the backbone's own value.

    Args:
        size: side of the network's square input, in pixels.
        crop: centre crop as a share of the decoded canvas, in (0, 1]; the canvas side is size / crop.
        fit: how a picture fills the square canvas: `crop` its middle, `squash` it, or `pad` it with black.
        interpolation: filter used to resize.
        mean: per-channel mean, of values in [0, 1].
        std: per-channel standard deviation, of values in [0, 1].
    """

    size: int | None = None
    crop: float | None = None
    fit: Literal["crop", "squash", "pad"] = "crop"
    interpolation: Literal["bilinear", "bicubic"] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        require(self.size is None or self.size >= 8, f"image.size {self.size} is under 8 pixels.")
        require(self.crop is None or 0 < self.crop <= 1, f"image.crop {self.crop} is outside (0, 1].")
        for name, values in (("mean", self.mean), ("std", self.std)):
            require(
                values is None or len(values) == 3,
                f"image.{name} {values} needs three values: red, green, blue.",
            )
        require(min(self.std or [1]) > 0, f"image.std {self.std} has a value that is not positive.")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of training pictures, drawn per sample; all zero means none.

    Args:
        flip_h: probability of a left-right flip.
        flip_v: probability of an up-down flip.
        quarter_turns: turn by 0, 90, 180 or 270 degrees with equal probability.
        rotate_degrees: turn by up to this many degrees either way.
        shift: move by up to this share of the side, either way, on each axis.
        zoom: scale each axis by a factor in [1 - zoom, 1 + zoom].
        crop_area: smallest share of the area that a random crop keeps; 1 keeps everything.
        brightness: multiply by a factor in [1 - b, 1 + b].
        contrast: blend with the mean grey by a factor in [1 - c, 1 + c].
        saturation: blend with the grey picture by a factor in [1 - s, 1 + s].
    """

    flip_h: float = 0.0
    flip_v: float = 0.0
    quarter_turns: bool = False
    rotate_degrees: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    crop_area: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip_h", "flip_v", "shift", "brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"augment.{name} {value} is outside [0, 1].")
        require(0 <= self.zoom < 1, f"augment.zoom {self.zoom} is outside [0, 1).")
        require(0 < self.crop_area <= 1, f"augment.crop_area {self.crop_area} is outside (0, 1].")
        require(
            0 <= self.rotate_degrees <= 180,
            f"augment.rotate_degrees {self.rotate_degrees} is outside [0, 180].",
        )


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Where and in which arithmetic the run is computed.

    None of it changes which samples are seen and in which order; `precision` changes the figures.

    Args:
        accelerator: `auto` is the GPU if there is one.
        devices: ranks per node; `auto` is every GPU, or one CPU process.
        num_nodes: nodes.
        strategy: `auto` is `ddp` for several ranks and none for one.
        precision: `16-mixed` needs a GPU.
        deterministic: only algorithms that give the same bits again.
        log_every_steps: steps between two rows of the training curve.
        progress: show progress bars.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    strategy: Literal["auto", "ddp"] = "auto"
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    deterministic: bool = False
    log_every_steps: int = 10
    progress: bool = True

    def __post_init__(self) -> None:
        require(
            self.devices == "auto" or self.devices >= 1,
            f"trainer.devices {self.devices} is under 1; use a count of ranks per node, or auto.",
        )
        require(self.num_nodes >= 1, f"trainer.num_nodes {self.num_nodes} is under 1.")
        require(self.log_every_steps >= 1, f"trainer.log_every_steps {self.log_every_steps} is under 1.")
        require(
            not (self.precision == "16-mixed" and self.accelerator == "cpu"),
            "trainer.precision 16-mixed needs a GPU, but trainer.accelerator is cpu; use bf16-mixed or 32.",
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When a run saves what it needs to go on, beside a phase's end and a signal. It changes no figure.

    So does the end of each epoch, but where heads train on features in memory: such an epoch takes milliseconds.

    Args:
        every_steps: optimizer steps between two checkpoints.
        every_minutes: wall-clock minutes between two checkpoints.
    """

    every_steps: int | None = None
    every_minutes: float | None = 15.0

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"checkpoint.{name} {value} is not positive; null is never.")


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """What is recorded beside the run directory.

    Args:
        wandb: `auto` is online with an API key and offline without one.
        project: Weights & Biases project.
        entity: Weights & Biases team.
        group: runs shown together.
        tags: labels of the run.
        media: also send pictures (plots and the worst mistakes) to Weights & Biases.
    """

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "lit_transfer"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    media: bool = False


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What frozen stages give for a picture, kept on disk: computed once for all epochs, phases, ranks and runs.

    Args:
        store: `auto` where a short measurement says that it pays (of `lit-transfer features`: always) and there is
            room, `require` always, `off` never.
        views: augmented pictures stored of each training sample. null stores no augmented ones, so that phases with
            augmentation compute; a count k stores the pictures of the run's first k epochs, and epoch e of the run
            takes those of epoch e modulo k; d4 stores flips and quarter turns, each epoch as `augment` draws
            them (it may have no more).
        prefix: how the frozen stages are computed: `plain` as in training in fp32; `fast` with BatchNorm folded, and
            in bf16 from the stage on where that is faster and keeps a mean cosine of 0.999 with fp32; `compiled` is
            fast through torch.compile, which takes a minute.
        dtype: of stored numbers; float32 with `plain` gives the weights of `off` to the bit, on a CPU and where the
            batch of a rank has 32 samples.
        folder: runs and users may share it. null is `lit_transfer/activations` in $XDG_CACHE_HOME or ~/.cache.
        limit_gb: most that the folder may hold, in 10^9 bytes; what was used longest ago goes first.
        group_writable: let the folder's group write what this run makes, whatever the umask.
    """

    store: Literal["auto", "require", "off"] = "auto"
    views: int | Literal["d4"] | None = None
    prefix: Literal["fast", "compiled", "plain"] = "fast"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    folder: str | None = None
    limit_gb: float = 100.0
    group_writable: bool = False

    def __post_init__(self) -> None:
        views = self.views
        require(
            views is None or views == "d4" or (type(views) is int and views >= 1),
            f"activations.views {views!r} is neither a count of 1 or more nor d4.",
        )
        require(
            0 < self.limit_gb < float("inf"),
            f"activations.limit_gb {self.limit_gb} is not a positive number; use store off to keep none.",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run.

    Args:
        name: the run directory is `runs_dir/name`.
        runs_dir: folder of all runs.
        seed: of the order of samples, augmentation, mixup, dropout, and of weights that start random.
        data: streams of samples.
        image: from picture to network input.
        augment: random changes of training pictures.
        model: backbone, weights and head.
        objective: loss and decision.
        phases: a list of phases, or `{preset: NAME, ...}` with the preset's own settings.
        activations: what frozen stages give, computed once.
        monitor: validation metric that names the best weights of a phase.
        trainer: ranks and precision.
        checkpoint: when what is needed to go on is saved.
        tracking: Weights & Biases.
    """

    name: str
    runs_dir: str = "runs"
    seed: int = 0
    data: Data
    image: Image = field(default_factory=Image)
    augment: Augment = field(default_factory=Augment)
    model: Model
    objective: Objective = field(default_factory=Objective)
    phases: list[Phase] | dict[str, Any]
    activations: Activations = field(default_factory=Activations)
    monitor: str = "val/loss"
    trainer: Trainer = field(default_factory=Trainer)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[\w.-]+", self.name)) and self.name[0] != ".",
            f"name '{self.name}' must be a plain folder name: letters, digits, '.', '_' and '-'.",
        )
        require(
            0 <= self.seed < 2**63,
            f"seed {self.seed} is outside [0, 2^63).",
        )
        require(self.monitor.startswith("val/"), f"monitor '{self.monitor}' must be a validation metric: val/...")
        require(
            self.data.val is not None or not self.objective.temperature_scaling,
            "objective.temperature_scaling true fits a temperature on validation; give data.val, or set it to false.",
        )
        if isinstance(self.phases, list):
            names = [phase.name for phase in self.phases]
            require(bool(names), "phases is empty; give at least one phase, or a preset.")
            require(len(set(names)) == len(names), f"phases {names}: two phases have one name.")

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.runs_dir) / self.name
