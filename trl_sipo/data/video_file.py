# SPDX-License-Identifier: Apache-2.0
"""Video files by PyAV: when each frame is shown, and the frames from any number on, exactly."""

import functools
import io
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.Image import Transpose

from trl_sipo.data.frame_source import TimedFrame, Timeline
from trl_sipo.data.images import check_pixels, open_image
from trl_sipo.data.stored import IMAGE_INSTEAD, check_readable
from trl_sipo.errors import ConfigurationError, DatasetError

# FFmpeg's own decoders of these drop the alpha channel, which the files' metadata announces.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# All of them hold their pictures themselves: playlists (HLS, DASH, concat) would have FFmpeg open other files, or
# addresses. Of those for images, the error says what they are.
_FORMATS = (
    "mov", "matroska", "webm", "avi", "gif", "apng", "asf", "flv", "mpegts", "mpeg", "mpegvideo", "ogg", "ivf", "mxf",
    "m4v", "h264", "hevc", "obu", "dv", "nut", "yuv4mpegpipe",
    "image2", "png_pipe", "jpeg_pipe", "webp_pipe", "gif_pipe", "bmp_pipe", "tiff_pipe",
)  # fmt: skip
_OPTIONS = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "file"}

_WITHOUT_TIMES = "does not say when its frames are shown; convert it to MP4"


@dataclass(frozen=True)
class _Index:
    """What the packets of a file say of its frames.

    Args:
        times: of each frame that is shown, its presentation time in ticks, ascending.
        timeline: the same in seconds from the first frame.
        keys: in ticks, the times of the frames that decoding can begin with, ascending; cut ones too.
    """

    times: tuple[int, ...]
    timeline: Timeline
    keys: tuple[int, ...]

    def seek_point(self, time: int) -> int | None:
        """Where to seek for the frame of a time, so that no frame before it is needed; None: the beginning."""
        before = bisect_right(self.keys, time)
        return self.keys[before - 1] if before else None


class VideoFile:
    """A file that FFmpeg decodes, as a `FrameSource`. It is open only while it is read.

    Args:
        file: its path, or its bytes.
        name: what errors call it.

    Raises:
        ConfigurationError: PyAV is not installed.
        DatasetError: it is not a video, or broken; later also when a frame does not decode.
    """

    def __init__(self, file: Path | bytes, name: str) -> None:
        self.name = name
        self._file = file
        with self._opened() as (container, stream):
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise DatasetError(f"{name} is an image, {IMAGE_INSTEAD}")
            self.rate = _fraction(stream.average_rate or stream.guessed_rate)

    def timeline(self) -> Timeline:
        """From the packets alone: the file is read, but nothing decoded."""
        return self._index.timeline

    def frames(self, first: int = 0) -> Iterator[TimedFrame]:
        """Decode from the last key frame up to number `first`; where seeking misses it, from the beginning."""
        if first == 0:
            yield from self._decoded(None, None)
            return
        if first >= len(self._index.times):
            return
        time = self._index.times[first]
        for seek_point in (self._index.seek_point(time), None):
            with closing(self._decoded(seek_point, time)) as frames:
                frame = next(frames, None)
                if frame is not None and frame.start == self._index.timeline.starts[first]:
                    yield frame
                    yield from frames
                    return
        raise DatasetError(f"{self.name} is broken: its frame {first} does not decode")

    @functools.cached_property
    def _index(self) -> _Index:
        spans, keys = [], []
        with self._opened() as (container, stream):
            for packet in container.demux(stream):
                if packet.size == 0:  # the end
                    continue
                if packet.is_corrupt:
                    raise DatasetError(f"{self.name} is broken: it ends within frame {len(spans)}")
                if packet.pts is None:
                    raise DatasetError(f"{self.name} {_WITHOUT_TIMES}")
                if packet.is_keyframe:
                    keys.append(packet.pts)
                if not packet.is_discard and _is_shown(packet, stream.codec_context.name):
                    spans.append((packet.pts, packet.duration))
            tick = _fraction(stream.time_base)
        # A file that was cut out of a longer one may begin with frames that refer to what is gone: FFmpeg skips them.
        spans = sorted(span for span in spans if not keys or span[0] >= keys[0])
        if not spans:
            raise DatasetError(f"{self.name} has no frames")
        times = tuple(pts for pts, _ in spans)
        starts = tuple((pts - times[0]) * tick for pts in times)
        return _Index(times, Timeline(starts, starts[-1] + self._length(spans[-1][1], tick)), tuple(sorted(keys)))

    def _length(self, duration: int | None, tick: Fraction) -> Fraction:
        """Seconds that a frame is shown; by the rate where the file does not say."""
        return duration * tick if duration else 1 / (self.rate or Fraction(1))

    def _decoded(self, seek_point: int | None, since: int | None) -> Iterator[TimedFrame]:
        """The frames that are shown at `since` (ticks) and later, in order; None: all."""
        with self._opened() as (container, stream):
            if seek_point is not None:
                container.seek(seek_point, stream=stream)
            tick = _fraction(stream.time_base)
            origin = self._index.times[0] if since is not None else None
            durations: dict[int, int | None] = {}
            reformatter = _import_av().video.reformatter.VideoReformatter()
            for frame in _decode(container, stream, durations):
                if frame.pts is None:
                    raise DatasetError(f"{self.name} {_WITHOUT_TIMES}")
                length = self._length(durations.pop(frame.pts, None), tick)
                if seek_point is not None and frame.pts < seek_point:
                    continue  # refers to what was before the seek, and no other frame refers to it
                if frame.is_corrupt:
                    raise DatasetError(f"{self.name} is broken: the frame at {frame.time:.3f} s is damaged")
                if since is not None and frame.pts < since:
                    continue
                check_pixels(frame.width, frame.height, self.name)
                origin = frame.pts if origin is None else origin
                start = (frame.pts - origin) * tick
                yield TimedFrame(start, start + length, functools.partial(_to_image, frame, reformatter))

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream; what FFmpeg finds wrong becomes a DatasetError."""
        av = _import_av()
        try:
            # An absolute path, since "concat:..." would be an address to FFmpeg.
            file = io.BytesIO(self._file) if isinstance(self._file, bytes) else str(self._file.absolute())
            with av.open(file, options=dict(_OPTIONS), metadata_errors="replace") as container:
                stream = container.streams.best("video")
                if stream is None:
                    raise DatasetError(f"{self.name} has no video, only {[s.type for s in container.streams]}")
                if stream.codec_context is None:
                    raise DatasetError(f"{self.name} is of a codec that FFmpeg does not know; convert it to MP4")
                check_pixels(stream.width, stream.height, self.name)
                stream.codec_context.thread_count = 1  # the workers of the data loader are what runs in parallel
                yield container, stream
        except av.error.FFmpegError as error:
            if isinstance(self._file, Path):
                check_readable(self._file, self.name)  # FFmpeg says of both that there was an error of input
            raise DatasetError(f"{self.name} is broken, or no video that FFmpeg reads ({error.strerror})") from error


def _import_av() -> Any:
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        raise ConfigurationError('Video files are read by PyAV: pip install "trl-sipo[video]".') from error
    return av


def _decode(container: Any, stream: Any, durations: dict[int, int | None]) -> Iterator[Any]:
    """Frames in the order in which they are shown; notes the duration of each by its presentation time."""
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in _ALPHA_DECODERS:
        decoder = _import_av().CodecContext.create(_ALPHA_DECODERS[decoder.name], "r")
        decoder.thread_count = 1
    for packet in container.demux(stream):
        if packet.pts is not None:
            durations[packet.pts] = packet.duration
        yield from decoder.decode(packet)


def _is_shown(packet: Any, codec: str) -> bool:
    """VP8 has packets that only later frames refer to: bit 4 of the frame header (RFC 6386, section 9.1) is 0."""
    return codec != "vp8" or bool(bytes(packet)[0] & 0x10)


def _fraction(rational: Any) -> Fraction | None:
    return Fraction(int(rational.numerator), int(rational.denominator)) if rational else None


def _to_image(frame: Any, reformatter: Any) -> PIL.Image.Image:
    """RGB, upright, opaque. Where a file does not name its colour matrix, FFmpeg takes BT.601, as it does to write."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    pixels = reformatter.reformat(frame, format="rgba" if has_alpha else "rgb24").to_ndarray()
    return open_image(_upright(PIL.Image.fromarray(pixels), frame.side_data.get("DISPLAYMATRIX")))


def _upright(image: PIL.Image.Image, display_matrix: Any) -> PIL.Image.Image:
    """Apply the rotation and mirroring that cameras note beside the pixels.

    The matrix (a, b, u; c, d, v; x, y, w) sends the point (x, y) to (a x + c y, b x + d y); only its quarter turns are
    applied.
    """
    if display_matrix is None:
        return image
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(display_matrix))
    if abs(b) > abs(a):
        image = image.transpose(Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Transpose.FLIP_TOP_BOTTOM)
    return image
