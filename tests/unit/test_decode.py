"""Every kind of picture file becomes the right upright 8-bit RGB, and lands on the canvas as documented."""

from __future__ import annotations

import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from lit_transfer.data import decode as module
from lit_transfer.data.decode import DecodeError, Preprocessing, decode, is_plain, open_picture, open_rgb, to_canvas

# Rows: red green / blue white / black grey: no two flips or turns of it look alike.
PIXELS = np.array(
    [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]], [[0, 0, 0], [90, 90, 90]]], dtype=np.uint8
)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = open_rgb(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def preprocessing(canvas: int, fit: str = "crop", interpolation: str = "bicubic") -> Preprocessing:
    return Preprocessing(
        size=canvas,
        canvas=canvas,
        fit=fit,
        interpolation=interpolation,
        mean=(0.5, 0.4, 0.3),
        std=(0.1, 0.2, 0.3),
    )


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_grey_palette_and_one_bit() -> None:
    grey = np.array([[0, 100, 255]], dtype=np.uint8)
    assert (pixels(encoded(Image.fromarray(grey))) == grey[..., None]).all()
    palette = Image.fromarray(PIXELS).convert("P", palette=Image.Palette.ADAPTIVE)
    assert (pixels(encoded(palette)) == PIXELS).all()
    one_bit = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert pixels(encoded(one_bit)).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    wide = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(wide), kind)
    assert pixels(data)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def png(width: int, depth: int, colour: int, row: bytes) -> bytes:
    """A PNG of one row in a bit depth that Pillow reads but cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_other_bit_depths() -> None:
    colour = png(1, 16, 2, bytes.fromhex("ffff 8000 0100"))
    assert pixels(colour).tolist() == [[[255, 128, 1]]]
    four_bits = png(2, 4, 0, bytes([0x5F]))
    assert pixels(four_bits).tolist() == [[[85] * 3, [255] * 3]]
    assert not is_plain(open_picture(colour), colour) and not is_plain(open_picture(four_bits), four_bits)


def test_transparent_pictures_are_composited_over_white() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    assert pixels(encoded(Image.fromarray(rgba))).tolist() == [[[10, 20, 30], [255] * 3, [204] * 3]]
    grey = np.array([[[40, 255], [40, 0]]], dtype=np.uint8)
    assert pixels(encoded(Image.fromarray(grey, "LA"))).tolist() == [[[40] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, transparency=1)).tolist() == [[[200, 0, 0], [255] * 3]]
    assert pixels(encoded(palette, transparency=b"\xff\x00")).tolist() == [[[200, 0, 0], [255] * 3]]
    keyed = Image.fromarray(PIXELS)
    assert pixels(encoded(keyed, transparency=(255, 0, 0)))[0].tolist() == [[255] * 3, [0, 255, 0]]


def test_cmyk_with_and_without_adobes_marker() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    data = encoded(cyan, "JPEG", quality=100)
    place = data.index(b"\xff\xee")
    length = int.from_bytes(data[place + 2 : place + 4], "big")
    assert data[place + 4 : place + 9] == b"Adobe"
    assert abs(pixels(data).astype(int) - [0, 255, 255]).max() < 4
    # Without the marker the same bytes mean the opposite inks: all but cyan, that is black.
    assert pixels(data[:place] + data[place + 2 + length :]).max() < 4
    assert abs(pixels(encoded(cyan, "TIFF")).astype(int) - [0, 255, 255]).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    # How a camera stores the upright picture for each value: the inverse of what a reader must do.
    stored = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, 1),
        7: np.rot90(PIXELS, 2).transpose(1, 0, 2),
        8: np.rot90(PIXELS, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert np.array_equal(pixels(data), PIXELS)
    assert is_plain(open_picture(data), data) == (kind != "TIFF" and orientation == 1)


def test_animations_give_the_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data) == (255, 0, 0)).all(), kind
        assert not is_plain(open_picture(data), data)


def test_broken_files_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(picture(40, 40))
    with pytest.raises(DecodeError, match="not a picture"):
        open_rgb(b"I am text.")
    with pytest.raises(DecodeError, match="not a picture"):
        open_rgb(b"")
    with pytest.raises(DecodeError, match="not a picture"):
        open_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for kind in ("PNG", "JPEG"):
        with pytest.raises(DecodeError, match=r"truncated|broken|read|Premature end"):
            open_rgb(encoded(picture(40, 40), kind)[:900])
    with pytest.raises(DecodeError, match="no defined range"):
        open_rgb(encoded(Image.new("F", (2, 2)), "TIFF"))
    monkeypatch.setattr(module, "_MAX_PIXELS", 1599)
    with pytest.raises(DecodeError, match="1600 pixels are above the limit of 1599"):
        open_rgb(whole)


def test_a_decompression_bomb_is_not_decoded() -> None:
    small = encoded(Image.new("1", (8, 8)))
    header = small[12:16] + (20000).to_bytes(4, "big") * 2 + small[24:29]
    bomb = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    with pytest.raises(DecodeError, match="above the limit"):
        open_rgb(bomb)


def test_plain_files() -> None:
    def plain(data: bytes) -> bool:
        return is_plain(open_picture(data), data)

    assert all(plain(encoded(picture(9, 9), kind)) for kind in ("PNG", "JPEG", "WEBP"))
    assert plain(encoded(picture(9, 9).convert("L")))
    assert not plain(encoded(picture(9, 9), "BMP"))
    assert not plain(encoded(picture(9, 9).convert("RGBA")))
    assert not plain(encoded(picture(9, 9).convert("P")))
    assert not plain(encoded(picture(9, 9), transparency=(0, 0, 0)))
    assert not plain(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))))


def test_metadata_is_dropped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_rgb(encoded(picture(5, 4), "JPEG", exif=exif, comment=b"secret", icc_profile=b"profile"))
    again = encoded(image)
    assert image.size == (4, 5)
    assert not Image.open(io.BytesIO(again)).info and b"secret" not in again


def by_pillow(image: Image.Image, width: int, height: int, interpolation: str) -> np.ndarray:
    """Resized along rows and then along columns: Pillow alone takes either first, as its version and the shape say."""
    kind = Image.Resampling[interpolation.upper()]
    return np.asarray(image.resize((width, image.height), kind).resize((width, height), kind)).astype(int)


def assert_almost_equal(canvas: np.ndarray, expected: np.ndarray) -> None:
    difference = abs(canvas.transpose(1, 2, 0) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.05


@pytest.mark.parametrize("size", [(70, 133), (133, 70), (33, 32), (64, 64), (10, 12), (500, 375)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_is_the_middle_square_as_pillow_resizes_it(size: tuple[int, int], interpolation: str) -> None:
    image, side, kept = picture(*size), 32, min(size)
    left, top = (size[0] - kept) // 2, (size[1] - kept) // 2
    square = image.crop((left, top, left + kept, top + kept))
    found = to_canvas(image, preprocessing(side, interpolation=interpolation))
    assert found.shape == (3, side, side) and found.dtype == np.uint8
    assert found.transpose(1, 2, 0).flags.c_contiguous
    assert_almost_equal(found, by_pillow(square, side, side, interpolation))


def test_crop_of_a_picture_of_the_canvas_size_changes_nothing() -> None:
    image = picture(32, 32)
    assert np.array_equal(to_canvas(image, preprocessing(32)).transpose(1, 2, 0), np.asarray(image))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_squash_and_pad(interpolation: str) -> None:
    image = picture(60, 30)
    squashed = to_canvas(image, preprocessing(20, "squash", interpolation))
    assert_almost_equal(squashed, by_pillow(image, 20, 20, interpolation))
    padded = to_canvas(image, preprocessing(20, "pad", interpolation))
    assert_almost_equal(padded[:, 5:15], by_pillow(image, 20, 10, interpolation))
    assert padded[:, :5].max() == 0 and padded[:, 15:].max() == 0
    upright = to_canvas(image.transpose(Image.Transpose.ROTATE_90), preprocessing(20, "pad", interpolation))
    assert upright[:, :, 5:15].max() > 0 == upright[:, :, :5].max() == upright[:, :, 15:].max()


def test_a_panorama_does_not_need_a_huge_picture() -> None:
    for fit in ("crop", "squash", "pad"):
        assert to_canvas(Image.new("RGB", (200_000, 1), (7, 8, 9)), preprocessing(224, fit)).shape == (
            3,
            224,
            224,
        )


def test_decode_and_plain_values() -> None:
    how = preprocessing(8, "pad")
    data = encoded(picture(9, 7))
    assert np.array_equal(decode(data, how), to_canvas(open_rgb(data), how))
    assert Preprocessing.from_plain(json.loads(json.dumps(how.to_plain()))) == how
