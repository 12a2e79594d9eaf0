# SPDX-License-Identifier: Apache-2.0
"""One way to open an image, whatever it is stored as: 8-bit RGB, upright, opaque, or an error that names the row."""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from trl_sipo.errors import DatasetError

_WHAT_IS_READ = 'a PIL image, a path, the bytes of an image file, or {"bytes": ..., "path": ...}'
_MAX_QUOTED = 80


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
    """
    with _named(where):
        with _opened(_source(value, where)) as image:
            image.load()
            return _to_rgb(PIL.ImageOps.exif_transpose(image), where)


def verify_image(value: Any, *, where: str = "the image") -> PIL.Image.Image:
    """`open_image`, after the checks of integrity that decoding alone does not make (PNG checksums).

    Raises:
        DatasetError: as `open_image`, or the file does not pass its own checksums.
    """
    if not isinstance(value, PIL.Image.Image):
        with _named(where):
            with _opened(_source(value, where)) as image:
                image.verify()
    return open_image(value, where=where)


def looks_like_text(value: str) -> bool:
    """Whether a string is rather a sentence than the path of an image: it has blanks and no suffix of an image."""
    if Path(value[-_MAX_QUOTED:]).suffix.lower() in PIL.Image.registered_extensions():
        return False
    return len(value.split()) > 1


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
        raise DatasetError(
            f"{where}: the image does not open ({type(error).__name__}: {error}). Replace or remove this row."
        ) from error


@contextmanager
def _opened(source: Any) -> Iterator[PIL.Image.Image]:
    if isinstance(source, PIL.Image.Image):
        yield source
    else:
        with PIL.Image.open(source) as image:
            yield image


def _source(value: Any, where: str) -> PIL.Image.Image | io.BytesIO | Path:
    """What PIL can open, from a cell of a dataset."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, PIL.Image.Image):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        if len(value) == 0:
            raise DatasetError(f"{where}: the image is empty (0 bytes)")
        return io.BytesIO(value)
    if isinstance(value, str | os.PathLike):
        return _existing_path(value, where)
    if value is None:
        raise DatasetError(f"{where}: the image is missing (null)")
    raise DatasetError(f"{where}: expected an image ({_WHAT_IS_READ}), found {_describe(value)}")


def _existing_path(value: str | os.PathLike[str], where: str) -> Path:
    text = os.fspath(value)
    if isinstance(text, str) and looks_like_text(text) and not os.path.isfile(text):
        raise DatasetError(
            f"{where}: expected an image ({_WHAT_IS_READ}), found the text {_quote(text)}. Preference data of "
            "language models cannot be used here: 'chosen' and 'rejected' must hold images."
        )
    if not os.path.exists(text):
        raise DatasetError(f"{where}: there is no file {_quote(text)}")
    if os.path.isdir(text):
        raise DatasetError(f"{where}: {_quote(text)} is a folder, not an image")
    return Path(text)


def _describe(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "role" in value[0]:
        return (
            "a conversation, as in the preference data of language models, which cannot be used here: 'chosen' and "
            "'rejected' must hold images"
        )
    if isinstance(value, list):
        return f"a list of {len(value)}; give one image per cell"
    return f"{type(value).__name__} {_quote(str(value))}"


def _quote(text: str | bytes) -> str:
    return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED]) + ("..." if len(text) > _MAX_QUOTED else "")


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
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DatasetError(f"{where}: a 32-bit image outside [0, 65535] has no agreed range; store it as 8-bit RGB")
    return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
