"""What stands before a classifier: features standardised, blocks of equal weight, and for some principal components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

Matrix = NDArray[np.float64]
_NEGLIGIBLE = 1e-9
"""Share of the largest variance below which a component is rounding; likewise of a mean, for a standard deviation."""


@dataclass(frozen=True)
class Scaling:
    """Features of samples [N, F] less `mean` [F], over `scale` [F]."""

    mean: Matrix
    scale: Matrix

    def __call__(self, features: Matrix) -> Matrix:
        """[N, F] -> [N, F]."""
        return (features - self.mean) / self.scale

    def fitted(self) -> dict[str, Tensor]:
        """As `model.classical.Scale` holds it."""
        return {"mean": torch.from_numpy(self.mean), "scale": torch.from_numpy(self.scale)}


def fit_scaling(features: Matrix, widths: tuple[int, ...]) -> Scaling:
    """Standardise features [N, F], and divide each block by the square root of its width.

    A vector of a block then has a mean square of 1, whatever the widths, so none outweighs the others in a distance. A
    feature that never changes is only centred.

    Args:
        features: of the training samples alone.
        widths: of the blocks, F in all.
    """
    mean, std = features.mean(0), features.std(0)
    std = np.where(std > _NEGLIGIBLE * np.abs(mean), std, 1.0)
    return Scaling(mean, std * np.sqrt(np.repeat(widths, widths)))


@dataclass(frozen=True)
class Projection:
    """Scaled features [N, F] times `components` [F', F]: their principal components, for those are centred."""

    components: Matrix

    def __call__(self, scaled: Matrix) -> Matrix:
        """[N, F] -> [N, F'], the component of the largest variance first."""
        return scaled @ self.components.T

    def fitted(self) -> dict[str, Tensor]:
        """As `model.classical.Linear` holds it."""
        weight = torch.from_numpy(self.components)
        return {"weight": weight, "bias": weight.new_zeros(len(weight))}


def fit_projection(scaled: Matrix, count: int) -> Projection:
    """The first principal components of scaled features [N, F], at most `count`, without those that are rounding."""
    samples, features = scaled.shape
    pca: Any = PCA(min(count, samples, features), svd_solver="covariance_eigh" if samples > features else "full")
    pca.fit(scaled)
    kept = pca.explained_variance_ > _NEGLIGIBLE * pca.explained_variance_[0]
    return Projection(np.ascontiguousarray(pca.components_[kept]))
