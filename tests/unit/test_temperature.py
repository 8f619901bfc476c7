"""A temperature on its way from validation to figures, model folder, evaluation and prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import describe, digits, finished_run, streams_of, tiny_config, tiny_network
from torch import Tensor

from lit_transfer.config import Config
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.store import ShardReader
from lit_transfer.data.streams import Samples
from lit_transfer.errors import UserError
from lit_transfer.launch.evaluate import evaluate
from lit_transfer.launch.predict import main as predict
from lit_transfer.model.module import Predictions
from lit_transfer.model.network import Network
from lit_transfer.model.portable import load, save_portable
from lit_transfer.objectives.calibration import fit_temperature, rescale
from lit_transfer.objectives.decisions import choose_threshold
from lit_transfer.objectives.metrics import metrics
from lit_transfer.reading import parse, to_plain

TASKS = ("multiclass", "multilabel")


def overconfident(samples: Samples) -> Predictions:
    """Very sure of the truth, and as sure of the opposite for the first rows."""
    targets = torch.from_numpy(samples.targets[samples.rows])
    generator = torch.Generator().manual_seed(len(samples.rows) + int(samples.rows[0]))
    for_one = torch.where(targets == 1, 1.0, -1.0)
    for_one[:3] *= -1
    logits = for_one * (4 + torch.rand(for_one.shape, generator=generator))
    said = torch.stack([-logits, logits], 1).softmax(1) if targets.ndim == 1 else logits.sigmoid()
    return Predictions(samples.rows, said, targets, 0.0)


@pytest.fixture(scope="module", params=TASKS)
def manifest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "set", request.param)


def concluded(manifest: Manifest, runs: Path, monkeypatch: pytest.MonkeyPatch, on: bool) -> tuple[Path, dict[str, Any]]:
    """A run whose network is taken to have said `overconfident`; its directory and summary."""

    def say(config: Config, network: Network, samples: Samples, *_: object) -> Predictions:
        return overconfident(samples)

    plain = to_plain(tiny_config(manifest, runs)) | {"objective": {"temperature_scaling": on}}
    config = parse(Config, plain)
    with monkeypatch.context() as patch:
        patch.setattr("lit_transfer.evaluation.predict_samples", say)
        return config.run_dir, finished_run(config)


def figures_of(
    manifest: Manifest, split: str, temperature: float | None, threshold: Sequence[float]
) -> dict[str, float]:
    said = overconfident(streams_of(tiny_config(manifest, Path("unused")))[split])
    scaled = rescale(manifest.task, said.probabilities, temperature)
    return metrics(manifest.task, scaled, said.targets, threshold)


def test_validation_gives_the_temperature_then_the_threshold(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, summary = concluded(manifest, tmp_path, monkeypatch, on=True)
    val = overconfident(streams_of(tiny_config(manifest, tmp_path))["val"])
    temperature = fit_temperature(manifest.task, val.probabilities, val.targets)
    scaled = rescale(manifest.task, val.probabilities, temperature)
    assert temperature > 2 and summary["temperature"] == temperature
    assert summary["threshold"] == choose_threshold(manifest.task, scaled, val.targets, "f1")
    for split in ("val", "test"):
        for name, value in figures_of(manifest, split, temperature, summary["threshold"]).items():
            assert summary[f"{split}/{name}"] == pytest.approx(value, nan_ok=True)
        figures = json.loads((folder / "report" / split / "metrics.json").read_text())
        assert figures["temperature"] == temperature
        assert figures["overall"]["calibration_error"] == summary[f"{split}/calibration_error"]
    for name in ("calibration_error", "nll"):
        assert summary[f"val/{name}"] < 0.8 * summary[f"val/{name}_unscaled"]
    model = load(folder)
    assert model.temperature == temperature and model.threshold == summary["threshold"]
    assert f"scaled by a temperature of {temperature:.4g}" in (folder / "model" / "README.md").read_text()


def test_without_it_figures_are_those_of_the_probabilities_as_they_are(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, summary = concluded(manifest, tmp_path, monkeypatch, on=False)
    assert summary["temperature"] is None and not [key for key in summary if key.endswith("_unscaled")]
    for split in ("val", "test"):
        for name, value in figures_of(manifest, split, None, summary["threshold"]).items():
            assert summary[f"{split}/{name}"] == pytest.approx(value, abs=0, nan_ok=True)
    assert load(folder).temperature is None
    assert "were not calibrated" in (folder / "model" / "README.md").read_text()


def saved(folder: Path, manifest: Manifest, temperature: float | None) -> tuple[Network, Path]:
    config = tiny_config(manifest, folder)
    network = tiny_network(config.model, manifest.task, len(manifest.classes()))
    save_portable(folder / "model", network, replace(describe(config, manifest), temperature=temperature))
    return network, folder


def unscaled(network: Network, images: Tensor, task: str) -> Tensor:
    logits = network(images).detach()
    return logits.softmax(1) if task == "multiclass" else logits.sigmoid()


def test_model_evaluation_and_prediction_say_the_same(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, folder = saved(tmp_path, manifest, 2.5)
    model, config = load(folder), tiny_config(manifest, tmp_path)
    samples = streams_of(config)["test"]
    pictures = [ShardReader(manifest).read(int(row)) for row in samples.rows]
    images = torch.stack([model.preprocess(content) for content in pictures])
    said = model(images)
    expected = rescale(manifest.task, unscaled(network, images, manifest.task), 2.5)
    assert torch.equal(said, expected)
    change = (said - unscaled(network, images, manifest.task)).abs().max()
    assert change > 0.05, "one left out, or applied twice, would be seen"

    measured = evaluate(config, model, samples, 12, tmp_path, "test")
    assert measured.temperature == 2.5 and measured.figures()["temperature"] == 2.5
    torch.testing.assert_close(measured.predictions.probabilities, said, atol=1e-6, rtol=0)

    paths = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for path, content in zip(paths, pictures, strict=True):
        path.write_bytes(content)
    assert predict(["--run", str(folder), *map(str, paths), "--format", "json"]) == 0
    for row, probabilities in zip(json.loads(capsys.readouterr().out), said, strict=True):
        named = {top["name"]: top["probability"] for top in row["top"]}
        assert [named[name] for name in model.display] == pytest.approx(probabilities.tolist(), abs=1e-6)


def test_a_model_without_a_temperature_gives_its_probabilities_to_the_bit(manifest: Manifest, tmp_path: Path) -> None:
    network, folder = saved(tmp_path, manifest, None)
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(load(folder)(images), unscaled(network, images, manifest.task))


@pytest.mark.parametrize("temperature", [0, -1.0, "hot", "Infinity"])
def test_a_folder_with_no_such_temperature_is_refused(manifest: Manifest, tmp_path: Path, temperature: object) -> None:
    _, folder = saved(tmp_path, manifest, 2.5)
    file = folder / "model" / "model.json"
    plain = json.loads(file.read_text())
    assert plain.pop("temperature") == 2.5
    file.write_text(json.dumps(plain))
    assert load(folder).temperature is None, "folders of before it was written are read"
    file.write_text(json.dumps(plain | {"temperature": temperature}).replace('"Infinity"', "Infinity"))
    with pytest.raises(UserError, match="is not the description of a model"):
        load(folder)


def test_it_needs_validation(manifest: Manifest, tmp_path: Path) -> None:
    plain = to_plain(tiny_config(manifest, tmp_path)) | {"objective": {"temperature_scaling": True}}
    plain["data"]["val"] = None
    with pytest.raises(UserError, match=r"temperature_scaling true .* give data.val, or set it to false"):
        parse(Config, plain)
