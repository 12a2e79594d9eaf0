# SPDX-License-Identifier: Apache-2.0
"""Random pairs of pictures as files, and the loop that a reader of them is compared with."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

ARMS = ("chosen", "rejected")
_ROWS_AT_A_TIME = 1000
_WORDS = ("red", "old", "small", "cat", "dog", "boat", "house", "sea", "tree", "night")


def random_jpeg(generator: np.random.Generator, side: int) -> bytes:
    """A picture that is smooth but for a little noise, so that its file is about as large as a photograph's."""
    coarse = generator.integers(0, 256, (max(side // 16, 1), max(side // 16, 1), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = generator.integers(-12, 13, smooth.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def prompt(number: int) -> str:
    """One of as many different prompts as one wants, in letters only."""
    return "a " + " ".join(_WORDS[int(digit)] for digit in str(number))


def rows(number: int, side: int, pairs_per_prompt: int = 1) -> Iterator[dict[str, str | bytes]]:
    """Pairs of JPEG files, as bytes, with their prompts."""
    generator = np.random.default_rng(0)
    for index in range(number):
        pictures = {arm: random_jpeg(generator, side) for arm in ARMS}
        yield {"prompt": prompt(index // pairs_per_prompt), **pictures}


def write_parquet(folder: Path, number: int, side: int, *, pairs_per_prompt: int = 1, files: int = 1) -> Path:
    """A folder of Parquet files with JPEG bytes, as datasets on the hub have them; returns it.

    Args:
        folder: To write to.
        number: Pairs.
        side: Of the pictures, in pixels.
        pairs_per_prompt: That follow one another.
        files: Of about equal length.
    """
    folder.mkdir(parents=True)
    schema = datasets.Features(
        {"prompt": datasets.Value("string"), **{arm: datasets.Image() for arm in ARMS}}
    ).arrow_schema
    source = rows(number, side, pairs_per_prompt)
    for file in range(files):
        length = (file + 1) * number // files - file * number // files
        path = folder / f"train-{file:05d}-of-{files:05d}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, length, _ROWS_AT_A_TIME):
                some = [next(source) for _ in range(min(_ROWS_AT_A_TIME, length - start))]
                pictures = {arm: [{"bytes": row[arm], "path": None} for row in some] for arm in ARMS}
                writer.write_table(pa.table({"prompt": [row["prompt"] for row in some], **pictures}, schema=schema))
    return folder


def write_image_folder(folder: Path, number: int, side: int) -> Path:
    """The pairs of [`write_parquet`] as single files with a table of prompts; returns the folder."""
    for arm in ARMS:
        (folder / arm).mkdir(parents=True)
    lines = ["id,prompt"]
    for index, row in enumerate(rows(number, side)):
        lines.append(f"{index},{row['prompt']}")
        for arm in ARMS:
            (folder / arm / f"{index}.jpg").write_bytes(row[arm])
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


class BarePictures(torch.utils.data.Dataset):
    """Pairs of JPEG files in memory: decoded, resized, and no more. Item: (2, 3, side, side) float32 in [-1, 1].

    Args:
        pairs: Both files of each.
        side: To resize to, in pixels.
    """

    def __init__(self, pairs: Sequence[tuple[bytes, bytes]], side: int):
        self.pairs, self.side = pairs, side

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack([self._pixels(file) for file in self.pairs[index]])

    def _pixels(self, file: bytes) -> torch.Tensor:
        picture = Image.open(io.BytesIO(file)).convert("RGB")
        if picture.size != (self.side, self.side):
            picture = picture.resize((self.side, self.side), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
