"""JPEG by libjpeg-turbo itself: Pillow's pixels to the bit, and with nothing passed over.

Pillow gives what it can of a damaged file and says nothing unless lines of it are missing; here all that libjpeg warns
of is an error.
"""

from __future__ import annotations

import math

import numpy as np
import simplejpeg
from numpy.typing import NDArray

MARGIN = 2
"""Least size, in canvases, of a picture that is decoded at a part of its size; a test says what that changes."""


def is_readable(data: bytes, size: tuple[int, int]) -> bool:
    """Whether a file of this width and height is read here: 8-bit grey or colour, in one of the usual samplings.

    CMYK, and samplings such as 3x1, are left to Pillow.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: it has no name for 4:4:1
        return False
    return (width, height) == size and colours in ("Gray", "RGB", "YCbCr")


def divisor(length: int, canvas: int) -> int:
    """By what a picture's sides may be divided (1, 2, 4 or 8) where `length` of its pixels fill `canvas` ones."""
    return next((number for number in (8, 4, 2) if length >= number * MARGIN * canvas), 1)


def read(data: bytes, size: tuple[int, int], *, grey: bool = False, divisor: int = 1) -> NDArray[np.uint8]:
    """The pixels of a readable file, as they lie in it: uint8 `[H, W, 3]`, or `[H, W]` where grey is asked for.

    Args:
        data: the file.
        size: its width and height.
        grey: the brightness alone.
        divisor: of both sides. libjpeg then computes the mean of so many pixels each way from the frequencies, without
            the pixels themselves; a rest at the right and the bottom, of less than a whole one, is left out.

    Raises:
        ValueError: the file is damaged.
    """
    width, height = (math.ceil(length / divisor) for length in size)
    colours = "GRAY" if grey else "RGB"
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colours, min_width=width, min_height=height)
    assert pixels.shape[:2] == (height, width), (pixels.shape, size, divisor)
    whole_width, whole_height = (max(1, length // divisor) for length in size)
    return pixels[:whole_height, :whole_width, 0] if grey else pixels[:whole_height, :whole_width]
