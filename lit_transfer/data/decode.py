"""From the bytes of a picture file to uint8 pixels on a fixed canvas.

Training, evaluation and prediction all decode files here, so they see the same pixels.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError

from lit_transfer.data import jpeg

# Closed: Pillow's other readers run programs (EPS), or read formats that hold no photographs.
# AVIF is missing from some builds.
Image.init()
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
_USUAL = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_RARE = (".jfif", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif")
EXTENSIONS = frozenset((*_USUAL, *_RARE))

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # Pillow's limit, also where a caller switched it off


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes network input.

    Args:
        size: side of the network's square input, in pixels.
        canvas: side of the decoded square, in pixels; the network's input is cut from it.
        fit: how a picture fills the canvas: `crop`, `squash` or `pad`.
        interpolation: `bilinear` or `bicubic`, both antialiased.
        mean: per-channel mean of values in [0, 1].
        std: per-channel standard deviation of values in [0, 1].
    """

    size: int
    canvas: int
    fit: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        assert self.fit in ("crop", "squash", "pad"), self.fit
        assert self.interpolation in ("bilinear", "bicubic"), self.interpolation
        assert 0 < self.size <= self.canvas, (self.size, self.canvas)

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON; `from_plain` reads them back."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_plain`."""
        return cls(**{**plain, "mean": tuple(plain["mean"]), "std": tuple(plain["std"])})


class DecodeError(Exception):
    """The picture cannot be decoded; the message is the reason, on one line."""


def open_picture(data: bytes) -> Image.Image:
    """The first frame of a picture file, in its own mode and orientation, wholly decoded.

    Raises:
        DecodeError: not a picture, damaged, or above Pillow's limit of pixels.
    """
    with _refusing():
        header = _header(data)
        if not _is_for_jpeg(header, data):
            header.load()
            return header
        image = Image.fromarray(jpeg.read(data, header.size, grey=header.mode == "L"))
        image.format, image.info = header.format, header.info
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as upright 8-bit RGB, composited over white, free of embedded metadata.

    Colours are taken as sRGB: embedded colour profiles are not applied.

    Raises:
        DecodeError: the mode has no defined range of values, such as 32-bit floats.
    """
    with _refusing():  # a broken palette or profile shows only here
        return _over_white(_eight_bits(_upright(image)))


def open_rgb(data: bytes) -> Image.Image:
    """Any picture file as upright 8-bit RGB; `DecodeError` if that cannot be."""
    return to_rgb(open_picture(data))


def is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether a loaded file is a single-frame, upright, opaque 8-bit grey or RGB JPEG, PNG or WebP."""
    depth = data[24] if image.format == "PNG" else 8  # of the PNG header; Pillow hides 2, 4 and 16 bits
    return (
        image.format in ("JPEG", "PNG", "WEBP")
        and image.mode in ("L", "RGB")
        and depth == 8
        and "transparency" not in image.info
        and getattr(image, "n_frames", 1) == 1
        and _orientation(image) not in _UPRIGHT
    )


def to_canvas(picture: Image.Image | NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Place an RGB picture, `[H, W, 3]` as an array, on the square canvas.

    `crop` cuts out the middle square and resizes it to the canvas, `squash` resizes both sides, `pad` resizes the long
    side and centres the picture on black.

    Returns:
        uint8 `[3, canvas, canvas]`, a view of memory `[canvas, canvas, 3]`.
    """
    pixels = np.require(picture, np.uint8, "W")  # torch takes no array that cannot be written
    side, interpolation = preprocessing.canvas, preprocessing.interpolation
    height, width = pixels.shape[:2]
    if preprocessing.fit == "pad":
        fitted_width, fitted_height = scaled_size(width, height, side / max(width, height))
        left, top = (side - fitted_width) // 2, (side - fitted_height) // 2
        square = np.zeros((side, side, 3), np.uint8)
        fitted = _resized(pixels, fitted_height, fitted_width, interpolation)
        square[top : top + fitted_height, left : left + fitted_width] = fitted
    else:
        if preprocessing.fit == "crop":
            kept = min(height, width)
            left, top = (width - kept) // 2, (height - kept) // 2
            pixels = pixels[top : top + kept, left : left + kept]
        square = _resized(pixels, side, side, interpolation)
    return square.transpose(2, 0, 1)


def decode(data: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """A picture file as `to_canvas` gives it: a function of these two alone; `DecodeError` if it cannot be decoded.

    A JPEG that is many times larger than the canvas is decoded at 1/2, 1/4 or 1/8 of its size (`jpeg.divisor`).
    """
    with _refusing():
        header = _header(data)
        if _is_for_jpeg(header, data):
            filling = (max if preprocessing.fit == "pad" else min)(header.size)
            pixels = jpeg.read(data, header.size, divisor=jpeg.divisor(filling, preprocessing.canvas))
            turn = _UPRIGHT.get(_orientation(header))
            picture = pixels if turn is None else Image.fromarray(pixels).transpose(turn)
        else:
            header.load()
            picture = to_rgb(header)
    return to_canvas(picture, preprocessing)


def scaled_size(width: int, height: int, factor: float) -> tuple[int, int]:
    """Width and height times a factor, rounded, at least one pixel each."""
    return max(1, round(width * factor)), max(1, round(height * factor))


@contextmanager
def _refusing() -> Iterator[None]:
    """Gives whatever a reader raises for a broken file as a `DecodeError`."""
    try:
        yield
    except UnidentifiedImageError:
        raise DecodeError("not a picture in a known format") from None
    except Image.DecompressionBombError:
        raise DecodeError(f"the pixels are above the limit of {_MAX_PIXELS}") from None
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for broken files
        raise DecodeError(_one_line(error)) from None


def _header(data: bytes) -> Image.Image:
    """A picture file of which nothing but the header is read; refuses one of too many pixels."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    pixels = image.width * image.height
    if pixels > _MAX_PIXELS:
        raise DecodeError(f"{pixels} pixels are above the limit of {_MAX_PIXELS}")
    return image


def _is_for_jpeg(header: Image.Image, data: bytes) -> bool:
    # MPO: several JPEGs in one file, the picture first; how many phones and cameras save.
    return header.format in ("JPEG", "MPO") and jpeg.is_readable(data, header.size)


def _resized(pixels: NDArray[np.uint8], height: int, width: int, interpolation: str) -> NDArray[np.uint8]:
    """Antialiased, `[H, W, 3]` -> `[height, width, 3]`: Pillow's filters, to within 2 of 255.

    It computes with integers, so the result is the same on every processor.
    """
    # The batch axis comes before the turn of the axes: torch knows colours-last memory by its strides, and would else
    # take the colours apart.
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(batch, (height, width), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # metadata that cannot be read says nothing; the pixels are still good
        return 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format  # a transposed copy forgets it, and `_eight_bits` asks
    return turned


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, refuse modes without a range, and give CMYK the meaning that Pillow expects."""
    # Of Pillow's readers only the one of PGM gives 16-bit grey as 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DecodeError("32-bit pixels have no defined range; save the picture with 8 or 16 bits")
    # Pillow inverts every CMYK JPEG, but only those with Adobe's marker are stored inverted.
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        return ImageChops.invert(image)
    return image


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info = {}  # Pillow's writers would carry profiles and comments over
    return rgb


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
