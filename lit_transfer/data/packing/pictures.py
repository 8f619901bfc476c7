"""The picture of an item as the bytes that a shard stores."""

from __future__ import annotations

import errno
import hashlib
import io
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

from lit_transfer.data.decode import FORMATS, DecodeError, is_plain, open_picture, scaled_size, to_rgb
from lit_transfer.data.packing.items import Item, Pack

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_FORMATS = {extension: name for name, extension in _EXTENSIONS.items()}
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An encoded picture: its file, the file's extension and sha256, and its sides in pixels."""

    data: bytes
    extension: str
    hash: bytes
    width: int
    height: int


def to_picture(item: Item, pack: Pack) -> Picture | str:
    """Decode, shrink and encode as the settings ask, or give the reason why the picture is rejected."""
    try:
        given = item.read()
        if isinstance(given, Image.Image):
            return _encode(to_rgb(given), pack)
        image = open_picture(given)
        extension = _EXTENSIONS.get(image.format or "", "")
        if pack.image_format in ("keep", extension) and is_plain(image, given) and not _too_large(image, pack):
            return _picture(given, extension, image)
        return _encode(to_rgb(image), pack)
    except DecodeError as error:
        return str(error)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR):
            return (error.strerror or type(error).__name__).lower()
        raise  # a failing disk or network says nothing about the picture


def ordered(work: Callable[[In], Out], inputs: Iterable[In], workers: int) -> Iterator[Out]:
    """`map` on threads, in order, with no more results in memory than a few per thread."""
    pending: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for value in inputs:
                pending.append(pool.submit(work, value))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _too_large(image: Image.Image, pack: Pack) -> bool:
    return pack.short_side is not None and min(image.size) > pack.short_side


def _encode(image: Image.Image, pack: Pack) -> Picture:
    if _too_large(image, pack):
        factor = (pack.short_side or 0) / min(image.size)
        image = image.resize(scaled_size(*image.size, factor), Image.Resampling.BICUBIC)
    extension = "png" if pack.image_format == "keep" else pack.image_format
    file = io.BytesIO()
    try:
        image.save(file, _FORMATS[extension], **({} if extension == "png" else {"quality": pack.quality}))
    except (OSError, ValueError) as error:  # such as sides above what the format can store
        raise DecodeError(f"cannot be written as {extension}: {error}") from None
    return _picture(file.getvalue(), extension, image)


def _picture(data: bytes, extension: str, image: Image.Image) -> Picture:
    return Picture(
        data=data,
        extension=extension,
        hash=hashlib.sha256(data).digest(),
        width=image.width,
        height=image.height,
    )


def header_sides(data: bytes) -> tuple[int, int] | str:
    """Width and height of a picture file when it stands upright, from its header alone, or why there are none."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            return f"{image.width * image.height} pixels are above the limit of {Image.MAX_IMAGE_PIXELS}"
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except UnidentifiedImageError:
        return "not a picture in a known format"
    except Exception as error:  # Pillow's readers raise many kinds for broken files
        return " ".join(str(error).split()) or type(error).__name__
    return (image.height, image.width) if turned else (image.width, image.height)
