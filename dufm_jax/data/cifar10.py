"""CIFAR-10: 50,000 training and 10,000 test colour images of 32x32 (Krizhevsky, 2009).

Read from the official binary version, never from the pickled one. Files of the same layout with
other content, such as re-encoded images, are accepted, and the notice of the data set says so.
"""

import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from dufm_jax.data import files
from dufm_jax.data.dataset import Dataset, check_labels

NUM_CLASSES = 10
FOLDER = "cifar-10-batches-bin"
ARCHIVE = "cifar-10-binary.tar.gz"
RECORDS = 10_000  # Of an official file.
RECORD = 1 + 3 * 32 * 32  # Bytes of a record: the label, then the red, green and blue plane.
MIRRORS = (
    "https://www.cs.toronto.edu/~kriz/",
    "https://cave.cs.toronto.edu/kriz/",
    "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
)
# Of the archive, whose MD5 the official page gives as c32a1d4ab5d03f1284b67883e8d87530. Several
# independent packages pin this SHA-256 for it.
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
# Of the files in it. The official page gives none; these are the checksums by which another
# package, torchvision for Ruby, verifies what it unpacked from the archive of the SHA-256 above.
# They have not been compared with the archive here, so they decide on a notice alone, and never
# for files that come from a verified archive.
TRAIN = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
}
TEST = {"test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"}


def load(data_dir: str, train: bool) -> Dataset:
    """The training or test set, from a folder or, if `data_dir` is empty, downloaded.

    Args:
      data_dir: It holds the files, or a folder `cifar-10-batches-bin` with them.
      train: Whether the training set.

    Raises:
      ValueError: if a file is missing or is not of the binary version's layout.
    """
    checksums = TRAIN if train else TEST
    if data_dir:
        folder = _find(data_dir, tuple(checksums))
        contents = {str(folder / name): files.read(folder / name) for name in checksums}
        notice = _notice(contents, checksums)
    else:
        archive = files.download(ARCHIVE, [mirror + ARCHIVE for mirror in MIRRORS], ARCHIVE_SHA256)
        contents = unpack(archive, tuple(checksums))
        notice = ""
    images, labels = zip(
        *(parse(content, source) for source, content in contents.items()), strict=True
    )
    return Dataset(np.concatenate(images), np.concatenate(labels), NUM_CLASSES, notice)


def _find(data_dir: str, names: Sequence[str]) -> Path:
    folder = files.folder(data_dir)
    for candidate in (folder, folder / FOLDER):
        if (candidate / names[0]).exists():
            return candidate
    raise ValueError(
        f"{folder} has no {names[0]} of the binary version of CIFAR-10, nor has a {FOLDER} in it."
    )


def _notice(contents: Mapping[str, bytes], checksums: Mapping[str, str]) -> str:
    deviating = {
        name: len(content) // RECORD
        for (name, checksum), content in zip(checksums.items(), contents.values(), strict=True)
        if files.sha256(content) != checksum
    }
    if not deviating:
        return ""
    return (
        f"These {sum(deviating.values()):,} of {RECORDS * len(checksums):,} CIFAR-10 images are "
        f"not the official bytes: the SHA-256 of {', '.join(deviating)} differs."
    )


def parse(
    content: bytes, source: str
) -> tuple[UInt8[np.ndarray, "N 32 32 3"], Int64[np.ndarray, " N"]]:
    """The images and labels in a file of the binary version.

    Args:
      content: The file: records of a label and the red, green and blue plane, row by row.
      source: Its name in errors.

    Raises:
      ValueError: if it does not consist of such records, one at least.
    """
    if not content or len(content) % RECORD:
        raise ValueError(
            f"{source} is truncated or no file of CIFAR-10's binary version: its {len(content)} "
            f"bytes are no records of {RECORD}."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels = records[:, 0]
    check_labels(labels, NUM_CLASSES, source)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels.astype(np.int64)


def unpack(archive: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The named files of the official archive, read in memory: nothing is written to the disk.

    Raises:
      ValueError: if the archive cannot be read, lacks one, or has something else by its name.
    """
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                folder, _, name = member.name.partition("/")
                if folder != FOLDER or name not in names:
                    continue
                file = tar.extractfile(member) if member.isreg() else None
                if file is None or member.size != RECORDS * RECORD:
                    raise ValueError(
                        f"{archive} has in place of {member.name} something that is no file of "
                        f"{RECORDS * RECORD} bytes."
                    )
                found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        raise ValueError(f"{archive} cannot be read: it is no complete archive.") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{archive} lacks {', '.join(missing)}.")
    return {name: found[name] for name in names}
