# SPDX-License-Identifier: Apache-2.0
"""Images and videos of whatever kind, made when they are needed."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from tests.data.clips import write_animation, write_frames, write_video
from tests.data.pictures import encoded, picture
from tests.hostile.cases import Case

SIZE = (40, 30)  # width, height
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def _plain(colour: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, SIZE, colour)


def _is(colour: tuple[int, int, int]) -> Any:
    """Whether an image is of one colour, as near as JPEG comes to it."""
    return lambda image: image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - colour).max() <= 3


def _file(content: bytes, name: str = "hostile.png") -> Any:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return name

    return write


def _animation(kind: str) -> bytes:
    options = {"save_all": True, "append_images": [_plain(GREEN)], "duration": 100}
    return encoded(_plain(RED), kind, **({**options, "lossless": True} if kind == "WEBP" else options))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb() -> bytes:
    """Some hundred bytes that say they are 65,535 x 65,535 pixels."""
    header = struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _text_bomb() -> bytes:
    """A small picture with a text of 100 MB, which compresses to 100 kB."""
    content = encoded(_plain(RED))
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b" " * 100_000_000))
    return content[:33] + text + content[33:]


def _gif_bomb() -> bytes:
    """A GIF that says it is 15,000 x 15,000 pixels."""
    content = bytearray(_animation("GIF"))
    content[6:10] = struct.pack("<HH", 15_000, 15_000)
    return bytes(content)


def _exif_rotated() -> bytes:
    """Red above green once it is upright; stored lying on its side."""
    upright = _plain(RED)
    upright.paste(GREEN, (0, SIZE[1] // 2, *SIZE))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif.tobytes(), quality=95)


def _is_upright(image: Image.Image) -> bool:
    return image.size == SIZE and image.getpixel((20, 3))[0] > 200 and image.getpixel((20, 26))[1] > 200


def _sixteen_bits() -> bytes:
    return encoded(Image.fromarray(np.full(SIZE[::-1], 32896, np.uint16)))


def _floats() -> bytes:
    return encoded(Image.fromarray(np.full(SIZE[::-1], np.nan, np.float32)), "TIFF")


def _transparent_palette() -> bytes:
    return encoded(_plain(RED).quantize(2), transparency=0)


def _pipe(folder: Path) -> str:
    os.mkfifo(folder / "hostile.png")
    return "hostile.png"


def _folder(folder: Path) -> str:
    (folder / "hostile").mkdir()
    return "hostile"


def _link(folder: Path) -> str:
    (folder.parent / "elsewhere").mkdir()
    _plain(RED).save(folder.parent / "elsewhere" / "red.png")
    (folder / "hostile.png").symlink_to(folder.parent / "elsewhere" / "red.png")
    return "hostile.png"


_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"
_ANY = picture(0, *SIZE)

IMAGES = [
    Case("a JPEG cut off in the middle", _file(encoded(_ANY, "JPEG")[:600]), "the image does not open"),
    Case("a PNG cut off in the middle", _file(encoded(_ANY)[:600]), "the image does not open"),
    Case(
        "a PNG of 200 bytes that says it is 65,535 x 65,535 pixels",
        _file(png_bomb()),
        "too large to be opened safely",
    ),
    Case(
        "a GIF of 200 bytes that says it is 15,000 x 15,000 pixels",
        _file(_gif_bomb(), "hostile.gif"),
        "too large to be opened safely",
    ),
    Case("a PNG with 100 MB of compressed text", _file(_text_bomb()), "the image does not open"),
    Case("no bytes", _file(b""), "is empty (0 bytes)"),
    Case("a text with the suffix of an image", _file(b"no image\n" * 99), "not an image that Pillow can read"),
    Case("an EPS, which Pillow would have Ghostscript run", _file(_EPS), "not an image that Pillow can read"),
    Case("floating point numbers, NaN among them", _file(_floats(), "hostile.tiff"), "has no agreed range"),
    Case("a video", lambda folder: write_video(folder / "hostile.mp4").name, "is a video, where an image is expected"),
    Case("a folder", _folder, "is a folder, where an image is expected"),
    Case("a named pipe, which would be waited for", _pipe, "is a pipe or a device, and no file"),
    Case("no file", lambda folder: "nowhere.png", "there is no file"),
    Case("a path with a zero byte", lambda folder: "hostile\0.png", "there is no file"),
    Case("a path with `~`", lambda folder: "~/hostile.png", "there is no file"),
    Case("an address", lambda folder: "http://127.0.0.1/hostile.png", "is an address, and nothing is downloaded here"),
    Case(
        "a link to a file elsewhere", _link, taken="followed, with a warning that names both folders", shows=_is(RED)
    ),
    Case("CMYK", _file(encoded(_plain((0, 255, 255, 0), "CMYK"), "JPEG", quality=95)), taken="converted to RGB"),
    Case("16 bits of grey", _file(_sixteen_bits()), taken="scaled to 8 bits, not clipped", shows=_is((128,) * 3)),
    Case("one bit", _file(encoded(_plain(1, "1"))), taken="converted to RGB", shows=_is(WHITE)),
    Case("a palette", _file(encoded(_plain(RED).quantize(2))), taken="converted to RGB", shows=_is(RED)),
    Case("a palette with a transparent colour", _file(_transparent_palette()), taken="laid on white"),
    Case("alpha", _file(encoded(_plain((255, 0, 0, 0), "RGBA"))), taken="laid on white", shows=_is(WHITE)),
    Case("an animated GIF", _file(_animation("GIF"), "hostile.gif"), taken="its first frame", shows=_is(RED)),
    Case("an animated WebP", _file(_animation("WEBP"), "hostile.webp"), taken="its first frame", shows=_is(RED)),
    Case("an animated PNG", _file(_animation("PNG")), taken="its first frame", shows=_is(RED)),
    Case("a JPEG that EXIF says to turn", _file(_exif_rotated()), taken="turned upright", shows=_is_upright),
    Case(
        "1 x 5,000 pixels",
        _file(encoded(Image.new("RGB", (1, 5000), RED))),
        taken="resized and cropped",
        shows=_is(RED),
    ),
]


def _without_frames(folder: Path) -> str:
    with av.open(str(folder / "hostile.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        output.start_encoding()
    return "hostile.mp4"


def _audio(folder: Path) -> str:
    with av.open(str(folder / "hostile.mkv"), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    return "hostile.mkv"


def _cut_video(folder: Path) -> str:
    content = write_video(folder / "hostile.mp4").read_bytes()
    (folder / "hostile.mp4").write_bytes(content[: len(content) // 2])
    return "hostile.mp4"


def _playlist(kind: str, text: str) -> Any:
    """A file that tells FFmpeg to read another one, which is there."""

    def write(folder: Path) -> str:
        write_video(folder / "secret.ts", codec=("libx264", "yuv420p", {}))
        (folder / f"hostile.{kind}").write_text(text)
        return f"hostile.{kind}"

    return write


def _turned_video(folder: Path) -> str:
    frames = [picture(number, 32, 24) for number in range(8)]
    return write_frames(folder / "hostile.mp4", frames, rotation={"degrees": 90}).name


def _changed(old: bytes, new: bytes) -> Any:
    """A video with some bytes exchanged."""

    def write(folder: Path) -> str:
        content = write_video(folder / "hostile.mp4", 8).read_bytes()
        assert old in content
        (folder / "hostile.mp4").write_bytes(content.replace(old, new))
        return "hostile.mp4"

    return write


def _frames(metadata: str = '{"fps": 24}', prefix: str = "") -> Any:
    """A folder of frames."""

    def write(folder: Path) -> str:
        (folder / "hostile").mkdir()
        for number in range(8):
            _ANY.save(folder / "hostile" / f"{prefix}{number}.png")
        (folder / "hostile" / "metadata.json").write_text(metadata)
        return "hostile"

    return write


_HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nsecret.ts\n#EXT-X-ENDLIST\n"

VIDEOS = [
    Case("an MP4 cut off in the middle", _cut_video, "is broken, or no video that FFmpeg reads"),
    Case("an MP4 without frames", _without_frames, "has no video, only"),
    Case("sound alone", _audio, "has no video, only"),
    Case("no bytes", _file(b"", "hostile.mp4"), "is empty (0 bytes)"),
    Case(
        "a text with the suffix of a video", _file(b"no video\n" * 99, "hostile.mp4"), "or no video that FFmpeg reads"
    ),
    Case(
        "a list of files for FFmpeg to read",
        _playlist("mp4", "ffconcat version 1.0\nfile secret.ts\n"),
        "or no video that FFmpeg reads",
    ),
    Case("a playlist (HLS) of other files", _playlist("m3u8", _HLS), "or no video that FFmpeg reads"),
    Case(
        "a GIF of 200 bytes that says it is 15,000 x 15,000 pixels",
        _file(_gif_bomb(), "hostile.gif"),
        "too large to be opened safely",
    ),
    Case("too few frames", lambda folder: write_video(folder / "hostile.mp4", 3).name, "is too short"),
    Case("an image", _file(encoded(_ANY)), "is an image, where a video is expected"),
    Case("a folder without frames", _folder, "is a folder without frames"),
    Case("a named pipe, which would be waited for", _pipe, "is a pipe or a device, and no file"),
    Case("a codec that nobody knows", _changed(b"avc1", b"zzzz"), "of a codec that FFmpeg does not know"),
    Case("a rate of frames of 10 million digits", _frames('{"fps": "1e9999999"}'), "'fps' of metadata.json"),
    Case("a rate of frames of 1/0", _frames('{"fps": "1/0"}'), "'fps' of metadata.json"),
    Case("a rate of frames that is 100,000 lists deep", _frames("[" * 100_000), "metadata.json"),
    Case("a title that is no UTF-8", _changed(b"Lavf", b"\xff\xfevf"), taken="its frames"),
    Case("frames with `²` in their names", _frames(prefix="²"), taken="its frames"),
    Case("a video that its metadata says to turn", _turned_video, taken="turned upright"),
    Case(
        "an animated WebP", lambda folder: write_animation(folder / "hostile.webp", [42] * 8).name, taken="its frames"
    ),
]


def good_image(folder: Path, name: str = "good.png") -> str:
    """A picture like any other."""
    picture(1, *SIZE).save(folder / name)
    return name


def good_video(folder: Path) -> str:
    """A video like any other."""
    return write_video(folder / "good.mp4", 8).name
