"""The head that starts as a logistic regression: the layer says what scikit-learn says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import PREPROCESSING, digits, fine_tuning, streams_of, tiny_network
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from test_features_heads import features

from lit_transfer.errors import UserError
from lit_transfer.features.initialise import check_start, fit_linear_head, start_of_head
from lit_transfer.model.augment import eval_input
from lit_transfer.model.heads import build_head
from lit_transfer.objectives.decisions import probabilities
from lit_transfer.recipe import Head

NAMES = ("a", "b", "c", "d")


def regression(x: np.ndarray, y: np.ndarray, c: float) -> np.ndarray:
    """What scikit-learn says of the samples that it is fitted to."""
    shrink = FunctionTransformer(lambda x: x / np.sqrt(x.shape[1]))
    return make_pipeline(StandardScaler(), shrink, LogisticRegression(C=c, max_iter=5000)).fit(x, y).predict_proba(x)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_layer_says_what_the_regression_says(classes: int) -> None:
    x, y = features(80, classes)
    start = fit_linear_head("multiclass", torch.from_numpy(x).float(), y, None, NAMES[:classes], seed=0)
    head = build_head(Head(dropout=0.5), x.shape[1], classes, seed=0).eval()
    start.put_into(head)
    got = probabilities("multiclass", head(torch.from_numpy(x).float())).detach()
    assert np.allclose(got, regression(x, y, start.record[0]["C"]), atol=2e-3)
    assert got.std(0).min() > 0.1 and start.record[0]["converged"] and 0.5 < start.record[0]["score"] < 1


def test_a_scale_has_a_regression_for_each_step_and_labels_one_each() -> None:
    x, y = features(80, 4)
    inputs = torch.from_numpy(x).float()
    start = fit_linear_head("ordinal", inputs, y, None, NAMES, seed=0)
    assert start.weight.shape == (3, 10) and start.bias.shape == (3,)
    for k, logits in enumerate((inputs @ start.weight.T + start.bias).T):
        expected = regression(x, (y > k).astype(int), start.record[k]["C"])[:, 1]
        assert np.allclose(logits.sigmoid(), expected, atol=2e-3)
    labels = np.stack([y == 0, y == 1], 1).astype(np.float32)
    labels[:9, 1] = np.nan
    start = fit_linear_head("multilabel", inputs, labels, None, NAMES[:2], seed=0)
    logits = (inputs @ start.weight.T + start.bias)[9:, 1]
    assert np.allclose(
        logits.sigmoid(), regression(x[9:], labels[9:, 1].astype(int), start.record[1]["C"])[:, 1], atol=2e-3
    )


def test_weights_of_samples_count() -> None:
    x, y = features(80, 2)
    inputs = torch.from_numpy(x).float()
    plain, weighted = (
        fit_linear_head("multiclass", inputs, y, own, NAMES[:2], seed=0) for own in (None, np.where(y == 1, 30.0, 1.0))
    )
    assert (inputs @ weighted.weight.T + weighted.bias)[:, 1].mean() > (inputs @ plain.weight.T + plain.bias)[
        :, 1
    ].mean()


def test_values_have_no_classes() -> None:
    with pytest.raises(UserError, match="the dataset is regression; use random"):
        fit_linear_head("regression", torch.zeros(4, 2), np.zeros((4, 1), np.float32), None, ("a",), seed=0)


def test_what_a_start_cannot_be_fitted_to_is_refused_before_any_work(tmp_path: Path) -> None:
    manifest = digits(tmp_path / "digits", "regression")
    phases = [{"name": "head", "max_epochs": 1, "lr": 0.1}]
    plain = fine_tuning(manifest, tmp_path, phases)
    check_start(plain, streams_of(plain)["train"])
    asked = replace(plain, model=replace(plain.model, head=Head(init="logistic_regression")))
    with pytest.raises(UserError, match="the dataset is regression; use random"):
        check_start(asked, streams_of(asked)["train"])


def test_hidden_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"starts one linear layer, but model.head.hidden \[8\]"):
        Head(hidden=[8], init="logistic_regression")


def test_the_start_is_fitted_to_what_the_backbone_gives_for_sound_training_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = digits(tmp_path / "digits")
    config = fine_tuning(
        manifest, tmp_path, [{"name": "head", "max_epochs": 1, "lr": 0.1}], activations={"store": "off"}
    )
    network = tiny_network(config.model, "multiclass", 2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    train = streams_of(config)["train"]
    seen: dict[str, torch.Tensor] = {}

    def fit(task: str, vectors: torch.Tensor, targets: np.ndarray, *_: object) -> str:
        seen.update(vectors=vectors, targets=torch.from_numpy(targets))
        return "start"

    monkeypatch.setattr("lit_transfer.features.initialise.fit_linear_head", fit)
    assert start_of_head(network, config, train, PREPROCESSING) == "start"
    from lit_transfer.data.loading import SampleDataset
    from lit_transfer.data.plan import Batch

    canvas = SampleDataset(train, PREPROCESSING, None)[Batch(0, train.rows)]["image"]
    with torch.no_grad():
        expected = network.eval().backbone(eval_input(canvas, PREPROCESSING))
    assert torch.allclose(seen["vectors"], expected, atol=1e-5)
    assert torch.equal(seen["targets"], train.labels)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
