"""From the bytes of a picture file to uint8 pixels on a fixed canvas.

Training, evaluation and prediction all decode here, so they see the same pixels.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError

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
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
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
        assert self.interpolation in _FILTERS, self.interpolation
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
        DecodeError: not a picture, truncated, or above Pillow's limit of pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = image.width * image.height
        if pixels > _MAX_PIXELS:
            raise DecodeError(f"{pixels} pixels are above the limit of {_MAX_PIXELS}")
        image.load()
    except UnidentifiedImageError:
        raise DecodeError("not a picture in a known format") from None
    except Image.DecompressionBombError:
        raise DecodeError(f"the pixels are above the limit of {_MAX_PIXELS}") from None
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for broken files
        raise DecodeError(_one_line(error)) from None
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as upright 8-bit RGB, composited over white, free of embedded metadata.

    Colours are taken as sRGB: embedded colour profiles are not applied.

    Raises:
        DecodeError: the mode has no defined range of values, such as 32-bit floats.
    """
    try:
        return _over_white(_eight_bits(_upright(image)))
    except DecodeError:
        raise
    except Exception as error:  # a broken palette or profile shows only here
        raise DecodeError(_one_line(error)) from None


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


def to_canvas(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Place an RGB picture on the square canvas.

    `crop` resizes the short side to the canvas and cuts out the middle, `squash` resizes both sides,
    `pad` resizes the long side and centres the picture on black.

    Returns:
        uint8 `[3, canvas, canvas]`, contiguous.
    """
    side, resample = preprocessing.canvas, _FILTERS[preprocessing.interpolation]
    width, height = image.size
    if preprocessing.fit == "squash":
        square = image.resize((side, side), resample)
    elif preprocessing.fit == "crop":
        # Only the part that is kept is resized: a panorama would else pass through a picture of any width.
        box = (*_middle(width, height, side), *_middle(height, width, side))
        square = image.resize((side, side), resample, box=(box[0], box[2], box[1], box[3]))
    else:
        fitted = image.resize(scaled_size(width, height, side / max(width, height)), resample)
        square = Image.new("RGB", (side, side))
        square.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def decode(data: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """A picture file as uint8 `[3, canvas, canvas]`; `DecodeError` if it cannot be decoded."""
    return to_canvas(open_rgb(data), preprocessing)


def scaled_size(width: int, height: int, factor: float) -> tuple[int, int]:
    """Width and height times a factor, rounded, at least one pixel each."""
    return max(1, round(width * factor)), max(1, round(height * factor))


def _middle(length: int, other: int, side: int) -> tuple[float, float]:
    """The stretch of one source axis that the centre crop keeps, on the grid of resize-then-crop."""
    resized = max(side, round(length * side / min(length, other)))
    start = (resized - side) // 2
    return start * length / resized, (start + side) * length / resized


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
