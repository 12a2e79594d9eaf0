# SPDX-License-Identifier: Apache-2.0
"""Small media files with bytes exchanged or cut off, read in a process of little memory.

As a program it reads them all and ends with 1 where anything but a DatasetError comes out, or reading takes too long:
`python -m tests.hostile.fuzzing images 100`.
"""

import argparse
import io
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import av
from PIL import Image

from tests.data.clips import write_video
from tests.data.pictures import picture
from trl_sipo.data.images import _formats, image_size, open_image, verify_image
from trl_sipo.data.video import ClipSampler, open_video, read_clip
from trl_sipo.errors import DatasetError

SECONDS, MEMORY = 15, 2**30  # for three readings of one file; bytes beyond what the process has when it begins
_MODES = ("RGB", "RGBA", "L", "1", "P", "I;16", "F")
_SUFFIXES = ("mp4", "webm", "gif")
_CLIP = ClipSampler(2)


def image_files() -> dict[str, bytes]:
    """A small file of each format that Pillow both writes and reads here, by its name and mode of pixels."""
    files = {}
    for kind in _formats():
        for mode in _MODES:
            buffer = io.BytesIO()
            try:
                picture(0, 12, 9).convert(mode).save(buffer, kind)
                open_image(buffer.getvalue())
            except Exception:  # no such format of pixels, or one that is not written
                continue
            files[f"{kind} {mode}"] = buffer.getvalue()
    return files


def video_files() -> dict[str, bytes]:
    """A small file of each of some formats."""
    with tempfile.TemporaryDirectory() as folder:
        return {suffix: write_video(Path(folder, f"a.{suffix}"), 4).read_bytes() for suffix in _SUFFIXES}


def mutated(content: bytes, seed: str) -> bytes:
    """Some bytes exchanged, most often near the beginning; or the end cut off."""
    draw = random.Random(seed)
    if draw.random() < 0.2:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.choice((1, 2, 4, 16))):
        place = draw.randrange(min(len(changed), draw.choice((64, len(changed)))))
        changed[place] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
    return bytes(changed)


def read_image(content: bytes) -> None:
    """All ways to read an image."""
    for read in (open_image, verify_image, image_size):
        try:
            read(content)
        except DatasetError:
            pass


def read_video(content: bytes) -> None:
    """A clip, from the first frame and from the second, and the times of all."""
    for start in (0, 1):
        try:
            read_clip(open_video(content, where="the video"), _CLIP, start)
        except DatasetError:
            pass
    try:
        open_video(content, where="the video").timeline()
    except DatasetError:
        pass


def faults(files: dict[str, bytes], read: Callable[[bytes], None], count: int, seed: int = 0) -> Iterator[str]:
    """What reading `count` mutations of each file raises that it must not."""
    signal.signal(signal.SIGALRM, _too_long)
    for name, content in files.items():
        for number in range(count):
            signal.alarm(SECONDS)
            try:
                read(mutated(content, f"{seed} {name} {number}"))
            except BaseException as error:
                yield f"{name}, mutation {number} of seed {seed}: {type(error).__name__}: {error}"
            finally:
                signal.alarm(0)


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


class TooLong(BaseException):
    """Reading one file takes too long. No TimeoutError, which would be taken for an error of a file."""


def _too_long(*_: object) -> None:
    raise TooLong(f"no answer within {SECONDS} seconds")


def main() -> int:
    """Read mutations of all files of a kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["images", "videos"])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files, read = {"images": (image_files, read_image), "videos": (video_files, read_video)}[arguments.kind]
    av.logging.set_level(av.logging.PANIC)
    warnings.simplefilter("ignore")
    Image.init()
    found_files = files()
    _limit_memory()
    found = list(faults(found_files, read, arguments.count, arguments.seed))
    print(f"{len(found_files)} files, {arguments.count} mutations of each, {len(found)} faults", *found, sep="\n")
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main())
