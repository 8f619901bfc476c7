"""JPEG files give Pillow's pixels; damage that Pillow passes over is refused; large pictures are decoded small."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_image

from lit_transfer.data import jpeg
from lit_transfer.data.decode import DecodeError, Preprocessing, decode, is_plain, open_picture, open_rgb, to_canvas

PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
SIZES = [(1, 1), (2, 3), (7, 9), (8, 8), (15, 17), (33, 31), (100, 75)]


def encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def of_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def preprocessing(canvas: int, fit: str = "crop") -> Preprocessing:
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Preprocessing(size=canvas, canvas=canvas, fit=fit, interpolation="bicubic", mean=zeros, std=ones)


def assert_pillows(data: bytes) -> None:
    assert jpeg.is_readable(data, Image.open(io.BytesIO(data)).size)
    assert np.array_equal(np.asarray(open_rgb(data)), of_pillow(data))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_pillows_to_the_bit(size: tuple[int, int]) -> None:
    image = PHOTO.resize(size)
    for sampling, progressive, restarts, quality in itertools.product((0, 1, 2), (False, True), (0, 1), (60, 95)):
        options = {"progressive": progressive, "restart_marker_rows": restarts, "quality": quality}
        assert_pillows(encoded(image, subsampling=sampling, **options))
    assert_pillows(encoded(image, keep_rgb=True))
    for sampling in ("440", "411"):
        assert_pillows(simplejpeg.encode_jpeg(np.array(image), colorsubsampling=sampling))


@pytest.mark.parametrize("size", SIZES)
def test_grey_pictures(size: tuple[int, int]) -> None:
    for progressive in (False, True):
        data = encoded(PHOTO.resize(size).convert("L"), progressive=progressive)
        assert_pillows(data)
        image = open_picture(data)
        assert image.mode == "L" and image.size == size and is_plain(image, data)


def test_the_first_of_several_pictures_in_a_file() -> None:
    file, small = io.BytesIO(), PHOTO.resize((60, 40))
    small.save(file, "MPO", save_all=True, append_images=[small.rotate(180)])
    data = file.getvalue()
    assert_pillows(data)
    assert not is_plain(open_picture(data), data)
    scan = data.index(b"\xff\xda")
    damaged = data[: scan + 200] + b"\xff\xd0" + data[scan + 202 :]  # a marker where none belongs
    assert of_pillow(damaged).shape == (40, 60, 3)
    with pytest.raises(DecodeError, match="Corrupt JPEG data"):
        open_rgb(damaged)


def in_sampling(horizontal: int, vertical: int) -> bytes:
    """One block of each colour for so many of brightness, all grey: kinds that Pillow reads and cannot write."""
    size = (8 * horizontal, 8 * vertical)
    data = encoded(Image.new("RGB", size, (128, 128, 128)), subsampling=0)
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    assert data[frame + 11] == 0x11 and data[scan + 4] == 3
    head = bytearray(data[: scan + 14])
    head[frame + 11] = 16 * horizontal + vertical
    head[scan + 6] = head[scan + 8] = head[scan + 10] = 0  # one code table for all
    bits = "001010" * (horizontal * vertical + 2)  # of each block: the mean stays, and there is no more
    bits += "1" * (-len(bits) % 8)
    return bytes(head) + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9"


@pytest.mark.parametrize("sampling", [(3, 1), (1, 4), (4, 2)])
def test_samplings_that_are_left_to_pillow(sampling: tuple[int, int]) -> None:
    rare = in_sampling(*sampling)
    size = (8 * sampling[0], 8 * sampling[1])
    assert not jpeg.is_readable(rare, size)
    image = open_rgb(rare)
    assert image.size == size and (np.asarray(image) == 128).all()


def test_what_else_is_left_to_pillow() -> None:
    cmyk = encoded(PHOTO.resize((16, 16)).convert("CMYK"))
    assert not jpeg.is_readable(cmyk, (16, 16))
    assert np.array_equal(decode(cmyk, preprocessing(16)), to_canvas(open_rgb(cmyk), preprocessing(16)))
    assert abs(int(decode(cmyk, preprocessing(16)).mean()) - int(np.asarray(PHOTO.resize((16, 16))).mean())) < 10
    plain = encoded(PHOTO.resize((16, 16)))
    assert jpeg.is_readable(plain, (16, 16)) and not jpeg.is_readable(plain, (16, 17))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_that_ends_early_is_refused_wherever_it_ends(progressive: bool) -> None:
    data = encoded(PHOTO.resize((64, 48)), progressive=progressive)
    for length in range(0, len(data), 7 if len(data) % 7 else 5):
        for reader in (open_rgb, lambda part: decode(part, preprocessing(16))):
            with pytest.raises(DecodeError) as told:
                reader(data[:length])
            assert str(told.value) and "\n" not in str(told.value)
    decode(data + b"rest", preprocessing(16))


@pytest.mark.parametrize("progressive", [False, True])
def test_what_libjpeg_warns_of_is_refused_and_so_is_all_that_pillow_refuses(progressive: bool) -> None:
    data, rng = encoded(PHOTO.resize((64, 48)), progressive=progressive), np.random.default_rng(0)
    passed_over = 0
    for place in rng.integers(0, len(data), 300):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.integers(8)
        try:
            theirs = of_pillow(bytes(flipped))
        except Exception:
            theirs = None
        try:
            ours = np.asarray(open_rgb(bytes(flipped)))
        except DecodeError:
            passed_over += theirs is not None
        else:
            assert theirs is not None and np.array_equal(ours, theirs)
    assert passed_over > 30


def test_a_header_of_too_many_pixels_is_not_decoded() -> None:
    data = bytearray(encoded(PHOTO.resize((16, 16))))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (20_000).to_bytes(2, "big") * 2
    with pytest.raises(DecodeError, match="above the limit"):
        decode(bytes(data), preprocessing(16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PHOTO.resize((96, 64)), exif=exif)
    turn = [None, None, *(Image.Transpose(number) for number in (0, 3, 1, 5, 4, 6, 2))][orientation]
    for picture, ours in (
        (of_pillow(data), np.asarray(open_rgb(data))),
        (jpeg.read(data, (96, 64), divisor=2), decode(data, preprocessing(16))),
    ):
        upright = picture if turn is None else np.asarray(Image.fromarray(picture).transpose(turn))
        assert np.array_equal(ours, upright if len(picture) == 64 else to_canvas(upright, preprocessing(16)))


def test_the_divisor_leaves_twice_the_canvas() -> None:
    assert [jpeg.divisor(length, 32) for length in (1, 127, 128, 255, 256, 511, 512, 9999)] == [1, 1, 2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize("size", [(640, 424), (637, 421)])
@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_a_part_of_the_size_is_pillows_to_the_bit(divisor: int, size: tuple[int, int]) -> None:
    width, height = (side // divisor for side in size)
    for image in (PHOTO.resize(size), PHOTO.resize(size).convert("L")):
        data = encoded(image)
        small = Image.open(io.BytesIO(data))
        small.draft(image.mode, (width, height))
        ours = jpeg.read(data, size, grey=image.mode == "L", divisor=divisor)
        assert np.array_equal(ours, np.asarray(small)[:height, :width])


def test_a_side_that_is_shorter_than_the_divisor_keeps_a_pixel() -> None:
    assert jpeg.read(encoded(PHOTO.resize((640, 3))), (640, 3), divisor=8).shape == (1, 80, 3)


SMALL = [("crop", 79, 2), ("crop", 50, 4), ("crop", 25, 8), ("squash", 79, 2), ("squash", 25, 8)]
SMALL_PADDED = [("pad", 100, 2), ("pad", 79, 4), ("pad", 39, 8)]


@pytest.mark.parametrize(("fit", "canvas", "divisor"), [*SMALL, *SMALL_PADDED])
@pytest.mark.parametrize("size", [(640, 424), (637, 421)])
def test_a_large_picture_decoded_small_is_almost_the_same(
    size: tuple[int, int], fit: str, canvas: int, divisor: int
) -> None:
    data, how = encoded(PHOTO.crop((0, 0, *size)), quality=90), preprocessing(canvas, fit)
    small = to_canvas(jpeg.read(data, size, divisor=divisor), how)
    assert np.array_equal(decode(data, how), small)
    # The same part of the picture, of all of its pixels.
    width, height = (side // divisor for side in size)
    kept_width, kept_height = (min(width, height),) * 2 if fit == "crop" else (width, height)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    box = (left, top, left + kept_width, top + kept_height)
    whole = to_canvas(open_rgb(data).crop(tuple(divisor * edge for edge in box)), how)
    difference = abs(whole.astype(int) - small)
    assert 0 < difference.mean() < 1 and difference.max() < 12
