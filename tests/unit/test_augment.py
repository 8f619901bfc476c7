from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_transfer.config import Augment, Image
from lit_transfer.data.decode import Preprocessing
from lit_transfer.data.loading import DRAWS
from lit_transfer.data.plan import uniforms
from lit_transfer.model.augment import affine, colours, eval_input, mix, normalise, scaled, settle_image, train_input

PLAIN = Preprocessing(
    size=32, canvas=32, fit="crop", interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)
WIDE = Preprocessing(
    size=32, canvas=40, fit="crop", interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)
EVERYTHING = Augment(
    flip_h=0.5,
    flip_v=0.5,
    quarter_turns=True,
    rotate_degrees=30,
    shift=0.2,
    zoom=0.3,
    crop_area=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
)


def canvases(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def drawn(count: int, **places: float) -> Tensor:
    """Random numbers of which some are chosen: `u3=1.0` is the fourth of each sample."""
    uniform = torch.from_numpy(uniforms(0, 0, np.arange(count), DRAWS))
    for name, value in places.items():
        uniform[:, int(name[1:])] = value
    return uniform


def augmented(canvas: Tensor, uniform: Tensor, preprocessing: Preprocessing = PLAIN, **settings: Any) -> Tensor:
    return train_input(canvas, uniform, Augment(**settings), preprocessing)


def test_normalising_leaves_its_argument_and_takes_any_memory_format() -> None:
    images = torch.rand(2, 3, 5, 7)
    before, mean, std = images.clone(), torch.tensor(WIDE.mean).view(3, 1, 1), torch.tensor(WIDE.std).view(3, 1, 1)
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        found = normalise(given, WIDE)
        assert torch.equal(found, (before - mean) / std) and torch.equal(given, before)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_eval_input_is_the_normalised_middle() -> None:
    canvas = canvases(2, 40)
    middle = canvas[:, :, 4:36, 4:36].float() / 255
    mean, std = torch.tensor(WIDE.mean).view(3, 1, 1), torch.tensor(WIDE.std).view(3, 1, 1)
    assert torch.equal(eval_input(canvas, WIDE), (middle - mean) / std)
    assert eval_input(canvas, WIDE).dtype == torch.float32


def test_without_augmentation_training_sees_the_pixels_of_evaluation_to_the_bit() -> None:
    canvas = canvases(4, 40)
    assert torch.equal(augmented(canvas, drawn(4), WIDE), eval_input(canvas, WIDE))


@pytest.mark.parametrize(
    "identity",
    [{"shift": 1e-9}, {"zoom": 1e-9}, {"rotate_degrees": 1e-6}, {"flip_h": 1e-9}, {"brightness": 1e-9}],
)
def test_hardly_any_augmentation_is_hardly_a_difference(identity: dict[str, float]) -> None:
    canvas = canvases(4, 40)
    assert torch.allclose(augmented(canvas, drawn(4), WIDE, **identity), eval_input(canvas, WIDE), atol=1e-4)


def test_flips_are_those_of_torch() -> None:
    canvas = canvases(4, 40)
    plain = eval_input(canvas, WIDE)
    assert torch.allclose(augmented(canvas, drawn(4), WIDE, flip_h=1), plain.flip(3), atol=1e-4)
    assert torch.allclose(augmented(canvas, drawn(4), WIDE, flip_v=1), plain.flip(2), atol=1e-4)
    some = augmented(canvas, drawn(4, u0=0.3), WIDE, flip_h=0.3)
    assert torch.allclose(some, plain, atol=1e-4), "0.3 is not below a probability of 0.3"


def test_half_of_the_samples_are_flipped() -> None:
    canvas = torch.arange(32, dtype=torch.uint8).expand(2000, 3, 32, 32)
    images = augmented(canvas, drawn(2000), flip_h=0.25)
    flipped = (images[:, 0, 0, 0] > images[:, 0, 0, 31]).float().mean()
    assert abs(flipped - 0.25) < 0.05


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_are_those_of_torch(turns: int) -> None:
    canvas = canvases(2, 40)
    images = augmented(canvas, drawn(2, u2=turns / 4 + 0.1), WIDE, quarter_turns=True)
    assert torch.allclose(images, torch.rot90(eval_input(canvas, WIDE), turns, (2, 3)), atol=1e-4)


def test_a_rotation_of_ninety_degrees_is_a_quarter_turn() -> None:
    canvas = canvases(2, 32)
    images = augmented(canvas, drawn(2, u3=1.0), rotate_degrees=90)
    assert torch.allclose(images, torch.rot90(eval_input(canvas, PLAIN), 1, (2, 3)), atol=1e-4)


def spot(row: int, column: int) -> Tensor:
    canvas = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    canvas[:, :, row, column] = 255
    return canvas


def centre_of(images: Tensor) -> tuple[float, float]:
    """Row and column of the mass of the first picture, in pixels."""
    weight = images[0, 0] / images[0, 0].sum()
    places = torch.arange(32.0)
    return float((weight.sum(1) * places).sum()), float((weight.sum(0) * places).sum())


@pytest.mark.parametrize("degrees", [10, 30, -45])
def test_a_bright_spot_turns_about_the_centre(degrees: float) -> None:
    images = augmented(spot(10, 20), drawn(1, u3=0.5 + degrees / 120), rotate_degrees=60)
    row, column, angle = 10 - 15.5, 20 - 15.5, math.radians(degrees)  # counter-clockwise on the screen
    expected = (
        math.cos(angle) * row - math.sin(angle) * column,
        math.sin(angle) * row + math.cos(angle) * column,
    )
    assert centre_of(images) == pytest.approx((expected[0] + 15.5, expected[1] + 15.5), abs=0.3)


def test_a_shift_moves_by_a_share_of_the_side() -> None:
    images = augmented(spot(16, 16), drawn(1, u9=1.0, u10=0.25), shift=0.25)
    assert centre_of(images) == pytest.approx((16 + 4, 16 - 8), abs=1e-3)  # looks right and up: moves left and down


def test_zoom_scales_each_axis_about_the_centre() -> None:
    canvas = (torch.arange(32) * 8).to(torch.uint8).expand(1, 3, 32, 32)  # brighter to the right
    images = augmented(canvas, drawn(1, u7=0.0, u8=0.9), zoom=0.5)
    steps = images[0, 0, 5].diff()[1:-1] * 255 / 8
    assert torch.allclose(steps, torch.full_like(steps, 0.5), atol=1e-3), "half of the columns fill the width"
    assert torch.allclose(images, images[:, :, :1].expand_as(images), atol=1e-5), "rows stay alike"


def test_crops_stay_inside_and_keep_their_share_of_the_area() -> None:
    maps = affine(drawn(5000), Augment(crop_area=0.3), share=0.8)
    side_x, side_y, corner = maps[:, 0, 0], maps[:, 1, 1], maps[:, :, 2]
    assert torch.equal(side_x, side_y) and (maps[:, 0, 1] == 0).all() and (maps[:, 1, 0] == 0).all()
    assert (corner.abs() + side_x[:, None]).max() <= 1 + 1e-6
    area = side_x**2
    assert area.min() >= 0.3 - 1e-6 and area.max() <= 1
    assert area.mean() == pytest.approx(0.65, abs=0.02), "the area is uniform"
    touches = corner.abs() + side_x[:, None] > 0.95
    assert touches.float().mean() > 0.1, "and every place is possible"


def test_pixels_from_outside_repeat_the_border() -> None:
    canvas = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    images = augmented(canvas, drawn(1, u9=1.0), shift=1.0)
    assert torch.allclose(images, torch.full_like(images, 200 / 255))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    canvas, uniform = canvases(6, 40), drawn(6)
    whole = train_input(canvas, uniform, EVERYTHING, WIDE)
    order = torch.tensor([4, 1, 5])
    assert torch.equal(train_input(canvas[order], uniform[order], EVERYTHING, WIDE), whole[order])
    assert torch.equal(train_input(canvas[2:3], uniform[2:3], EVERYTHING, WIDE), whole[2:3])
    again = train_input(canvas, drawn(6), EVERYTHING, WIDE)
    assert torch.equal(again, whole)
    assert not torch.allclose(train_input(canvas[:1].expand(2, -1, -1, -1), uniform[:2], EVERYTHING, WIDE)[1], whole[0])


def one_pixel(*rgb: float) -> Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1)


def test_brightness_multiplies() -> None:
    images = colours(one_pixel(0.2, 0.4, 0.8), drawn(1, u11=0.75), Augment(brightness=0.4))
    assert torch.allclose(images, one_pixel(0.24, 0.48, 0.96))
    brighter = colours(one_pixel(0.2, 0.4, 0.9), drawn(1, u11=1.0), Augment(brightness=0.4))
    assert torch.allclose(brighter, one_pixel(0.28, 0.56, 1.0)), "values stay below 1"


def test_contrast_blends_with_the_mean_grey_of_the_sample() -> None:
    image = torch.cat([one_pixel(1, 0, 0), one_pixel(0, 0, 1)], dim=3)  # greys 0.299 and 0.114
    images = colours(image.repeat(2, 1, 1, 1), drawn(2, u12=0.25), Augment(contrast=1.0))
    mean = (0.299 + 0.114) / 2
    red, blue = [mean + 0.5 * (v - mean) for v in (1, 0, 0)], [mean + 0.5 * (v - mean) for v in (0, 0, 1)]
    expected = torch.cat([one_pixel(*red), one_pixel(*blue)], dim=3)
    assert torch.allclose(images, expected.repeat(2, 1, 1, 1), atol=1e-6)


def test_saturation_blends_with_the_grey_of_the_pixel() -> None:
    grey = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.8
    images = colours(one_pixel(0.2, 0.4, 0.8), drawn(1, u13=0.25), Augment(saturation=1.0))
    assert torch.allclose(images, one_pixel(*(grey + 0.5 * (v - grey) for v in (0.2, 0.4, 0.8))), atol=1e-6)
    assert torch.allclose(
        colours(one_pixel(0.2, 0.4, 0.8), drawn(1, u13=0.0), Augment(saturation=1.0)),
        one_pixel(grey, grey, grey),
    )


def test_settings_of_the_config_win_over_the_backbone_and_the_margin_is_even() -> None:
    own = Image(size=224, crop=0.875, interpolation="bicubic", mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2])
    settled, preprocessing = settle_image(Image(size=96, fit="pad"), own)
    assert (settled.size, settled.crop, settled.fit, settled.interpolation) == (96, 0.875, "pad", "bicubic")
    assert (preprocessing.size, preprocessing.canvas, preprocessing.fit) == (96, 110, "pad")
    assert settle_image(Image(), own)[1].canvas == 256
    for size in range(8, 80):
        for crop in (0.8, 0.9, 0.95, 1.0):
            canvas = settle_image(Image(size=size, crop=crop), own)[1].canvas
            assert canvas >= size and (canvas - size) % 2 == 0 and abs(canvas - size / crop) <= 1


def test_an_augmented_centre_is_not_blurred() -> None:
    """Half a pixel between the two ways to the centre would smooth every training picture."""
    own = Image(size=31, crop=0.9, interpolation="bilinear", mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    _, preprocessing = settle_image(Image(), own)
    canvas = canvases(1, preprocessing.canvas)
    images = train_input(canvas, drawn(1, u0=0.9), Augment(flip_h=0.5), preprocessing)
    assert torch.allclose(images, eval_input(canvas, preprocessing), atol=1e-4)


def test_strength_scales_ranges_and_probabilities_up_to_their_ends() -> None:
    assert scaled(EVERYTHING, 1.0) == EVERYTHING
    assert scaled(EVERYTHING, 0.0) == Augment()
    half = scaled(EVERYTHING, 0.5)
    assert (half.flip_h, half.rotate_degrees, half.shift, half.crop_area, half.quarter_turns) == (
        *(0.25, 15, 0.1, 0.75),
        True,
    )
    most = scaled(EVERYTHING, 100.0)
    assert (most.flip_h, most.rotate_degrees, most.zoom, most.brightness) == (1.0, 180.0, 0.99, 1.0)
    assert 0 < most.crop_area < 0.05


def test_mixup_is_the_convex_sum_with_the_picture_before() -> None:
    images = torch.rand(5, 3, 8, 8)
    torch.manual_seed(3)
    mixed, own = mix(images, 0.4, 0.0)
    assert 0 < own < 1
    for i in range(5):
        assert torch.allclose(mixed[i], own * images[i] + (1 - own) * images[i - 1], atol=1e-6)


def test_the_share_is_drawn_from_a_beta_distribution() -> None:
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1))."""
    torch.manual_seed(0)
    images, alpha = torch.zeros(2, 3, 4, 4), 0.3
    shares = torch.tensor([mix(images, alpha, 0.0)[1] for _ in range(4000)])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_cutmix_pastes_one_box_and_the_share_is_what_is_left() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 20, 30)
    kept = images.clone()
    areas = []
    for seed in range(300):
        torch.manual_seed(seed)
        mixed, own = mix(images, 0.0, 1.0)
        pasted = mixed[1, 0] == 0
        assert torch.equal(mixed[:, 1], mixed[:, 2]) and ((mixed == images) | (mixed == images.roll(1, 0))).all()
        assert all(torch.equal(mixed[i, 0] != i, pasted) for i in range(4)), "the same box in every picture"
        rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
        assert pasted.sum() == (0 if not len(rows) else (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1))
        assert own == pytest.approx(1 - float(pasted.sum()) / 600)
        areas.append(1 - own)
    assert torch.equal(images, kept), "what is handed over is not changed"
    # Uniform shares (alpha 1) of boxes with uniform centres: of a side s, 1 - s / 4 lies inside on average.
    share = np.linspace(0, 1, 1001)
    assert np.mean(areas) == pytest.approx(np.mean((np.sqrt(share) * (1 - np.sqrt(share) / 4)) ** 2), abs=0.04)


def test_with_both_each_step_takes_one_of_the_two() -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    torch.manual_seed(0)
    cut = [bool(((mixed == 0) | (mixed == 1)).all()) for mixed, _ in (mix(images, 1.0, 1.0) for _ in range(400))]
    assert 0.4 < np.mean(cut) < 0.6
