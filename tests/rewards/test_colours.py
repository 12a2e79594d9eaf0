# SPDX-License-Identifier: Apache-2.0
"""Names of colours: by fixed limits on colours that have a name, and by CLIP as computed one text at a time."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tests.rewards.tiny import clip, pictures
from trl_sipo.demo.fashion import COLOUR_RGB
from trl_sipo.demo.fashion import COLOURS as FASHION_COLOURS
from trl_sipo.rewards.colours import GREY, ClipColours, HsvColours, pixel_colours
from trl_sipo.rewards.pixels import cropped_pixels
from trl_sipo.rewards.requirements import COLOURS

# Colours of the web that people would call so.
SHADES = {
    "red": ["red", "crimson", "firebrick", "#c00000"],
    "orange": ["orange", "darkorange"],
    "yellow": ["yellow", "gold"],
    "green": ["green", "lime", "forestgreen", "seagreen"],
    "blue": ["blue", "navy", "royalblue", "deepskyblue"],
    "purple": ["purple", "indigo", "darkviolet"],
    "pink": ["pink", "hotpink", "deeppink", "lightpink"],
    "brown": ["brown", "saddlebrown", "sienna"],
    "black": ["black", "#202020"],
    "white": ["white", "snow", "whitesmoke"],
    None: ["gray", "darkgray", "dimgray"],
}


@pytest.mark.parametrize(("name", "shade"), [(name, shade) for name, shades in SHADES.items() for shade in shades])
def test_shades_have_the_name_that_people_give_them(name, shade):
    picture = Image.new("RGB", (8, 8), shade)
    assert HsvColours().classify([picture], "anything") == [name]


@pytest.mark.parametrize(("name", "rgb"), list(zip(FASHION_COLOURS, COLOUR_RGB, strict=True)))
def test_the_colours_of_the_demo_have_their_names(name, rgb):
    assert HsvColours().classify([Image.new("RGB", (8, 8), rgb)], "sneaker") == [name]


def test_the_middle_of_a_picture_decides():
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("red", (11, 6, 30, 15))  # the middle half is 10..30 by 5..15
    assert HsvColours().classify([picture, Image.new("RGB", (1, 1), "green")], "cup") == ["red", "green"]
    assert np.bincount(pixel_colours(picture).ravel()).tolist() == [19 * 9, 0, 0, 0, 40 * 20 - 19 * 9]


def test_every_pixel_gets_one_of_the_names():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert set(np.unique(pixel_colours(noise))) == {GREY, *range(10)}
    assert (
        ImageColor.getrgb("red") == (255, 0, 0)
        and COLOURS[pixel_colours(Image.new("RGB", (1, 1), "red"))[0, 0]] == "red"
    )


def test_clip_takes_the_colour_whose_mean_text_is_nearest():
    model, tokenizer = clip(seed=8, max_length=32)
    images = [*pictures(2), *(Image.new("RGB", (20, 24), colour) for colour in COLOURS)]
    classifier = ClipColours(model, tokenizer, batch_size=4)

    def direction(features):
        return features.pooler_output[0] / features.pooler_output[0].norm()

    expected = []
    with torch.no_grad():
        texts = []
        for colour in COLOURS:
            written = [
                f"a photo of a {colour} tv",
                f"a photo of a {colour}-colored tv",
                f"a photo of a {colour} object",
            ]
            directions = [
                direction(model.get_text_features(**tokenizer([text], return_tensors="pt"))) for text in written
            ]
            texts.append(torch.stack(directions).mean(0) / torch.stack(directions).mean(0).norm())
        for image in images:
            seen = direction(model.get_image_features(cropped_pixels([image], 16)))
            expected.append(COLOURS[int(torch.stack([seen @ text for text in texts]).argmax())])
    torch.testing.assert_close(classifier.colour_embeddings("tv"), torch.stack(texts), rtol=0, atol=1e-6)
    assert classifier.classify(images, "tv") == expected
    assert len(set(expected)) > 1  # or any one colour would do
    assert classifier.classify([], "tv") == []
