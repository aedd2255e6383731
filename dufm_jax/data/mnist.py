"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28x28 (LeCun et al., 1998).

Read from the original IDX files, compressed or not. Other data come in files of the same names and
layout (Fashion-MNIST does), so the decompressed content must have the official checksum.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from dufm_jax.data import files
from dufm_jax.data.dataset import Dataset, check_labels

NUM_CLASSES = 10
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)


class File(NamedTuple):
    """An official file.

    Attributes:
      name: Without .gz.
      shape: Of the array in it.
      content: The SHA-256 of its decompressed content.
      compressed: The SHA-256 of the .gz that the mirrors have; other compressions of the same
        content are as good.
    """

    name: str
    shape: tuple[int, ...]
    content: str
    compressed: str


TRAIN = (
    File(
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    File(
        "train-labels-idx1-ubyte",
        (60_000,),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
)
TEST = (
    File(
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    File(
        "t10k-labels-idx1-ubyte",
        (10_000,),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)


def load(data_dir: str, train: bool) -> Dataset:
    """The training or test set, from a folder or, if `data_dir` is empty, downloaded.

    Raises:
      ValueError: if a file is missing or is not the official one.
    """
    (images, _), (labels, source) = (_read(data_dir, file) for file in (TRAIN if train else TEST))
    check_labels(labels, NUM_CLASSES, source)
    return Dataset(images[..., None], labels.astype(np.int64), NUM_CLASSES, notice="")


def _read(data_dir: str, file: File) -> tuple[UInt8[np.ndarray, "..."], str]:
    path = _find(data_dir, file)
    content = files.read(path)
    values = parse(content, file.shape, str(path))
    found = files.sha256(content)
    if found != file.content:
        raise ValueError(
            f"{path} has the layout of MNIST but other content: its SHA-256, decompressed, is "
            f"{found}, that of the official file is {file.content}."
        )
    return values, str(path)


def _find(data_dir: str, file: File) -> Path:
    compressed = f"{file.name}.gz"
    if not data_dir:
        urls = [mirror + compressed for mirror in MIRRORS]
        return files.download(compressed, urls, file.compressed)
    folder = files.folder(data_dir)
    for name in (file.name, compressed):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} has neither {file.name} nor {compressed}, a file of MNIST.")


def parse(content: bytes, shape: tuple[int, ...], source: str) -> UInt8[np.ndarray, "..."]:
    """The array in an IDX file of bytes.

    The file is a magic number, 0x800 + the number of dimensions, then the dimensions, all
    big-endian integers of 32 bits, then the values, of which the last dimension varies fastest.

    Args:
      content: The file.
      shape: That it must have.
      source: Its name in errors.

    Raises:
      ValueError: if the content is anything else.
    """
    size = 4 * (1 + len(shape)) + math.prod(shape)
    expected = (0x800 + len(shape), *shape)
    start = 4 * len(expected)
    if len(content) >= start:
        magic, *dimensions = struct.unpack(f">{len(expected)}I", content[:start])
        if magic != expected[0]:
            raise ValueError(
                f"{source} is no IDX file of bytes in {len(shape)} dimensions: its magic number "
                f"is {magic}, it should be {expected[0]}."
            )
        if tuple(dimensions) != shape:
            raise ValueError(f"{source} has dimensions {tuple(dimensions)}, they must be {shape}.")
    if len(content) != size:
        raise ValueError(
            f"{source} is truncated or has too much: its content is {len(content)} bytes, it "
            f"should be {size}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
