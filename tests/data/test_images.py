# SPDX-License-Identifier: Apache-2.0
import io
import struct

import datasets
import numpy as np
import PIL.Image
import pytest
from PIL import Image

from tests.data.pictures import encoded, picture
from trl_sipo.data.images import open_image, verify_image
from trl_sipo.data.stored import looks_like_text
from trl_sipo.errors import DatasetError


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "a picture of a cat.png"  # blanks in a path do not make it a sentence
    picture(0).save(path)
    return path


@pytest.mark.parametrize(
    "store",
    [
        lambda path: Image.open(path),
        lambda path: path,
        str,
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: {"bytes": path.read_bytes(), "path": "not here.png"},
    ],
    ids=["pil", "path", "str", "bytes", "bytearray", "memoryview", "dict bytes", "dict path", "bytes win"],
)
def test_every_way_of_storing_gives_the_same_pixels(png, store):
    for opened in (open_image(store(png)), verify_image(store(png))):
        np.testing.assert_array_equal(pixels(opened), pixels(picture(0)))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("TIFF", {})])
def test_file_kinds(kind, options):
    smooth = Image.fromarray(np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8))
    assert np.abs(pixels(open_image(encoded(smooth, kind, **options))) - pixels(smooth)).max() <= 6


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("L", (4, 4), 70), (70, 70, 70)),
        (Image.new("LA", (4, 4), (70, 255)), (70, 70, 70)),
        (Image.new("RGB", (4, 4), (10, 60, 200)).convert("P", palette=Image.Palette.ADAPTIVE), (10, 60, 200)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("I;16", (4, 4), 65535), (255, 255, 255)),
        (Image.new("I;16", (4, 4), 100 * 257), (100, 100, 100)),
        (Image.new("I", (4, 4), 0), (0, 0, 0)),
        (Image.new("I", (4, 4), 200 * 257), (200, 200, 200)),
        (Image.new("RGBA", (4, 4), (10, 60, 200, 255)), (10, 60, 200)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes(image, expected):
    np.testing.assert_array_equal(pixels(open_image(image)), np.broadcast_to(expected, (4, 4, 3)))


def test_sixteen_bit_png_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    opened = pixels(open_image(encoded(Image.fromarray(ramp))))
    np.testing.assert_allclose(opened[..., 0], ramp / 257, atol=0.51)


def test_cmyk_jpeg():
    opened = pixels(open_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)))
    assert np.abs(opened - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize(("alpha", "expected"), [(0, (255, 255, 255)), (255, (200, 0, 0)), (128, (227, 127, 127))])
def test_transparent_pixels_are_laid_on_white(alpha, expected):
    opened = pixels(open_image(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, alpha)))))
    assert np.abs(opened - expected).max() <= 1


def test_transparent_colour_of_a_palette_is_laid_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    opened = pixels(open_image(encoded(image, transparency=0)))
    np.testing.assert_array_equal(opened[0, 0], (0, 0, 255))
    np.testing.assert_array_equal(opened[1:], np.full((3, 4, 3), 255))


def test_orientation_is_applied_once():
    landscape = Image.new("RGB", (32, 16), "black")
    landscape.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: the left half becomes the top half
    stored = encoded(landscape, "JPEG", quality=95, exif=exif)
    column = datasets.Dataset.from_dict({"image": [{"bytes": stored, "path": None}]})
    decoded_by_datasets = column.cast_column("image", datasets.Image())[0]["image"]
    for value in (stored, Image.open(io.BytesIO(stored)), decoded_by_datasets):
        opened = pixels(open_image(value))
        assert opened.shape == (32, 16, 3)
        assert opened[:14].min() > 240
        assert opened[18:].max() < 15


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    stored = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(open_image(stored))[0, 0], (255, 0, 0))


def test_the_value_is_left_as_it_was():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 10))
    open_image(image)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (200, 0, 0, 10))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (encoded(picture(0), "JPEG")[:-200], "does not open.*truncated"),
        (encoded(picture(0), "PNG")[:-500], "does not open"),
        (encoded(picture(0), "WEBP")[:-300], "does not open|not an image"),
        (b"not an image at all", "not an image that Pillow can read"),
        (b"", "0 bytes"),
        ({"bytes": b"", "path": None}, "0 bytes"),
        (None, "missing"),
        ({"bytes": None, "path": None}, "missing"),
        ({"pixels": [1]}, "expected an image.*dict"),
        ("nowhere/x.png", "no file 'nowhere/x.png'"),
        ("Sure! Here is a poem about cats.", "found the text 'Sure!.*must hold images"),
        ([{"role": "assistant", "content": "Sure!"}], "a conversation.*must hold images"),
        ([encoded(picture(0))], "a list of 1; give one image per cell"),
        (7, "expected an image.*found int '7'"),
        (Image.new("F", (2, 2)), "floating point"),
        (Image.new("I", (2, 2), 70_000), "32-bit image outside"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        ("tests", "is a folder"),
    ],
)
@pytest.mark.parametrize("function", [open_image, verify_image])
def test_what_is_no_image_is_named(value, message, function):
    with pytest.raises(DatasetError, match=f"(?s)^row 3, chosen: .*{message}"):
        function(value, where="row 3, chosen")


def test_too_many_pixels(monkeypatch):
    stored = encoded(picture(0, 40, 30))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40 * 30 // 2 - 1)
    with pytest.raises(DatasetError, match="row 9: the image is too large.*MAX_IMAGE_PIXELS"):
        open_image(stored, where="row 9")


def test_checksums_of_png_are_verified():
    stored = bytearray(encoded(picture(0)))
    data = stored.index(b"IDAT")
    (length,) = struct.unpack(">I", stored[data - 4 : data])
    stored[data + 4 + length] ^= 1  # the checksum of the pixels, on which no pixel depends
    np.testing.assert_array_equal(pixels(open_image(stored)), pixels(picture(0)))
    with pytest.raises(DatasetError, match="row 2: the image does not open.*checksum"):
        verify_image(stored, where="row 2")


def test_files_are_closed(png):
    image = open_image(str(png))
    png.unlink()
    assert image.getpixel((0, 0)) == picture(0).getpixel((0, 0))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a b.png", False), ("a red cat", True), ("x", False), ("/data/x", False), ("line\nline", True), ("", False)],
)
def test_looks_like_text(value, expected):
    assert looks_like_text(value) is expected
