"""AlexNet as the BVLC trained it with Caffe (`caffe/alexnet`), and its weights from a .npy file (`caffe_npy:PATH`).

Krizhevsky, Sutskever & Hinton 2012, in the form of Caffe's `models/bvlc_alexnet`: conv1 without padding over 227
pixels, conv2, conv4 and conv5 in two groups, normalisation before pooling.

The usual file, `bvlc_alexnet.npy`, holds {layer: [weights, biases]} in TensorFlow's order of axes: convolutions
[height, width, in, out], fc6 over the positions of pool5 by row, column and channel. It takes blue, green, red in 0
to 255 less their mean. The axes are changed once, as the file is read, and conv1's input channels turned round, so
that the network takes red, green, blue as every other.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lit_transfer.config import Image
from lit_transfer.errors import require
from lit_transfer.model.pickled import Array, read_arrays

# The mean of each channel of Caffe's ilsvrc_2012_mean.npy, red first; Caffe cuts 227 pixels out of 256.
_MEAN = (122.67891434, 116.66876762, 104.00698793)
IMAGE = Image(
    size=227,
    crop=227 / 256,
    interpolation="bilinear",
    mean=[value / 255 for value in _MEAN],
    std=[1 / 255] * 3,
)
# Of the weights in the file; the biases are as many as the last axis is long.
SHAPES: dict[str, tuple[int, ...]] = {
    "conv1": (11, 11, 3, 96),
    "conv2": (5, 5, 48, 256),
    "conv3": (3, 3, 256, 384),
    "conv4": (3, 3, 192, 384),
    "conv5": (3, 3, 192, 256),
    "fc6": (9216, 4096),
    "fc7": (4096, 4096),
    "fc8": (4096, 1000),
}


class AlexNet(nn.Sequential):
    """RGB pixels in 0 to 255 less their mean, `[B, 3, 227, 227]`, to logits `[B, 1000]`.

    Other sizes do where pool5 has 6x6 positions: 199 to 230 pixels.
    """

    # Dropout stands before the layer it feeds: freezing fc6 must not silence the dropout in front of fc7.
    stages = (
        ("conv1", ("conv1", "relu1", "norm1", "pool1")),
        ("conv2", ("conv2", "relu2", "norm2", "pool2")),
        ("conv3", ("conv3", "relu3")),
        ("conv4", ("conv4", "relu4")),
        ("conv5", ("conv5", "relu5", "pool5")),
        ("fc6", ("flatten", "fc6", "relu6")),
        ("fc7", ("drop6", "fc7", "relu7")),
    )
    classifier = "fc8"

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(3, 96, 11, stride=4),
                relu1=nn.ReLU(),
                norm1=_normalisation(),
                pool1=_pooling(),
                conv2=nn.Conv2d(96, 256, 5, padding=2, groups=2),
                relu2=nn.ReLU(),
                norm2=_normalisation(),
                pool2=_pooling(),
                conv3=nn.Conv2d(256, 384, 3, padding=1),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(384, 384, 3, padding=1, groups=2),
                relu4=nn.ReLU(),
                conv5=nn.Conv2d(384, 256, 3, padding=1, groups=2),
                relu5=nn.ReLU(),
                pool5=_pooling(),
                flatten=nn.Flatten(),
                fc6=nn.Linear(256 * 6 * 6, 4096),
                relu6=nn.ReLU(),
                drop6=nn.Dropout(),
                fc7=nn.Linear(4096, 4096),
                relu7=nn.ReLU(),
                drop7=nn.Dropout(),
                fc8=nn.Linear(4096, 1000),
            )
        )


def _normalisation() -> nn.Module:
    """Over 5 neighbouring channels; torch, as Caffe and other than the paper, divides alpha by their number."""
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)


def _pooling() -> nn.Module:
    """Caffe rounds the number of windows up."""
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def read(path: Path) -> dict[str, Tensor]:
    """The file's weights as tensors of `AlexNet`, in float32.

    Raises:
        UserError: not such a file (see `pickled.py`), or one with other layers, shapes or types.
    """
    layers = read_arrays(path)
    missing, unknown = [name for name in SHAPES if name not in layers], sorted(set(layers) - set(SHAPES))
    require(
        not missing and not unknown,
        f"{path} is not the BVLC AlexNet: it lacks {', '.join(missing) or 'no layer'} and has "
        f"{', '.join(name[:40] for name in unknown[:10]) or 'no other'} besides; bring the file of that network.",
    )
    for name, shape in SHAPES.items():
        _check(name, layers[name], shape, path)
    tensors: dict[str, Tensor] = {}
    for name in SHAPES:
        weights, biases = layers.pop(name)  # each copy takes the place of what it was made from
        tensors[f"{name}.weight"] = _reordered(name, weights)
        tensors[f"{name}.bias"] = torch.from_numpy(biases.astype(np.float32))
    return tensors


def _check(name: str, arrays: list[Array], shape: tuple[int, ...], path: Path) -> None:
    found = " and ".join(f"{array.dtype.name} {list(array.shape)}" for array in arrays[:3]) or "nothing"
    require(
        [array.shape for array in arrays] == [shape, shape[-1:]]
        and all(array.dtype.kind == "f" and array.dtype.itemsize == 4 for array in arrays),
        f"{path} is not the BVLC AlexNet: {name} has {found} instead of float32 {list(shape)} and float32 "
        f"{list(shape[-1:])}; bring the file of that network.",
    )


def _reordered(name: str, weights: Array) -> Tensor:
    """A layer's weights with torch's order of axes: out, in, height, width."""
    if name == "conv1":
        weights = weights[:, :, ::-1]
    if name == "fc6":  # a convolution over all of pool5, written as a matrix
        weights = weights.reshape(6, 6, 256, 4096)
    axes = (3, 2, 0, 1) if weights.ndim == 4 else (1, 0)
    ordered = np.array(weights.transpose(axes), dtype=np.float32, order="C")
    return torch.from_numpy(ordered.reshape(len(ordered), -1) if name.startswith("fc") else ordered)
