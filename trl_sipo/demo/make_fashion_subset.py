# SPDX-License-Identifier: Apache-2.0
"""Choose the photographs that the demo ships: `python -m trl_sipo.demo.make_fashion_subset FOLDER`.

FOLDER holds Fashion-MNIST's four idx files, gzipped, as its authors (or Debian's `dataset-fashion-mnist`) give them.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trl_sipo.demo.fashion import ASSETS, ORIGINAL_LABELS, SPLITS, strip_path, write_strip
from trl_sipo.errors import DatasetError


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of bytes, of any number of dimensions.

    Raises:
        DatasetError: the file is missing, or is not an idx file of unsigned bytes.
    """
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; give the folder that holds Fashion-MNIST's four *-ubyte.gz files.")
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise DatasetError(f"{path} is not an idx file of unsigned bytes; download it again.")
    num_dims = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=num_dims, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def unique_indices(images: np.ndarray) -> np.ndarray:
    """Index of the first copy of each distinct image, so that no photograph can land in two splits."""
    return np.sort(np.unique(images.reshape(len(images), -1), axis=0, return_index=True)[1])


def choose(folder: Path, seed: int) -> dict[str, list[np.ndarray]]:
    """Draw the splits: name -> one uint8 array (N, 28, 28) per class."""
    rng = np.random.default_rng(seed)
    chosen: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for prefix, names in (("train", [name for name in SPLITS if name != "test"]), ("t10k", ["test"])):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        distinct = unique_indices(images)
        for label in ORIGINAL_LABELS:
            order = rng.permutation(distinct[labels[distinct] == label])
            start = 0
            for name in names:
                chosen[name].append(images[order[start : start + SPLITS[name]]])
                start += SPLITS[name]
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Write one PNG strip per split and class."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the four gzipped idx files")
    parser.add_argument("--output", type=Path, default=ASSETS / "fashion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    splits = choose(args.folder, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, parts in splits.items():
        for class_id, images in enumerate(parts):
            write_strip(images, strip_path(name, class_id, args.output))


if __name__ == "__main__":
    main()
