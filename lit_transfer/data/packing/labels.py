"""From label texts to numbers: the task, the classes, their order and their names for display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_transfer.data.packing.items import Listing, Pack
from lit_transfer.data.packing.names import all_numbers, in_order, number, refuse_twins
from lit_transfer.data.packing.sources import read_table
from lit_transfer.data.packing.splits import Tag, quantile_bins
from lit_transfer.data.schema import CLASS_TASKS, Label
from lit_transfer.errors import UserError, nearest, require

Value = int | float | None
_SWITCH = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def encode_labels(pack: Pack, listing: Listing) -> tuple[str, list[Label], list[list[Value]]]:
    """The task, the label columns, and per column the value of every sample.

    Values are class indices (multiclass, ordinal), 0 or 1 (multilabel), floats (regression); None is missing.

    Raises:
        UserError: a value that does not fit the task, two classes of one name, ordinal ones without order.
    """
    task = pack.task if pack.task != "auto" else "multiclass" if listing.labels else "none"
    require(
        task == "none" or bool(listing.labels),
        f"task {task} needs labels, but '{pack.source}' has none; give --task none.",
    )
    require(
        pack.classes is None or (task in CLASS_TASKS and len(listing.labels) == 1),
        f"classes is given, but task {task} with label columns {list(listing.labels)}"
        " does not have one list of classes; remove it.",
    )
    labels: list[Label] = []
    columns: list[list[Value]] = []
    for i, name in enumerate(listing.labels if task != "none" else ()):
        texts = [item.labels[i] for item in listing.items]
        classes = _classes(pack, listing, task, name, texts) if task in CLASS_TASKS else ()
        read = _reader(task, classes)
        columns.append(
            [
                None if text is None else read(text, name, item.source)
                for text, item in zip(texts, listing.items, strict=True)
            ]
        )
        labels.append(Label(name=name, classes=classes, display=classes or (name,)))
    return task, _displayed(labels, pack.display_names), columns


def strata(
    task: str, columns: Sequence[Sequence[Value]], further: Sequence[Sequence[Any]], samples: int
) -> list[list[Tag]]:
    """What to balance across splits, per sample: class, positive labels or quantile bin, by other columns."""
    if task == "regression":
        columns = [quantile_bins(column) for column in columns]
    tags: list[list[Tag]] = []
    for i in range(samples):
        values = [(k, column[i]) for k, column in enumerate(columns)]
        if task == "multilabel":
            values = [(k, value) for k, value in values if value == 1]
        beside = tuple(column[i] for column in further)
        tags.append([(*pair, *beside) for pair in values or [(-1, None)]])
    return tags


def _classes(pack: Pack, listing: Listing, task: str, name: str, texts: Sequence[str | None]) -> tuple[str, ...]:
    found = sorted({text for text in texts if text is not None})
    where = f"label '{name}' of '{pack.source}'"
    refuse_twins(found, where)
    given = pack.classes or listing.classes
    if given is not None:
        refuse_twins(given, f"classes of {where}")
        classes = tuple(given)
    else:
        require(
            task != "ordinal" or all_numbers(found),
            f"{where} is ordinal, but its classes {', '.join(found[:5])} are not numbers;"
            " give their order with --classes.",
        )
        classes = tuple(in_order(found))
    require(
        len(classes) > 1,
        f"{where} has {len(classes)} classes ({', '.join(classes)}); a {task} task needs two or more.",
    )
    return classes


class _reader:
    """Reads one label text; `UserError` names the sample."""

    def __init__(self, task: str, classes: Sequence[str]) -> None:
        self.task = task
        self.classes = classes
        self.index = {name: i for i, name in enumerate(classes)}

    def __call__(self, text: str, label: str, source: str) -> Value:
        where = f"label '{label}' of sample '{source}'"
        if self.task in CLASS_TASKS:
            if text not in self.index:
                raise UserError(
                    f"{where} is '{text}', which is not among the {len(self.index)} classes."
                    + nearest(text, self.classes)
                )
            return self.index[text]
        if self.task == "multilabel":
            require(
                text.strip().lower() in _SWITCH,
                f"{where} is '{text}'; multilabel takes 0, 1 or an empty cell.",
            )
            return _SWITCH[text.strip().lower()]
        if text.strip().lower() == "nan":
            return None
        value = number(text)
        require(value is not None, f"{where} is '{text}'; regression takes finite numbers or an empty cell.")
        return value


def _displayed(labels: list[Label], path: str | None) -> list[Label]:
    """The labels with names for display, where a file gives them; it must name every class."""
    if path is None:
        return labels
    header, rows = read_table(Path(path))
    require(header == ["class", "display"], f"'{path}' has the columns {header}; it must have class,display.")
    names: Mapping[str, str] = {row["class"] or "": row["display"] or "" for _, row in rows}
    for label in labels:
        for name in label.classes or (label.name,):
            require(
                bool(names.get(name)),
                f"'{path}' has no display name for '{name}'.{nearest(name, list(names))}",
            )
    return [
        Label(
            name=label.name,
            classes=label.classes,
            display=tuple(names[name] for name in label.classes or (label.name,)),
        )
        for label in labels
    ]
