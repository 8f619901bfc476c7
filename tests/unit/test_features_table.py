"""Features: what the backbones give, side by side, whether it was stored or computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from digits import digits
from torch import Tensor

from lit_transfer.activations.shelf import Shelf
from lit_transfer.blocks import Block, FeaturesConfig
from lit_transfer.config import Activations, Image
from lit_transfer.data.loading import SampleDataset
from lit_transfer.data.manifest import Manifest
from lit_transfer.data.plan import Batch
from lit_transfer.data.quarantine import Quarantine
from lit_transfer.data.streams import Samples, open_streams
from lit_transfer.errors import UserError
from lit_transfer.features.export import write_features
from lit_transfer.features.table import FeatureTable, Vectors, block_vectors, combine, mean_norms
from lit_transfer.model.augment import eval_input
from lit_transfer.model.backbone import build_backbone
from lit_transfer.model.joined import Blocks, open_blocks
from lit_transfer.reading import parse
from lit_transfer.recipe import Model

BLOCKS = [
    Block(model=Model(backbone="timm/test_resnet", weights="none"), size=40),
    Block(
        model=Model(backbone="timm/test_efficientnet", weights="none", last_stage="blocks.1", pool="max"),
        size=32,
        mean=[0.1, 0.2, 0.3],
    ),
]
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return digits(tmp_path_factory.mktemp("digits") / "set")


def config(manifest: Manifest, **settings: Any) -> FeaturesConfig:
    data = {name: {"manifest": str(manifest.path), "split": name} for name in SPLITS} | {"workers": 0}
    backbones = [{"model": {"backbone": "timm/test_resnet", "weights": "none"}}]
    return parse(FeaturesConfig, {"name": "f", "data": data, "backbones": backbones} | settings)


@pytest.fixture
def streams(manifest: Manifest) -> dict[str, Samples]:
    return open_streams(config(manifest).data, 0)


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    opened = open_blocks(BLOCKS, Image(crop=0.9), seed=0)
    for backbone in opened.backbones:
        backbone.eval()
    return opened


def vectors(blocks: Blocks, place: int, settings: Activations, streams: dict[str, Samples]) -> dict[str, Vectors]:
    backbone, inputs = blocks.backbones[place], blocks.inputs[place]
    return block_vectors(backbone, inputs, settings, streams, workers=0, progress=False)


def pictures(samples: Samples, blocks: Blocks) -> Tensor:
    """The common picture of all samples of a stream."""
    canvas = SampleDataset(samples, blocks.common, None)[Batch(0, samples.rows)]["image"]
    return eval_input(canvas, blocks.common)


def test_blocks_share_a_picture_and_keep_their_own_input(blocks: Blocks) -> None:
    common = blocks.common
    assert (common.size, common.canvas, common.mean, common.std) == (40, 44, (0,) * 3, (1,) * 3)
    first, second = blocks.settings
    assert (first.size, second.size, second.mean) == (40, 32, [0.1, 0.2, 0.3])
    own = [build_backbone(block.model, device="meta", load_weights=False).image for block in BLOCKS]
    assert first.mean == own[0].mean != own[1].mean and second.std == own[1].std
    assert open_blocks(BLOCKS[:1], Image(size=48, mean=[0.5] * 3), 0).common.size == 48
    assert open_blocks(BLOCKS[1:], Image(mean=[0.5] * 3, std=[0.5] * 3), 0).inputs[0].mean == (0.1, 0.2, 0.3)


def test_a_block_gives_what_its_backbone_gives_for_its_own_input(
    blocks: Blocks, streams: dict[str, Samples], tmp_path: Path
) -> None:
    x = pictures(streams["val"], blocks)
    stored = Activations(store="require", prefix="plain", dtype="float32", folder=str(tmp_path))
    torch.manual_seed(0)
    plain = [build_backbone(block.model, image_size=block.size).eval() for block in BLOCKS]
    for place, size in enumerate((40, 32)):
        mean, std = (torch.tensor(v)[:, None, None] for v in (blocks.inputs[place].mean, blocks.inputs[place].std))
        resized = x if size == 40 else F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        with torch.no_grad():
            expected = plain[place]((resized - mean) / std)
        computed, damaged = vectors(blocks, place, Activations(store="off"), streams)["val"]
        assert torch.allclose(computed, expected, atol=1e-5) and damaged == {} and expected.std(0).mean() > 1e-3
        assert torch.allclose(vectors(blocks, place, stored, streams)["val"][0], computed, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 6, "a shelf for each block and stream"


def test_pooling_makes_another_block(streams: dict[str, Samples], tmp_path: Path) -> None:
    stored = Activations(store="require", folder=str(tmp_path))
    found = {}
    for pool in ("avg", "max", "flatten"):
        model = Model(backbone="timm/test_efficientnet", weights="none", last_stage="blocks.1", pool=pool)
        blocks = open_blocks([Block(model=model, size=32)], Image(), seed=0)
        found[pool] = vectors(blocks, 0, stored, {"val": streams["val"]})["val"][0]
    maps = found["flatten"].view(len(found["avg"]), found["avg"].shape[1], -1)
    assert torch.allclose(maps.mean(2), found["avg"], atol=0.02)
    assert torch.allclose(maps.amax(2), found["max"], atol=0.02)
    assert not torch.allclose(found["avg"], found["max"], atol=0.1)


@pytest.mark.parametrize(
    ("backbone", "last", "axes"),
    [
        ("timm/test_vit", "blocks.1", (1,)),
        ("torchvision/swin_t", "stage1", (1, 2)),
        ("timm/test_resnet", "layer2", (2, 3)),
    ],
)
def test_the_maximum_is_over_positions(backbone: str, last: str, axes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found = build_backbone(
        Model(backbone=backbone, weights="none", last_stage=last, pool="max"), image_size=None
    ).eval()
    assert found.image.size
    x = torch.rand(2, 3, found.image.size, found.image.size)
    *steps, _ = found.stages[-1].steps
    with torch.no_grad():
        output = found.run(x, 0, len(found.stages) - 1)
        for step in steps:
            output = found.net.get_submodule(step)(output) if isinstance(step, str) else step(found.net, output)
        if axes == (1,):
            output = output[:, getattr(found.net, "num_prefix_tokens", 1) :]
        assert torch.equal(found(x), output.amax(axes)) and found.features == found(x).shape[1]


def test_the_joined_network_gives_the_vectors_side_by_side_over_their_norms(
    blocks: Blocks, streams: dict[str, Samples]
) -> None:
    found = [vectors(blocks, place, Activations(store="off"), streams) for place in (0, 1)]
    norms = mean_norms([each["train"] for each in found])
    features = combine("val", streams["val"], [each["val"] for each in found], norms, Quarantine())
    with torch.no_grad():
        joined = blocks.joined(norms).eval()(pictures(streams["val"], blocks))
    assert torch.allclose(joined, features.values, atol=1e-5)
    assert features.rows.tolist() == streams["val"].rows.tolist() and features.values.shape[1] == sum(blocks.widths)
    train = combine("train", streams["train"], [each["train"] for each in found], norms, Quarantine())
    for block in train.values.split(blocks.widths, 1):
        assert block.norm(dim=1).mean() == pytest.approx(1, rel=1e-5)


def test_the_backbone_that_is_shared_with_training_has_its_name_and_others_have_not(blocks: Blocks) -> None:
    assert open_blocks(BLOCKS[:1], Image(), 0).backbones[0].name == "timm/test_resnet"
    assert blocks.backbones[1].name == "timm/test_efficientnet to blocks.1 by max at 32 of 40 pixels"


@pytest.mark.parametrize("store", ["off", "require"])
def test_damaged_samples_are_left_out_and_listed(store: Any, tmp_path: Path, blocks: Blocks) -> None:
    manifest = digits(tmp_path / "set", count=32)
    streams = open_streams(config(manifest).data, 0)
    row = int(streams["train"].rows[3])
    shard = tmp_path / "set" / "packed" / manifest.shards[manifest.table["shard"][row].as_py()].name
    content = bytearray(shard.read_bytes())
    content[manifest.table["offset"][row].as_py() + 20] ^= 0xFF
    shard.write_bytes(content)
    settings = Activations(store=store, folder=str(tmp_path / "store"))
    found = [vectors(blocks, place, settings, streams)["train"] for place in (0, 1)]
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.1)
    features = combine("train", streams["train"], found, mean_norms(found), quarantine)
    assert features.rows.tolist() == [r for r in streams["train"].rows.tolist() if r != row]
    assert [entry["key"] for entry in quarantine.entries()] == [manifest.table["key"][row].as_py()]
    assert features.values.isfinite().all() and features.values.norm(dim=1).min() > 0
    with pytest.raises(UserError, match=r"1 of the 16 samples of data\.train are damaged"):
        combine("train", streams["train"], found, mean_norms(found), Quarantine(tmp_path / "q.jsonl", 0.01))


def test_without_room_features_are_computed_or_the_run_ends(
    blocks: Blocks,
    streams: dict[str, Samples],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = vectors(blocks, 0, Activations(store="off"), streams)["val"][0]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tight = {"folder": str(tmp_path), "limit_gb": 1e-9}
    for settings, told in ((tight, "has no room"), ({"folder": str(tmp_path)}, "No space left on device")):
        assert torch.equal(vectors(blocks, 0, Activations(store="auto", **settings), streams)["val"][0], expected)
        assert told in capsys.readouterr().out
        with pytest.raises(UserError, match=f"features cannot be stored in .*{told}.*; make room"):
            vectors(blocks, 0, Activations(store="require", **settings), streams)
        monkeypatch.setattr(Shelf, "write", full)


def table(manifest: Manifest, stream: str = "val") -> FeatureTable:
    samples = open_streams(config(manifest).data, 0)[stream]
    values = torch.rand(len(samples.rows) - 1, 5, generator=torch.Generator().manual_seed(0))
    return FeatureTable(samples, samples.rows[1:], values)


def test_parquet_holds_keys_splits_labels_and_vectors(manifest: Manifest, tmp_path: Path) -> None:
    streams = {name: table(manifest, name) for name in SPLITS}
    path = write_features(tmp_path, "parquet", streams, None, [{"backbone": "b", "width": 5}])
    read = pq.read_table(path)
    assert read.column_names == ["key", "split", "label", "features"]
    rows = np.concatenate([one.rows for one in streams.values()])
    assert read["key"].to_pylist() == manifest.table["key"].take(rows).to_pylist()
    assert read["split"].to_pylist() == [name for name, one in streams.items() for _ in one.rows]
    assert read["label"].to_pylist() == [("even", "odd")[t] for t in manifest.targets(None)[rows]]
    assert np.array_equal(np.stack(read["features"].to_numpy()), np.concatenate([o.values for o in streams.values()]))
    assert json.loads(read.schema.metadata[b"blocks"]) == [{"backbone": "b", "width": 5}]


def test_npz_holds_the_same_without_python_objects(tmp_path: Path) -> None:
    manifest = digits(tmp_path / "set", "multilabel")
    streams = {name: table(manifest, name) for name in SPLITS}
    npz = write_features(tmp_path, "npz", streams, None, [])
    parquet = pq.read_table(write_features(tmp_path, "parquet", streams, None, []))
    with np.load(npz, allow_pickle=False) as read:
        assert read["key"].tolist() == parquet["key"].to_pylist()
        assert read["split"].tolist() == parquet["split"].to_pylist()
        assert read["classes"].tolist() == ["odd", "big"]
        big = [None if np.isnan(value) else value for value in read["labels"][:, 1]]
        assert big == parquet["label.big"].to_pylist() and None in big and 1.0 in big
        assert np.array_equal(read["features"], np.stack(parquet["features"].to_numpy()))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"backbones": []}, "backbones is empty"),
        ({"heads": []}, "heads is empty"),
        ({"heads": ["lda", "lda"]}, "names one twice"),
        ({"heads": ["ldb"]}, "Did you mean 'lda'?"),
        ({"folds": 1}, "folds 1 is under 2"),
        ({"monitor": "auroc"}, "monitor 'auroc' must be a validation metric"),
        ({"name": "a/b"}, "must be a plain folder name"),
        ({"activations": {"views": 2}}, "features are of the plain picture"),
        ({"data": {"train": {"manifest": "x", "split": "y"}, "order": {"balance": "classes"}}}, "data.order is of"),
        ({"backbones": [{"model": {"backbone": "timm/test_vit"}, "std": [1.0, 0.0, 1.0]}]}, "is not positive"),
        ({"backbones": [{"model": {"backbone": "timm/x", "head": {"dropout": 0.5}}}]}, "timm/x is given one"),
    ],
)
def test_what_a_config_may_not_say(settings: dict[str, Any], told: str, manifest: Manifest) -> None:
    assert config(manifest).kinds[0] == "logistic_regression"
    with pytest.raises(UserError) as caught:
        config(manifest, **settings)
    assert told in str(caught.value)
