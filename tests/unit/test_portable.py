"""The portable model: what was saved comes back to the bit, and sees the pixels that validation saw."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import PREPROCESSING, describe, digits, streams_of, tiny_config, tiny_network
from PIL import Image

from lit_transfer.config import Config
from lit_transfer.data.decode import DecodeError
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.plan import Batch
from lit_transfer.data.store import ShardReader
from lit_transfer.errors import UserError
from lit_transfer.model.augment import eval_input
from lit_transfer.model.network import Network
from lit_transfer.model.portable import TransferModel, load, save_portable
from lit_transfer.recipe import Model


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "set")


@pytest.fixture(scope="module")
def config(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(manifest, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def network(config: Config) -> Network:
    return tiny_network(config.model, "multiclass", 2)


@pytest.fixture
def run(config: Config, manifest: Manifest, network: Network, tmp_path: Path) -> Path:
    save_portable(tmp_path / "run" / "model", network, describe(config, manifest, [0.3]))
    return tmp_path / "run"


def test_a_loaded_model_gives_the_saved_logits_to_the_bit(run: Path, network: Network) -> None:
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = network(images).detach()
    for path in (run, run / "model"):
        model = load(path)
        assert torch.equal(model.network(images), expected)
        assert torch.equal(model(images), expected.softmax(1))
    assert not model.training and not model(images).requires_grad
    assert expected.std(0).min() > 0.01, "a network that says one thing of all pictures would prove nothing"


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_prediction_and_validation_see_equal_pixels(
    config: Config, manifest: Manifest, network: Network, fit: str
) -> None:
    preprocessing = replace(PREPROCESSING, fit=fit, canvas=37)
    samples = streams_of(config)["test"]
    batch = SampleDataset(samples, preprocessing, None)[Batch(0, samples.rows)]
    expected = eval_input(batch["image"], preprocessing)
    model = TransferModel(network, replace(describe(config, manifest), preprocessing=preprocessing))
    reader = ShardReader(manifest)
    for row, seen in zip(samples.rows, expected, strict=True):
        assert torch.equal(model.preprocess(reader.read(int(row))), seen)


def test_bytes_paths_and_pictures_give_equal_pixels(run: Path, tmp_path: Path) -> None:
    model = load(run)
    values = np.random.default_rng(0).integers(0, 256, (45, 31, 4), dtype=np.uint8)
    for image in (Image.fromarray(values), Image.fromarray(values[..., 0]), Image.fromarray(values[..., :3])):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        (tmp_path / "picture.png").write_bytes(buffer.getvalue())
        seen = model.preprocess(buffer.getvalue())
        assert seen.shape == (3, 32, 32)
        assert torch.equal(model.preprocess(tmp_path / "picture.png"), seen)
        assert torch.equal(model.preprocess(str(tmp_path / "picture.png")), seen)
        assert torch.equal(model.preprocess(image), seen)
    with pytest.raises(DecodeError):
        model.preprocess(b"no picture")


def test_the_description_comes_back_whole(run: Path, config: Config, manifest: Manifest) -> None:
    model, expected = load(run), describe(config, manifest, [0.3])
    restored = replace(model.info, provenance=expected.provenance)
    assert restored == expected
    plain = json.loads((run / "model" / "model.json").read_text())
    assert plain["format"] == 1 and plain["outputs"] == 2 and plain["provenance"]["metrics"]["test/auroc"] is None
    assert (model.task, model.classes, model.threshold) == ("multiclass", ("even", "odd"), [0.3])


def test_the_threshold_decides_and_scores_are_ranked(run: Path) -> None:
    model = load(run)
    said = model.describe(torch.tensor([0.65, 0.35]))
    assert said.decision == ("odd",)
    assert [name for name, _ in said.scores] == ["even", "odd"]
    assert model.describe(torch.tensor([0.75, 0.25])).decision == ("even",)


def test_several_labels_and_values(network: Network, config: Config, manifest: Manifest) -> None:
    info = replace(describe(config, manifest, [0.5, 0.1]), display=("odd", "big"))
    labels = TransferModel(network, replace(info, task="multilabel"))
    assert labels.describe(torch.tensor([0.4, 0.2])).decision == ("big",)
    assert labels.describe(torch.tensor([0.4, 0.05])).decision == ()
    values = TransferModel(network, replace(info, task="regression", threshold=None))
    said = values.describe(torch.tensor([-1.0, 5.0]))
    assert said.decision == () and said.scores == (("odd", -1.0), ("big", 5.0))


def test_the_card_says_what_a_reader_needs(run: Path, manifest: Manifest) -> None:
    card = (run / "model" / "README.md").read_text()
    for part in (
        'lit_transfer.load("run/model")',
        "| 1 | odd | odd |",
        "| accuracy | 0.75 |",
        "| auroc | undefined |",
        manifest.digest,
        "train 24, val 12, test 12",
        "Licence: unknown: ask the source",
        "from a probability of 0.3",
    ):
        assert part in card


def test_a_model_replaces_the_one_before_and_leaves_nothing_else(
    run: Path, network: Network, config: Config, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_portable(run / "model", network, describe(config, manifest, [0.9]))
    assert load(run).threshold == [0.9]

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lit_transfer.model.portable.model_card", fail)
    with pytest.raises(OSError, match="no space"):
        save_portable(run / "model", network, describe(config, manifest, [0.1]))
    assert load(run).threshold == [0.9]
    assert [path.name for path in run.iterdir()] == ["model"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in (run / "model").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_a_rename_that_fails_leaves_the_model_before(
    run: Path, network: Network, config: Config, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, asked = Path.rename, []

    def fail_second(source: Path, target: Path) -> Path:
        asked.append(target)
        if len(asked) == 2:
            raise OSError("stale file handle")
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_second)
        with pytest.raises(OSError, match="stale file handle"):
            save_portable(run / "model", network, describe(config, manifest, [0.9]))
    assert asked[1] == run / "model", "what failed is the new model taking its name"
    assert load(run).threshold == [0.3]
    assert [path.name for path in run.iterdir()] == ["model"]


def test_what_is_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model .* does not exist"):
        load(tmp_path / "absent")
    file = run / "model" / "model.json"
    plain = json.loads(file.read_text())
    for text, message in (
        (json.dumps(plain | {"format": 2}), "has format 2, this version reads 1"),
        ("{}", "is not the description of a model"),
        ("no json", "is not the description of a model"),
        (json.dumps(plain | {"classes": ["a", "b", "c"]}), "does not fit"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load(run)
    file.write_text(json.dumps(plain))
    (run / "model" / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="does not fit"):
        load(run)


def test_a_network_of_another_module_needs_it(
    run: Path,
    network: Network,
    config: Config,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own_net.py").write_text("import timm\n\ndef build():\n    return timm.create_model('test_resnet')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = replace(config.model, backbone="own_net:build")
    save_portable(run / "model", network, replace(describe(config, manifest), model=model))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(run).network(images), network(images))
    monkeypatch.undo()
    sys.modules.pop("own_net")
    with pytest.raises(UserError, match=r"own_net:build.*cannot be imported"):
        load(run)


def test_a_network_from_a_folder_travels_with_its_architecture(
    config: Config, manifest: Manifest, tmp_path: Path
) -> None:
    place = tmp_path / "download"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 5}))
    model: Model = replace(config.model, backbone=f"local-dir:{place}")
    network = tiny_network(model, "multiclass", 2)
    save_portable(tmp_path / "model", network, replace(describe(config, manifest), model=model))
    place.joinpath("config.json").unlink()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / "model").network(images), network(images))
