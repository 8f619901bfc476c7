"""Whether probabilities mean what they say: calibration error, and the temperature that mends it (Guo et al. 2017).

Predictions are kept as probabilities, so logits are taken back from them in fp64: up to a constant that softmax does
not see they are the logs of the probabilities. What fp32 rounds away is lost: logits further apart than 87 count as
87, and those of a label near 1 as 17 at most. Scaled probabilities are fp64, in which no two of fp32 become equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
"""Of equal width, as in Guo et al. 2017."""
CALIBRATED_TASKS = ("multiclass", "multilabel")


@dataclass(frozen=True)
class Reliability:
    """Predictions by the bin of their confidence, fp64 `[BINS]` each.

    Args:
        counts: predictions in the bin ((m - 1) / BINS, m / BINS]; 0 is in the first.
        confidences: the sum of their confidences.
        hits: how many came true.
    """

    counts: Tensor
    confidences: Tensor
    hits: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, eq. 3): the mean gap between accuracy and confidence of a
        bin, weighted by its count; NaN without predictions.
        """
        return float((self.hits - self.confidences).abs().sum() / self.counts.sum())


def reliability(task: str, probabilities: Tensor, target: Tensor) -> Reliability:
    """Bin the labelled predictions of a multiclass or multilabel task; arguments as in `metrics`.

    Two classes: the confidence is the probability of class 1, and it comes true where class 1 is the truth. More
    classes: the highest probability, where the likeliest class is the truth. multilabel: the probability of a label,
    where it applies; all labels together.
    """
    probabilities = probabilities.double()
    if task == "multilabel":
        seen = ~target.isnan()
        confidence, hit = probabilities[seen], target[seen] == 1
    else:
        assert task == "multiclass", task
        said, truth = probabilities[target >= 0], target[target >= 0]
        binary = said.shape[1] == 2
        confidence = said[:, 1] if binary else said.max(1).values
        hit = truth == 1 if binary else said.argmax(1) == truth
    inner = torch.arange(1, BINS, dtype=torch.float64) / BINS
    place = torch.bucketize(confidence.contiguous(), inner)
    counts, confidences, hits = (
        torch.bincount(place, weights, minlength=BINS)
        for weights in (torch.ones_like(confidence), confidence, hit.double())
    )
    return Reliability(counts, confidences, hits)


def calibration_metrics(task: str, probabilities: Tensor, target: Tensor) -> dict[str, float]:
    """multiclass and multilabel: calibration_error (see `reliability`) and nll, the mean negative log-likelihood of a
    labelled entry; nothing for other tasks. Arguments as in `metrics`; NaN where a probability is not finite.
    """
    if task not in CALIBRATED_TASKS:
        return {}
    if not bool(probabilities.isfinite().all()):
        return dict.fromkeys(("calibration_error", "nll"), math.nan)
    log_p, truth = _labelled(task, probabilities, target)
    return {
        "calibration_error": reliability(task, probabilities, target).error,
        "nll": float(F.nll_loss(log_p, truth)),
    }


def rescale(task: str, probabilities: Tensor, temperature: float | None) -> Tensor:
    """Probabilities `[N, K]` as if their logits had been divided by a temperature, fp64; as they are for None.

    multiclass: the order of the classes of a row stays as it is, and with it the likeliest one.
    """
    if temperature is None:
        return probabilities
    scaled = (_log_probabilities(task, probabilities) / temperature).softmax(-1)
    return scaled[..., 1] if task == "multilabel" else scaled


def fit_temperature(task: str, probabilities: Tensor, target: Tensor) -> float:
    """The one temperature that minimises the negative log-likelihood of labelled samples (Guo et al. 2017, section
    4.2), for all classes or labels, found by L-BFGS over its logarithm in fp64. Arguments as in `metrics`.

    It is 1 where there is no such: all predictions are right, or no better than the same logit for every class, or
    there are none, or one is not finite.
    """
    log_p, truth = _labelled(task, probabilities, target)
    if not _has_optimum(log_p, truth):
        return 1.0
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logarithm], max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(log_p / logarithm.exp(), truth)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return math.exp(logarithm.item())


def _has_optimum(log_p: Tensor, truth: Tensor) -> bool:
    """The likelihood is concave in the inverse temperature: it must rise at 0, and fall in the end."""
    of_truth = log_p.gather(1, truth[:, None])[:, 0]
    informative = bool((of_truth - log_p.mean(1)).mean() > 0)
    return informative and bool((of_truth < log_p.max(1).values).any()) and bool(log_p.isfinite().all())


def _labelled(task: str, probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 log-probabilities `[M, A]` of the alternatives of each labelled entry, and the true ones, int64 `[M]`."""
    seen = ~target.isnan() if task == "multilabel" else target >= 0
    return _log_probabilities(task, probabilities)[seen], target[seen].long()


def _log_probabilities(task: str, probabilities: Tensor) -> Tensor:
    """fp64 logs `[N, K]` of class probabilities, or `[N, L, 2]` of no and yes for each label; bounded."""
    assert task in CALIBRATED_TASKS, task
    limits = torch.finfo(probabilities.dtype)
    yes = probabilities.double()
    if task == "multiclass":
        return yes.clamp(min=limits.tiny).log()
    no = (1 - yes).clamp(min=limits.eps / 4)  # a 1 of this dtype stands for all above the middle to its neighbour
    return torch.stack([no, yes.clamp(min=limits.tiny)], -1).log()
