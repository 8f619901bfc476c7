"""Classical classifiers as torch modules: what scikit-learn has fitted, without scikit-learn and without pickle.

A head is a chain of parts; each holds what was fitted as buffers, so that a file of tensors and the head's name are all
that it takes to build it again. It computes in fp64, as scikit-learn does: kernels and likelihoods magnify rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lit_transfer.blocks import ClassicalHead

Fitted = Mapping[str, Tensor]
"""What a part was fitted to, by the name of its buffer."""


class Part(nn.Module):
    """A step from features to probabilities; its buffers are given as they are."""

    def __init__(self, **fitted: Tensor) -> None:
        super().__init__()
        wanted = set(inspect.get_annotations(type(self)))
        if set(fitted) != wanted:
            raise TypeError(f"{type(self).__name__} is fitted to {sorted(wanted)}, not {sorted(fitted)}")
        for name, tensor in fitted.items():
            self.register_buffer(name, tensor)


class Scale(Part):
    """[B, F] less `mean` [F], over `scale` [F]."""

    mean: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) / self.scale


class Linear(Part):
    """[B, F] times `weight` [O, F], plus `bias` [O]."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Softmax(Part):
    """Log-likelihoods [B, K] to probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class Gaussians(Part):
    """Features [B, F] to log P(class) + log P(features | class), [B, K], independent Gaussians of each class.

    `means` and `variances` [K, F], `log_prior` [K].
    """

    means: Tensor
    variances: Tensor
    log_prior: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weighted = [(((x - m) ** 2) / v).sum(1) for m, v in zip(self.means, self.variances, strict=True)]
        return self.log_prior - (torch.log(2 * torch.pi * self.variances).sum(1) + torch.stack(weighted, 1)) / 2


class Kernel(Part):
    """Features [B, F] to the decisions of support vector machines of Gaussian kernels: [B, 1] of two classes, [B, K]
    of more, where a class has its votes of all pairs and, below one vote, what they sum to.

    `support` [S, F], class after class, `counts` of each [K]; `dual` [K - 1, S] as libsvm lays it out: of a vector of
    class i, row j (or j - 1 where j > i) is its coefficient against class j; `bias` of each pair; `gamma` [].
    """

    support: Tensor
    counts: Tensor
    dual: Tensor
    bias: Tensor
    gamma: Tensor

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.exp(-self.gamma * torch.cdist(x, self.support) ** 2)
        counts = self.counts.tolist()
        columns = zip(torch.split(kernel, counts, 1), torch.split(self.dual, counts, 1), strict=True)
        of_class = [own @ dual.T for own, dual in columns]
        first, second = torch.triu_indices(len(counts), len(counts), 1, device=x.device)
        against = torch.stack(of_class)  # [K, B, K - 1]
        pairs = (against[first, :, second - 1] + against[second, :, first]).T + self.bias
        return pairs if len(counts) == 2 else _votes(pairs, first, second, len(counts))


def _votes(pairs: Tensor, first: Tensor, second: Tensor, classes: int) -> Tensor:
    """Decisions of pairs [B, P] to those of classes [B, K]: votes, and a third at most for their sum."""
    wins = (pairs >= 0).to(pairs)
    zeros = pairs.new_zeros(len(pairs), classes)
    votes = zeros.index_add(1, first, wins).index_add(1, second, 1 - wins)
    sums = zeros.index_add(1, first, pairs).index_add(1, second, -pairs)
    return votes + sums / (3 * (sums.abs() + 1))


class Calibration(Part):
    """Decisions [B, 1] of two classes, or [B, K] of each against the rest, to probabilities [B, K] (Platt 1999).

    `slope` and `offset` [1] or [K]: P = 1 / (1 + exp(slope * decision + offset)), of several divided by their sum.
    """

    slope: Tensor
    offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(-(self.slope * x + self.offset))
        if len(self.slope) == 1:
            return torch.cat([1 - p, p], 1)
        total = p.sum(1, keepdim=True)
        return torch.where(total > 0, p / total, 1 / len(self.slope))


class Neighbours(Part):
    """Features [B, F] to the shares of classes among the nearest points, each weighted by 1 / distance: [B, K].

    `points` [N, F] in fp32, `labels` [N] and `count` [], how many are near.
    """

    points: Tensor
    labels: Tensor
    count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        near = torch.cdist(x, self.points.double()).topk(int(self.count), largest=False)
        same = near.values == 0  # where any is, others do not count
        weights = torch.where(same.any(1, keepdim=True), same.to(x), 1 / near.values)
        votes = x.new_zeros(len(x), int(self.labels.max()) + 1).scatter_add_(1, self.labels[near.indices], weights)
        return votes / votes.sum(1, keepdim=True)


FORMS: dict[ClassicalHead, tuple[type[Part], ...]] = {
    "logistic_regression": (Scale, Linear, Softmax),
    "linear_svm": (Scale, Linear, Calibration),
    "rbf_svm": (Scale, Kernel, Calibration),
    "gaussian_nb": (Scale, Linear, Gaussians, Softmax),
    "lda": (Scale, Linear, Softmax),
    "knn": (Scale, Neighbours),
    "nearest_centroid": (Scale, Linear, Softmax),
}
_LEAST = 1e-12
"""Probabilities closer to 0 or 1 count as this close: their logarithms must be finite."""


class Classical(nn.Module):
    """Features [B, F] to logits [B, outputs] whose `probabilities` are those of the classifiers.

    Args:
        task: of the dataset; multilabel has a classifier of two classes for each label, the others have one.
        name: of the form.
        fitted: of each classifier, of each part.
    """

    def __init__(self, task: str, name: ClassicalHead, fitted: Sequence[Sequence[Fitted]]) -> None:
        super().__init__()
        self.task = task
        chains = [[part(**own) for part, own in zip(FORMS[name], parts, strict=True)] for parts in fitted]
        self.classifiers = nn.ModuleList(nn.Sequential(*parts) for parts in chains)

    def forward(self, x: Tensor) -> Tensor:
        found = [classifier(x) for classifier in self.classifiers]
        if self.task == "multiclass":
            return found[0].clamp(min=_LEAST).log().float()  # type: ignore[no-any-return]
        if self.task == "multilabel":
            p = torch.stack([each[:, 1] for each in found], 1)
        else:
            assert self.task == "ordinal", self.task
            p = found[0].flip(1).cumsum(1).flip(1)[:, 1:]  # P(y > k)
        return torch.logit(p, eps=_LEAST).float()


def build_classical(task: str, name: ClassicalHead, state: Mapping[str, Tensor]) -> Classical:
    """A head from its own `state_dict`.

    Raises:
        KeyError, TypeError: it is that of another head.
    """
    count = len({key.split(".")[1] for key in state})
    fitted: list[list[dict[str, Tensor]]] = [[{} for _ in FORMS[name]] for _ in range(count)]
    for key, tensor in state.items():
        _, classifier, part, buffer = key.split(".")
        fitted[int(classifier)][int(part)][buffer] = tensor
    return Classical(task, name, fitted)
