# SPDX-License-Identifier: Apache-2.0
"""What a cell of a dataset holds: a path, bytes, or both; rather an image, or rather a video."""

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa

from trl_sipo.errors import DatasetError, MediaAccessError

FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
# Pillow opens GIF and WebP too, as their first frame: a file of that suffix may be either.
ANIMATION_SUFFIXES = frozenset({".gif", ".webp"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"})

EXPECTED = {
    "image": 'an image (a PIL image, a path, the bytes of an image file, or {"bytes": ..., "path": ...})',
    "video": (
        'a video (a path, the bytes of a video file, {"bytes": ..., "path": ...}, a folder or a list of frames, or a '
        "uint8 array (frames, height, width, 3))"
    ),
}
IMAGE_INSTEAD = "where a video is expected: to train on images, leave `num_frames` at 1"
VIDEO_INSTEAD = "where an image is expected: to train on videos, set `num_frames` above 1"

_MAX_QUOTED = 80
_MAX_PATH = 300
_BLOCK = 1 << 20
_HEAD = 12  # bytes that tell the kind of a file
# What the system says when a path leads to no file. Whatever else it says is not for the row to mend.
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


def stored_value(value: Any) -> Any:
    """The bytes, or else the path, of the `{"bytes": ..., "path": ...}` that `datasets` stores; others as they are."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        return value.get("bytes") if value.get("bytes") is not None else value.get("path")
    return value


def file_states(column: pa.Array) -> Iterator[tuple[int, int] | None]:
    """Size and time of change of the files of a column of media, as `datasets` stores it; None: there is no such file.

    Media that are stored as bytes or as numbers have none.
    """
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        yield from file_states(column.flatten())
    elif pa.types.is_struct(column.type) and {"bytes", "path"} <= {field.name for field in column.type}:
        yield from file_states(column.field("path").filter(column.field("bytes").is_null()))
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        for path in column.drop_null().to_pylist():
            try:
                status = os.stat(path)
            except (OSError, ValueError):  # whoever opens it says so
                yield None
            else:
                yield status.st_size, status.st_mtime_ns


def path_name(path: str | os.PathLike[str]) -> str:
    """The last two parts of a path: the arms are often told by the folder alone, and what lies above may move."""
    return "/".join(Path(path).parts[-2:])


def checked_value(value: Any, kind: str, *, where: str) -> Any:
    """A cell as bytes that are not empty, as the path of a file or folder that is there, or as whatever else it is.

    Args:
        value: the cell.
        kind: what is expected, "image" or "video".
        where: what errors call it.

    Raises:
        DatasetError: null, empty, not there, or rather a text than a path.
    """
    value = stored_value(value)
    if value is None:
        raise DatasetError(f"{where}: the {kind} is missing (null)")
    if isinstance(value, bytes | bytearray | memoryview):
        if len(value) == 0:
            raise DatasetError(f"{where}: the {kind} is empty (0 bytes)")
        return bytes(value)
    return _existing_path(value, kind, where) if isinstance(value, str | os.PathLike) else value


def is_of_file_system(error: OSError) -> bool:
    """Whether an error is of the file system, such as no permission or no answer, and not of what a file holds."""
    return error.errno is not None and error.errno not in _NOT_THERE


def access_error(error: OSError, where: str) -> MediaAccessError:
    """Such an error, as one that names the file."""
    file = "a file" if error.filename is None else f"the file {quoted_path(os.fspath(error.filename))}"
    return MediaAccessError(f"{where}: {file} cannot be read: {error.strerror or error}")


def check_readable(file: Path, where: str) -> None:
    """Read a file to its end. Raises MediaAccessError when the file system does not let it be read."""
    try:
        with file.open("rb") as opened:
            while opened.read(_BLOCK):
                pass
    except OSError as error:
        if is_of_file_system(error):
            raise access_error(error, where) from error


def _status(path: str, where: str) -> os.stat_result | None:
    """Of a file or folder; None: it is not there."""
    try:
        return os.stat(path)
    except ValueError:  # no path at all: it holds a zero byte
        return None
    except OSError as error:
        if is_of_file_system(error):
            raise access_error(error, where) from error
        return None


def _existing_path(value: str | os.PathLike[str], kind: str, where: str) -> Path:
    text = os.fspath(value)
    if isinstance(text, str) and is_address(text):  # also where there is such a file: nobody looked where it leads
        raise DatasetError(
            f"{where}: {quoted_path(text)} is an address, and nothing is downloaded here. Fetch the {kind}s first, "
            "and give the paths of their files."
        )
    status = _status(text, where)
    if status is not None:
        if stat.S_ISREG(status.st_mode) and status.st_size == 0:
            raise DatasetError(f"{where}: the file {quoted_path(text)} is empty (0 bytes)")
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # to open a pipe is to wait for it
            raise DatasetError(f"{where}: {quoted_path(text)} is a pipe or a device, and no file")
        return Path(text)
    if isinstance(text, str) and looks_like_text(text):
        raise DatasetError(
            f"{where}: expected {EXPECTED[kind]}, found the text {quoted(text)}. Preference data of language models "
            f"cannot be used here: 'chosen' and 'rejected' must hold {kind}s."
        )
    raise DatasetError(f"{where}: there is no file {quoted_path(text)}")


def is_video(file: bytes | Path) -> bool:
    """Whether a file is a video, by its suffix or its first bytes."""
    return (isinstance(file, Path) and file.suffix.lower() in VIDEO_SUFFIXES) or _has_video_head(_head(file))


def is_webp(file: bytes | Path) -> bool:
    """Whether a file is a WebP, by its first bytes."""
    head = _head(file)
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


def is_address(value: str) -> bool:
    """Whether a string is an address on the web, or in a store of objects, rather than a path."""
    return "://" in value


def looks_like_text(value: str) -> bool:
    """Whether a string is rather a sentence than a path: it has blanks and no suffix of an image or a video."""
    suffix = Path(value[-_MAX_QUOTED:]).suffix.lower()
    if suffix in VIDEO_SUFFIXES or suffix in PIL.Image.registered_extensions():
        return False
    return len(value.split()) > 1


def quoted(text: str | bytes) -> str:
    """For an error: the text in quotation marks, its beginning when it is long."""
    return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED]) + ("..." if len(text) > _MAX_QUOTED else "")


def quoted_path(path: str | bytes) -> str:
    """For an error: a path in quotation marks, its end when it is longer than any useful one."""
    return repr(path) if len(path) <= _MAX_PATH else "..." + repr(path[-_MAX_PATH:])


def described(value: Any, kind: str) -> str:
    """For an error: a value that is no image or video ("kind")."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "role" in value[0]:
        return (
            "a conversation, as in the preference data of language models, which cannot be used here: 'chosen' and "
            f"'rejected' must hold {kind}s"
        )
    return f"{type(value).__name__} {quoted(str(value))}"


def _head(file: bytes | Path) -> bytes:
    if isinstance(file, bytes):
        return file[:_HEAD]
    try:
        with open(file, "rb") as opened:
            return opened.read(_HEAD)
    except PermissionError as error:
        raise access_error(error, "the data") from error


def _has_video_head(head: bytes) -> bool:
    is_mp4 = head[4:8] == b"ftyp" and head[8:11] not in (b"avi", b"mif", b"hei", b"msf")  # AVIF and HEIC: images
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    return is_mp4 or is_avi or head[:4] == b"\x1a\x45\xdf\xa3"  # Matroska and WebM
