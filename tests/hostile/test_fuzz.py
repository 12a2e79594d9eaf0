# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes a medium has, reading it gives a picture or a DatasetError, soon, and in little memory."""

import subprocess
import sys
import warnings

import pytest

from tests.docs.pages import ROOT
from tests.hostile.fuzzing import faults, image_files, read_image, read_video, video_files


@pytest.mark.parametrize(
    ("files", "read", "count"), [(image_files, read_image, 1), (video_files, read_video, 20)], ids=["images", "videos"]
)
def test_broken_media_raise_dataset_errors_alone(files, read, count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what is odd in a file
        assert list(faults(files(), read, count, seed=1)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("images", 100), ("videos", 200)])
def test_many_broken_media(kind, count):
    """In a process that may take one GB more than it begins with: a fault of a decoder ends that process alone."""
    command = [sys.executable, "-m", "tests.hostile.fuzzing", kind, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
