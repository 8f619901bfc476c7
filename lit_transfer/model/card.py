"""The model card that travels with a portable model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WHAT = {
    "multiclass": "names one of {n} classes",
    "ordinal": "places a picture on a scale of {n} steps",
    "multilabel": "tells which of {n} labels apply",
    "regression": "estimates {n} value(s)",
}
_COLUMNS = {"multiclass": "class", "ordinal": "class", "multilabel": "label", "regression": "target"}


def model_card(plain: Mapping[str, Any], folder: Path) -> str:
    """Markdown for the reader of a model folder, from the content of its `model.json`."""
    provenance, preprocessing = plain["provenance"], plain["preprocessing"]
    run = folder.absolute().parent.name
    size = preprocessing["size"]
    what = _WHAT[plain["task"]].format(n=len(plain["classes"]))
    parts = [
        f"# {run}",
        f"An image model that {what}: {_network(plain['model'])} the dataset below. Its input is {size} x {size} "
        "pixels; the preprocessing is part of the model.",
        "## Use",
        f'```python\nimport lit_transfer\n\nmodel = lit_transfer.load("{run}/model")\n'
        'print(model.predict(["picture.jpg"])[0])\n```',
        f"Or `lit-transfer predict --run {run}/model picture.jpg`.",
        f"## {_COLUMNS[plain['task']].capitalize()} names",
        _names(plain),
        "## Figures",
        _figures(provenance["metrics"]),
        "## Where it comes from",
        _origin(provenance),
        "## Intended use and limits",
        _limits(plain["task"], plain["temperature"]),
    ]
    return "\n\n".join(parts) + "\n"


def _network(model: Mapping[str, Any]) -> str:
    if "blocks" not in model:
        return f"{model['backbone']} with a new head, trained on"
    backbones = " and ".join(block["model"]["backbone"] for block in model["blocks"])
    return f"{backbones}, unchanged, and a head ({model['head'].replace('_', ' ')}) that was fitted to their output on"


def _names(plain: Mapping[str, Any]) -> str:
    thresholds = plain["threshold"] or []
    named = list(zip(plain["classes"], plain["display"], strict=True))
    rows = [f"| {k} | {_cell(name)} | {_cell(shown)} |" for k, (name, shown) in enumerate(named)]
    head = f"| index | {_COLUMNS[plain['task']]} | read as |\n|---:|---|---|\n"
    note = ""
    if len(thresholds) == 1 and plain["task"] == "multiclass":
        note = f"\n\n{named[1][1]} is said from a probability of {thresholds[0]:.4g}, chosen on validation."
    elif thresholds:
        listed = ", ".join(f"{shown} {value:.4g}" for (_, shown), value in zip(named, thresholds, strict=True))
        note = f"\n\nA label applies from these probabilities, chosen on the validation split: {listed}."
    return head + "\n".join(rows) + note


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _figures(metrics: Mapping[str, float]) -> str:
    split = "test" if any(name.startswith("test/") for name in metrics) else "val"
    rows = [(name, value) for name, value in metrics.items() if name.startswith(f"{split}/")]
    if not rows:
        return "It was measured on no held-out split."
    told = "the held-out test split" if split == "test" else "the validation split, on which it was also chosen"
    lines = [f"| {name.partition('/')[2].replace('_', ' ')} | {_number(value)} |" for name, value in rows]
    return f"On {told}:\n\n| figure | value |\n|---|---:|\n" + "\n".join(lines)


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4g}"


def _origin(provenance: Mapping[str, Any]) -> str:
    dataset, weights = provenance["dataset"], provenance["weights"]
    counts = ", ".join(f"{split} {count}" for split, count in dataset["samples"].items())
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    lines = [
        f"Dataset: digest `{dataset['digest']}`; samples: {counts}.",
        f"Starting weights: {_weights(weights)}",
        f"Run `{provenance['run_id']}`, commit `{provenance['commit'] or 'unknown'}`, with {versions}.",
        "The whole configuration is in `model.json`.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _weights(weights: Mapping[str, Any]) -> str:
    if weights["weights"] == "none":
        return "none; it was trained from random ones."
    digest = f", sha256 `{weights['sha256']}`" if weights["sha256"] else ""
    licence = weights["licence"] or "unknown: ask the source"
    return f"{weights['origin'] or weights['weights']}{digest}. Licence: {licence}."


def _limits(task: str, temperature: float | None) -> str:
    always = {
        "regression": "It gives a value for any picture, even one unlike all it was trained on.",
        "multilabel": "It judges any picture, even one unlike all it was trained on.",
    }.get(task, "It gives one of its classes to any picture, even to one that shows none of them.")
    sure = " Probabilities were not calibrated."
    if task == "regression":
        sure = ""
    elif temperature is not None:
        sure = f" Probabilities were scaled by a temperature of {temperature:.4g}, fitted on the validation split."
    return (
        "It is meant for pictures taken like those of its dataset. The figures hold for samples of that "
        "dataset and promise nothing for other cameras, places or times: measure again on your own. "
        f"{always}{sure} Neither robustness nor fairness has been examined, so a person should check "
        "decisions that matter. The licences of the starting weights and of the dataset may limit its use."
    )
