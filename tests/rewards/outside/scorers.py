# SPDX-License-Identifier: Apache-2.0
"""Functions and classes that tests make scorers of. They run in other processes: some without any package."""

import os
import subprocess
import sys
import time


def size(paths, prompts):
    """Bytes of the file and letters of the prompt: needs the standard library alone."""
    return [os.path.getsize(path) + len(prompt) / 1000 for path, prompt in zip(paths, prompts, strict=True)]


def brightness(media, prompts):
    """Mean of the pixels of decoded media. Prints, as libraries do, and lets a child print and read."""
    import numpy

    print("loading a model ...")
    child = "import sys; print('a child read', repr(sys.stdin.read()))"
    subprocess.run([sys.executable, "-c", child], check=True)
    return numpy.array([numpy.asarray(medium).mean() for medium in media])


class Scaled:
    """A class with settings, that says what its scores are."""

    info = {
        "name": "scaled",
        "convention": "scale * number of words",
        "licence": "MIT",
        "higher_is_better": False,
        "media": ["image", "video"],
        "batch_size": 2,
    }

    def __init__(self, scale=1.0):
        self.scale = scale

    def identity(self):
        """What the scores are a function of."""
        return {"scale": self.scale}

    def score(self, paths, prompts):
        """The number of words."""
        return [self.scale * len(prompt.split()) for prompt in prompts]


def refuses(paths, prompts):
    """As a function that does not like its samples."""
    raise ValueError("the prompt is too long")


def breaks(paths, prompts):
    """As a function whose machine is full."""
    raise MemoryError("no memory is left")


def sleeps(paths, prompts):
    """Long enough to be killed in it; tells its number by a file beside the media's."""
    time.sleep(60)
    return [0.0] * len(paths)
