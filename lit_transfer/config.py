"""One run as frozen, keyword-only dataclasses. YAML keys are field names; units stand in names.

The rules that need only the config are in each `__post_init__`; rules that also need the backbone's stages
or the dataset are in `phases/table.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser


class UserError(ValueError):
    """A fault of the input: one sentence with the value, the rule and the remedy. Printed without a traceback."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A named stream of samples.

    Args:
        manifest: folder that `lit-transfer prepare` wrote.
        split: split of that dataset, such as `train`.
        fraction: share of the split to use, in (0, 1]; the same samples for the same dataset and seed.
    """

    manifest: str
    split: str
    fraction: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, f"fraction {self.fraction} is outside (0, 1]; use 1.0 for the whole split.")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from.

    Args:
        train: what is trained on.
        val: what thresholds, the best epoch and early stopping are chosen on.
        test: what the final figures are computed on.
        label: label column to learn, where a multiclass, ordinal or regression dataset has several.
        workers: loader processes per rank; 0 decodes in the training process.
    """

    train: Stream
    val: Stream | None = None
    test: Stream | None = None
    label: str | None = None
    workers: int = 2

    def __post_init__(self) -> None:
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
            require(values is None or len(values) == 3, f"image.{name} {values} needs three values: red, green, blue.")


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
        require(0 <= self.rotate_degrees <= 180, f"augment.rotate_degrees {self.rotate_degrees} is outside [0, 180].")


@dataclass(frozen=True, kw_only=True)
class Head:
    """What replaces the network's last layer.

    Args:
        hidden: widths of hidden layers, each followed by ReLU; empty is one linear layer.
        dropout: probability after each hidden layer (before the last layer if there is none): one number, or
            one for each.
    """

    hidden: list[int] = field(default_factory=list)
    dropout: float | list[float] = 0.0

    def __post_init__(self) -> None:
        require(all(width > 0 for width in self.hidden), f"model.head.hidden {self.hidden} has a width under 1.")
        rates = self.dropout if isinstance(self.dropout, list) else [self.dropout]
        require(all(0 <= rate < 1 for rate in rates), f"model.head.dropout {self.dropout} is outside [0, 1).")
        places = max(1, len(self.hidden))
        require(
            not isinstance(self.dropout, list) or len(self.dropout) == places,
            f"model.head.dropout has {len(rates)} rates for {places} place(s); give one number, or one for each.",
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pretrained network and what is put in the place of its last layer.

    Args:
        backbone: `timm/NAME`, `torchvision/NAME`, `hf-hub:REPO`, `local-dir:DIR` or `module:callable`.
        weights: `pretrained` (the hub's cache), `none`, `file:PATH`, `package:MODULE` or `run:DIR`.
        match: pair the file's tensors with the network's by `name`, or by `order` where only names differ.
        drop: tensors of the file to leave out, by prefix; `head` is the network's own last layer.
        strip_prefix: prefix to remove from the file's names, such as `module.`.
        resample: tensors that may be interpolated to another size; only `pos_embed` is supported.
        last_stage: the last stage to keep, by name; later ones are removed. All are kept by default.
        pool: how the last stage's output becomes a vector: `auto` is the network's own way, else the average
            over positions, or all positions side by side.
        head: the new head.
    """

    backbone: str
    weights: str = "pretrained"
    match: Literal["name", "order"] = "name"
    drop: list[str] = field(default_factory=lambda: ["head"])
    strip_prefix: str = ""
    resample: list[str] = field(default_factory=list)
    last_stage: str | None = None
    pool: Literal["auto", "avg", "flatten"] = "auto"
    head: Head = field(default_factory=Head)

    def __post_init__(self) -> None:
        kind = self.weights.partition(":")[0]
        require(
            self.weights in ("pretrained", "none") or kind in ("file", "package", "run"),
            f"model.weights '{self.weights}' is not pretrained, none, file:PATH, package:MODULE or run:DIR.",
        )
        unknown = set(self.resample) - {"pos_embed"}
        require(not unknown, f"model.resample {sorted(unknown)} cannot be resampled; only pos_embed can.")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss and the decision; the dataset's task chooses their form (see `objectives/`).

    Args:
        label_smoothing: share of the target spread over all classes (multiclass).
        class_weights: weight of each class in the order of the dataset, or `balanced` for N / (classes * count).
        focal_gamma: exponent of the focal loss (Lin et al. 2017, eq. 4); 0 is plain cross-entropy.
        threshold_metric: what the threshold of a binary or multilabel decision maximises on validation.
    """

    label_smoothing: float = 0.0
    class_weights: list[float] | Literal["balanced"] | None = None
    focal_gamma: float = 0.0
    threshold_metric: Literal["f1", "accuracy", "balanced_accuracy"] = "f1"

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing < 1,
            f"objective.label_smoothing {self.label_smoothing} is outside [0, 1).",
        )
        require(self.focal_gamma >= 0, f"objective.focal_gamma {self.focal_gamma} is negative.")
        weights = self.class_weights if isinstance(self.class_weights, list) else []
        require(all(w >= 0 for w in weights), f"objective.class_weights {weights} has a negative weight.")


@dataclass(frozen=True, kw_only=True)
class Until:
    """Ends a phase early when a metric stops improving.

    Args:
        metric: a validation metric, such as `val/loss`.
        patience: validations without an improvement before the phase ends.
        min_delta: smallest change that counts as an improvement.
    """

    metric: str
    patience: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        require(self.patience >= 1, f"until.patience {self.patience} is under 1.")
        require(self.min_delta >= 0, f"until.min_delta {self.min_delta} is negative.")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One row of the phase table: what trains, how fast, for how long.

    Args:
        name: names the phase's checkpoints and curves.
        train: `head`, `all`, or `{from: STAGE}`: that stage and all behind it, and the head.
        max_epochs: passes over the training stream, at most.
        lr: learning rate of the head.
        backbone_lr: learning rate of the trained stages; needed as soon as one trains.
        global_batch: samples per optimizer step, over all ranks.
        optimizer: `adamw` or `sgd`.
        momentum: of SGD.
        weight_decay: of matrices and kernels; biases and normalisation weights have none.
        schedule: `constant`, or `warmup_cosine`: linear to the full rate, then a half cosine to zero.
        warmup_steps: steps of the linear part.
        norm: `pretrained` keeps BatchNorm's running statistics in the trained stages; `batch` uses and updates
            the batch's own (SyncBatchNorm on several GPUs), for training from scratch.
        until: ends the phase early.
        restore_best: go on with the weights of the phase's best validation by `monitor`, not with its last.
    """

    name: str
    train: str | dict[str, str] = "head"
    max_epochs: int
    lr: float
    backbone_lr: float | None = None
    global_batch: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "warmup_cosine"] = "constant"
    warmup_steps: int = 0
    norm: Literal["pretrained", "batch"] = "pretrained"
    until: Until | None = None
    restore_best: bool = False

    def __post_init__(self) -> None:
        where = f"phase '{self.name}'"
        require(bool(re.fullmatch(r"[A-Za-z0-9_-]+", self.name)), f"{where}: a name has letters, digits, _ and -.")
        named = isinstance(self.train, str) and self.train in ("head", "all")
        from_stage = isinstance(self.train, dict) and set(self.train) == {"from"}
        require(named or from_stage, f"{where}: train {self.train!r} is not head, all or {{from: STAGE}}.")
        require(self.max_epochs >= 1, f"{where}: max_epochs {self.max_epochs} is under 1.")
        require(self.global_batch >= 1, f"{where}: global_batch {self.global_batch} is under 1.")
        require(self.lr > 0, f"{where}: lr {self.lr} is not positive.")
        require(self.warmup_steps >= 0, f"{where}: warmup_steps {self.warmup_steps} is negative.")
        require(
            self.warmup_steps == 0 or self.schedule == "warmup_cosine",
            f"{where}: warmup_steps {self.warmup_steps} needs schedule warmup_cosine, not {self.schedule}.",
        )
        if self.train == "head":
            require(
                self.backbone_lr is None,
                f"{where}: backbone_lr {self.backbone_lr} is given but only the head trains; remove it.",
            )
        else:
            require(
                self.backbone_lr is not None and self.backbone_lr > 0,
                f"{where}: backbone_lr {self.backbone_lr} must be positive where stages train; try lr / 10.",
            )


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Where and in which arithmetic the run is computed; none of it changes what is computed.

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
class Config:
    """One training run.

    Args:
        name: the run directory is `runs_dir/name`.
        runs_dir: folder of all runs.
        seed: of the order of samples, augmentation, the new head and dropout.
        data: streams of samples.
        image: from picture to network input.
        augment: random changes of training pictures.
        model: backbone, weights and head.
        objective: loss and decision.
        phases: a list of phases, or `{preset: NAME, ...}` with the preset's own settings.
        monitor: validation metric that names the best epoch.
        trainer: ranks and precision.
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
    monitor: str = "val/loss"
    trainer: Trainer = field(default_factory=Trainer)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[\w.-]+", self.name)) and self.name[0] != ".",
            f"name '{self.name}' must be a plain folder name: letters, digits, '.', '_' and '-'.",
        )
        require(self.monitor.startswith("val/"), f"monitor '{self.monitor}' must be a validation metric: val/...")
        if isinstance(self.phases, list):
            names = [phase.name for phase in self.phases]
            require(bool(names), "phases is empty; give at least one phase, or a preset.")
            require(len(set(names)) == len(names), f"phases {names}: two phases have one name.")

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.runs_dir) / self.name


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `off`, `no` and dates stay text, `1e-3` is a number, `012` and `1:30` are text."""


_YamlLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", "-+.0123456789"),
):
    _YamlLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first.replace("\0", ""), ""]
    )
_YamlLoader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def read_yaml(text: str) -> Any:
    """Parse YAML 1.2 scalars into plain Python values. Duplicate keys and syntax errors raise `UserError`."""
    try:
        return yaml.load(text, Loader=_YamlLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None


ConfigT = TypeVar("ConfigT")


def parse(cls: type[ConfigT], plain: Mapping[str, Any]) -> ConfigT:
    """Build a config dataclass from plain values (a parsed YAML file).

    Raises:
        UserError: an unknown key (the nearest one is named), a missing one, a wrong type or a broken rule.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "config")
    checked = _check_keys(cls, plain, "")
    try:
        return typing.cast(ConfigT, parser.instantiate(parser.parse_object({"config": checked})).config)
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises several kinds; each holds one readable message
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise UserError(str(cause) if cause else _type_message(str(error))) from None


def _type_message(text: str) -> str:
    """jsonargparse's message on a wrong type as one sentence with key, value and rule."""
    words = " ".join(text.split())
    key = re.search(r'key "config\.([^"]+)"', words)
    value = re.search(r"(?:Got value|Given value): (.*)$", words)
    rules = re.findall(r"Expected an? (.+?)(?:\. Got value| - Expected| Given value|$)", words)
    if not (key and value and rules):
        return words
    expected = " or ".join(re.sub(r"<class '(\w+)'>|typing\.", r"\1", rule) for rule in rules)
    return f"{key[1]} {value[1]!r} is of the wrong type; it must be {expected}."


def load(path: str | Path, overrides: Sequence[str] = (), cls: type[ConfigT] = Config) -> ConfigT:  # type: ignore[assignment]
    """Read a YAML file, apply command-line overrides (`--a.b VALUE`, `--phases.0.lr=VALUE`) and build the config."""
    require(Path(path).is_file(), f"config file '{path}' does not exist.")
    plain = read_yaml(Path(path).read_text())
    require(isinstance(plain, dict), f"config file '{path}' must hold keys and values.")
    return parse(cls, override(plain, overrides))


def override(plain: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """A copy of nested plain values with `--dotted.key VALUE` pairs applied; numbers step into lists."""
    result = read_yaml(yaml.safe_dump(plain))
    pending = list(arguments)
    while pending:
        flag = pending.pop(0)
        require(flag.startswith("--"), f"'{flag}' is not an option; overrides are written --section.key VALUE.")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            require(bool(pending), f"--{key} has no value; write --{key} VALUE.")
            text = pending.pop(0)
        _assign(result, key, read_yaml(text))
    return typing.cast(dict[str, Any], result)


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain values, every field present, in order."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML text that `load` reads back to an equal config."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=110)


def nearest(name: str, names: Sequence[str]) -> str:
    """` Did you mean 'x'?` for the most similar name, or an empty string."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def _assign(node: Any, dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    for key in keys[:-1]:
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = _item(node, key, dotted)
    if isinstance(node, list):
        _item(node, keys[-1], dotted)
        node[int(keys[-1])] = value
    else:
        require(isinstance(node, dict), f"--{dotted}: there is no '{keys[-1]}' below a plain value.")
        node[keys[-1]] = value


def _item(node: Any, key: str, dotted: str) -> Any:
    if isinstance(node, list):
        require(
            key.isdecimal() and int(key) < len(node),
            f"--{dotted}: '{key}' is not a place in a list of {len(node)}; count from 0.",
        )
        return node[int(key)]
    require(isinstance(node, dict), f"--{dotted}: there is no '{key}' below a plain value.")
    return node[key]


def _check_keys(hint: Any, value: Any, path: str) -> Any:
    """Refuse unknown and missing keys with a readable sentence, and read numbers as text where text is meant."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return _check_fields(option, value, path)
        if typing.get_origin(option) is list and isinstance(value, list):
            return [_check_keys(typing.get_args(option)[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    texts = {text for option in options if typing.get_origin(option) is Literal for text in typing.get_args(option)}
    wants_text = str in options or str(value) in texts
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and wants_text and not {int, float} & set(options) else value


def _check_fields(cls: type, value: Mapping[str, Any], path: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    where = path or "the config"
    for key in value:
        require(key in fields, f"'{key}' is not a key of {where}.{nearest(str(key), list(fields))}")
    for name, spec in fields.items():
        optional = spec.default is not dataclasses.MISSING or spec.default_factory is not dataclasses.MISSING
        require(optional or name in value, f"{where} lacks '{name}'.")
    return {key: _check_keys(hints[key], item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
