"""From uint8 canvas to network input: per-sample random changes of a whole batch at once, and normalisation.

Random parameters are read from numbers that travel with the batch (`data/plan.py: uniforms`), so a sample's
augmentation depends on (seed, epoch, sample) and never on the rank or the worker.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_transfer.config import Augment, Image
from lit_transfer.data.decode import Preprocessing


def settle_image(image: Image, own: Image) -> tuple[Image, Preprocessing]:
    """A config's settings with the backbone's own in the place of every null, and what they amount to."""
    settled = replace(own, **{key: value for key, value in asdict(image).items() if value is not None})
    assert settled.size and settled.crop and settled.interpolation and settled.mean and settled.std, (
        "a backbone has all"
    )
    preprocessing = Preprocessing(
        size=settled.size,
        # An even margin: the centre then lies on whole pixels, and augmentation need not blur to hit it.
        canvas=settled.size + 2 * round((settled.size / settled.crop - settled.size) / 2),
        fit=settled.fit,
        interpolation=settled.interpolation,
        mean=(settled.mean[0], settled.mean[1], settled.mean[2]),
        std=(settled.std[0], settled.std[1], settled.std[2]),
    )
    return settled, preprocessing


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Values in [0, 1], [B, 3, H, W], less the mean and over the standard deviation of each channel.

    The result is in channels-last memory, as the network takes it.
    """
    return _normalise_in_place(images.clone(memory_format=torch.channels_last), preprocessing)


def _normalise_in_place(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    # New memory for a batch costs a CPU more than the arithmetic.
    mean, std = (_along_rows(values, images) for values in (preprocessing.mean, preprocessing.std))
    return images.sub_(mean).div_(std)


def _along_rows(values: tuple[float, float, float], images: Tensor) -> Tensor:
    """A value a channel as [1, 3, 1, W]: a CPU takes whole rows several times sooner than three numbers at a time."""
    width = images.shape[-1]
    return torch.tensor(values, device=images.device).repeat(width).view(1, 1, width, 3).permute(0, 3, 1, 2)


def centre(canvas: Tensor, size: int) -> Tensor:
    """The middle of uint8 canvases [B, 3, C, C] as floats in [0, 1], [B, 3, size, size]."""
    start = (canvas.shape[-1] - size) // 2
    return canvas[..., start : start + size, start : start + size].float().div_(255)


def eval_input(canvas: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Network input without any randomness: uint8 [B, 3, C, C] -> float32 [B, 3, S, S]."""
    return _normalise_in_place(centre(canvas, preprocessing.size), preprocessing)


def train_input(canvas: Tensor, uniform: Tensor, augment: Augment, preprocessing: Preprocessing) -> Tensor:
    """Augmented network input: uint8 [B, 3, C, C] and random numbers [B, DRAWS] -> float32 [B, 3, S, S]."""
    size = preprocessing.size
    if moves(augment):
        grid = F.affine_grid(
            affine(uniform, augment, size / canvas.shape[-1]),
            [len(canvas), 3, size, size],
            align_corners=False,
        )
        # Pixels from outside repeat the border: an edge of black would be a feature of its own.
        images = F.grid_sample(canvas.float() / 255, grid, padding_mode="border", align_corners=False)
    else:
        images = centre(canvas, size)
    images = colours(images, uniform, augment).contiguous(memory_format=torch.channels_last)
    return _normalise_in_place(images, preprocessing)


def moves(augment: Augment) -> bool:
    """Whether any change of position is asked for."""
    return bool(
        augment.flip_h
        or augment.flip_v
        or augment.quarter_turns
        or augment.rotate_degrees
        or augment.shift
        or augment.zoom
        or augment.crop_area < 1
    )


def colourful(augment: Augment) -> bool:
    """Whether any change of colour is asked for."""
    return bool(augment.brightness or augment.contrast or augment.saturation)


def affine(uniform: Tensor, augment: Augment, share: float) -> Tensor:
    """Maps of output to canvas positions in [-1, 1], [B, 2, 3]; without augmentation the centre `share`."""
    u = uniform.T
    flip_x = 1 - 2 * (u[0] < augment.flip_h).float()
    flip_y = 1 - 2 * (u[1] < augment.flip_v).float()
    turn = torch.floor(4 * u[2]) * (math.pi / 2) if augment.quarter_turns else torch.zeros_like(u[2])
    angle = turn + (2 * u[3] - 1) * math.radians(augment.rotate_degrees)
    if augment.crop_area < 1:
        side = torch.sqrt(augment.crop_area + (1 - augment.crop_area) * u[4])
        corner_x, corner_y = (1 - side) * (2 * u[5] - 1), (1 - side) * (2 * u[6] - 1)
    else:
        side, corner_x, corner_y = (
            torch.full_like(u[4], share),
            torch.zeros_like(u[5]),
            torch.zeros_like(u[6]),
        )
    # Keras' convention: a zoom factor over 1 shows more of the picture, so it scales the sampled window.
    scale_x = side * flip_x * (1 + augment.zoom * (2 * u[7] - 1))
    scale_y = side * flip_y * (1 + augment.zoom * (2 * u[8] - 1))
    move_x = corner_x + 2 * share * augment.shift * (2 * u[9] - 1)
    move_y = corner_y + 2 * share * augment.shift * (2 * u[10] - 1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [cos * scale_x, -sin * scale_y, move_x, sin * scale_x, cos * scale_y, move_y]
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def colours(images: Tensor, uniform: Tensor, augment: Augment) -> Tensor:
    """Brightness, contrast and saturation factors of each sample, [B, 3, H, W] in [0, 1] -> the same."""
    if not colourful(augment):
        return images
    factor = 2 * uniform[:, 11:14, None, None, None] - 1
    images = images * (1 + augment.brightness * factor[:, 0])
    grey = _grey(images).mean(dim=(2, 3), keepdim=True)
    images = grey + (images - grey) * (1 + augment.contrast * factor[:, 1])
    grey = _grey(images)
    images = grey + (images - grey) * (1 + augment.saturation * factor[:, 2])
    return images.clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)  # ITU-R BT.601
    return (images * weights).sum(dim=1, keepdim=True)


def scaled(augment: Augment, strength: float) -> Augment:
    """All ranges and probabilities times `strength`, cut off where they end; 0 is no augmentation."""
    ends = {"rotate_degrees": 180.0, "zoom": 0.99}
    numbers = {key: value for key, value in asdict(augment).items() if key not in ("quarter_turns", "crop_area")}
    return Augment(
        **{key: min(value * strength, ends.get(key, 1.0)) for key, value in numbers.items()},
        quarter_turns=augment.quarter_turns and strength > 0,
        crop_area=max(1 - (1 - augment.crop_area) * strength, 0.01),
    )


def mix(images: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, float]:
    """Mix each picture [B, 3, H, W] with the one before it in the batch, by the global generator.

    mixup: Zhang et al. 2018, eq. 1, with alpha `mixup`; cutmix: Yun et al. 2019, section 3.2, with alpha `cutmix`.
    Where both are given, either is taken half of the time.

    Returns:
        The pictures, and the share of each that is its own: the weight of its own target.
    """
    cut = cutmix > 0 and (mixup == 0 or torch.rand(()).item() < 0.5)
    alpha = torch.tensor(cutmix if cut else mixup)
    own = torch.distributions.Beta(alpha, alpha).sample().item()
    others = images.roll(1, 0)
    if not cut:
        return images * own + others * (1 - own), own
    height, width = images.shape[2:]
    half = math.sqrt(1 - own) / 2
    y, x = torch.rand(2).tolist()
    top, bottom = (round(height * min(max(edge, 0.0), 1.0)) for edge in (y - half, y + half))
    left, right = (round(width * min(max(edge, 0.0), 1.0)) for edge in (x - half, x + half))
    images = images.clone()
    images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)
