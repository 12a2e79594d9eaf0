# SPDX-License-Identifier: Apache-2.0
"""One way to open an image, whatever it is stored as: 8-bit RGB, upright, opaque, or an error that names the row."""

import functools
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from trl_sipo.data.stored import (
    EXPECTED,
    VIDEO_INSTEAD,
    access_error,
    checked_value,
    described,
    is_of_file_system,
    is_video,
)
from trl_sipo.errors import DatasetError


def open_image(value: Any, *, where: str = "the image") -> PIL.Image.Image:
    """Open `value` as an 8-bit RGB image, fully decoded.

    Args:
        value: a PIL image, a path (`str` or `os.PathLike`), the bytes of an image file, or the dictionary
            `{"bytes": ..., "path": ...}` that `datasets.Image(decode=False)` gives (bytes win over the path).
        where: what the error calls this image, such as `"row 3, column 'chosen'"`.

    Returns:
        A PIL image of mode `"RGB"`. The EXIF orientation is applied; transparent pixels are laid on white, as a viewer
        on a light page shows them (dropping alpha would expose whatever colour hides under it); greyscale, palette and
        CMYK are converted; 16-bit greyscale is scaled to 8 bits rather than clipped; of several frames the first.

    Raises:
        DatasetError: the value is empty, of another kind, not there, truncated, broken, too large for Pillow's limit,
            or of a pixel format without an agreed range (floating point). Truncated files are read only when the
            process has asked Pillow to fill them (`PIL.ImageFile.LOAD_TRUNCATED_IMAGES`).
        MediaAccessError: a file that is there cannot be read: no permission, or no answer of the disk.
    """
    with _named(where):
        with _opened(_source(value, where), where) as image:
            image.load()
            return _to_rgb(PIL.ImageOps.exif_transpose(image), where)


def image_size(value: Any, *, where: str = "the image") -> tuple[int, int]:
    """Height and width of what `open_image` gives, from the header of the file alone.

    Raises:
        DatasetError: as `open_image`, for what the header shows.
    """
    with _named(where):
        with _opened(_source(value, where), where) as image:
            is_turned = image.getexif().get(PIL.ExifTags.Base.Orientation) in (5, 6, 7, 8)  # others are none
            return (image.width, image.height) if is_turned else (image.height, image.width)


def verify_image(value: Any, *, where: str = "the image") -> PIL.Image.Image:
    """`open_image`, after the checks of integrity that decoding alone does not make (PNG checksums).

    Raises:
        DatasetError: as `open_image`, or the file does not pass its own checksums.
    """
    if not isinstance(value, PIL.Image.Image):
        with _named(where):
            with _opened(_source(value, where), where) as image:
                image.verify()
    return open_image(value, where=where)


def check_pixels(width: int, height: int, name: str) -> None:
    """Raise a DatasetError for the frame of a video that Pillow would take for a decompression bomb."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > 2 * limit:
        raise DatasetError(
            f"{name} is too large to be opened safely ({width} x {height} pixels). Resize it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust its source."
        )


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a DatasetError that names the image."""
    try:
        yield
    except DatasetError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise DatasetError(
            f"{where}: the image is too large to be opened safely ({error}). Resize it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust its source."
        ) from error
    except FileNotFoundError as error:
        raise DatasetError(f"{where}: there is no file {error.filename!r}") from error
    except PIL.UnidentifiedImageError as error:
        raise DatasetError(f"{where}: not an image that Pillow can read. Replace or remove this row.") from error
    except Exception as error:  # decoders of broken files raise OSError, SyntaxError, struct.error, zlib.error, ...
        if isinstance(error, OSError) and is_of_file_system(error):
            raise access_error(error, where) from error
        raise DatasetError(
            f"{where}: the image does not open ({type(error).__name__}: {error}). Replace or remove this row."
        ) from error


@contextmanager
def _opened(source: Any, where: str) -> Iterator[PIL.Image.Image]:
    if isinstance(source, PIL.Image.Image):
        yield source
    else:
        with _identified(source, where) as image:
            yield image


def _identified(source: io.BytesIO | Path, where: str) -> PIL.Image.Image:
    try:
        return PIL.Image.open(source, formats=_formats())
    except PIL.UnidentifiedImageError as error:
        if is_video(source.getvalue() if isinstance(source, io.BytesIO) else source):
            raise DatasetError(f"{where} is a video, {VIDEO_INSTEAD}") from error
        raise


@functools.cache
def _formats() -> tuple[str, ...]:
    """All that Pillow reads but EPS, which it gives to another program (Ghostscript) to run."""
    PIL.Image.init()
    return tuple(name for name in PIL.Image.ID if name != "EPS")


def _source(value: Any, where: str) -> PIL.Image.Image | io.BytesIO | Path:
    """What PIL can open, from a cell of a dataset."""
    value = checked_value(value, "image", where=where)
    if isinstance(value, PIL.Image.Image):
        return value
    if isinstance(value, Path) and value.is_dir():
        raise DatasetError(f"{where}: {str(value)!r} is a folder, {VIDEO_INSTEAD} (frames in a folder are a video)")
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, Path):
        return value
    raise DatasetError(f"{where}: expected {EXPECTED['image']}, found {_described(value)}")


def _described(value: Any) -> str:
    if isinstance(value, list) and not (value and isinstance(value[0], Mapping)):
        return f"a list of {len(value)}; give one image per cell ({VIDEO_INSTEAD})"
    return described(value, "image")


def _to_rgb(image: PIL.Image.Image, where: str) -> PIL.Image.Image:
    if image.width < 1 or image.height < 1:
        raise DatasetError(f"{where}: the image has no pixels ({image.width} x {image.height})")
    if image.mode.startswith("I"):
        image = _integers_to_8_bits(image, where)
    if image.mode == "F":
        raise DatasetError(f"{where}: a floating point image has no agreed range; store it as 8-bit RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _integers_to_8_bits(image: PIL.Image.Image, where: str) -> PIL.Image.Image:
    """Modes "I;16*" and "I" (32-bit, also used for 16-bit data): [0, 65535] to [0, 255]; Pillow itself would clip."""
    values = np.asarray(image)
    if values.dtype.itemsize == 2:  # a table needs an eighth of the memory
        return PIL.Image.fromarray(((np.arange(65536) + 128) // 257).astype(np.uint8)[values])
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DatasetError(f"{where}: a 32-bit image outside [0, 65535] has no agreed range; store it as 8-bit RGB")
    return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
