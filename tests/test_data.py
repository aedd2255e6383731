"""Data sets: official files read right, anything else refused or noticed, and their subsets."""

import contextlib
import gc
import gzip
import hashlib
import http.server
import io
import pathlib
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading

import numpy as np
import pooch
import pytest
from cases import SINGLE, assert_one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dufm_jax import data
from dufm_jax.data import cifar10, mnist

SHARED = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
MNIST = SHARED / "mnist"
CIFAR10 = SHARED / "cifar10"
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason=f"{MNIST} has no original MNIST")
needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"{CIFAR10} has no CIFAR-10")


@contextlib.contextmanager
def refused(*parts):
    """The block must raise a ValueError of one sentence that contains these parts."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011, the parts are checked below.
        yield
    message = str(raised.value)
    assert_one_sentence(message)
    assert [part for part in parts if part not in message] == []


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# A data set of MNIST's layout: five images of 3x2.
PIXELS = np.random.default_rng(0).integers(256, size=(5, 3, 2), dtype=np.uint8)
DIGITS = np.array([3, 0, 9, 1, 3], np.uint8)


def idx(values):
    dimensions = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, 8, values.ndim]) + dimensions + values.tobytes()


IMAGES_NAME, LABELS_NAME = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
IDX = {IMAGES_NAME: idx(PIXELS), LABELS_NAME: idx(DIGITS)}
GZ = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in IDX.items()}


def official_mnist(patch, contents=IDX):
    """Makes these small files the official training set."""
    patch.setattr(
        mnist,
        "TRAIN",
        tuple(
            mnist.File(name, values.shape, sha256(contents[name]), sha256(GZ[f"{name}.gz"]))
            for name, values in ((IMAGES_NAME, PIXELS), (LABELS_NAME, DIGITS))
        ),
    )


# Data of CIFAR-10's layout: five files of two images.
RECORDS = np.random.default_rng(1).integers(256, size=(5, 2, 3073), dtype=np.uint8)
RECORDS[..., 0] %= 10
BATCHES = {f"data_batch_{i + 1}.bin": RECORDS[i].tobytes() for i in range(5)}
BATCH = "data_batch_3.bin"


def official_cifar10(patch):
    """Makes these small files the official training set."""
    patch.setattr(cifar10, "RECORDS", 2)
    patch.setattr(cifar10, "TRAIN", {name: sha256(content) for name, content in BATCHES.items()})


def decoded(contents):
    """Images and labels by the description of the layout, byte by byte."""
    images, labels = [], []
    for content in contents:
        for start in range(0, len(content), 3073):
            labels.append(content[start])
            image = np.empty((32, 32, 3), np.uint8)
            for channel in range(3):
                for row in range(32):
                    first = start + 1 + 1024 * channel + 32 * row
                    image[row, :, channel] = list(content[first : first + 32])
            images.append(image)
    return np.array(images), np.array(labels)


def archive(contents, folder="cifar-10-batches-bin", link=None):
    """A tar.gz of these files in that folder; `link` names one that becomes a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {"readme.html": b"hello", **contents}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            if name == link:
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/hostname", 0
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write(folder, contents):
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.fixture
def small_mnist(monkeypatch):
    official_mnist(monkeypatch)


@pytest.fixture
def small_cifar10(monkeypatch):
    official_cifar10(monkeypatch)


# Official data, against numbers from the literature.


def test_digits_are_those_of_the_literature():
    digits = data.load("digits")
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images.dtype == np.uint8
    assert (digits.images.min(), digits.images.max()) == (0, 16)
    assert (digits.labels.dtype, digits.num_classes, digits.notice) == (np.int64, 10, "")
    # Of optdigits.names, in the UCI repository.
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(digits.labels).tolist() == counts


def test_digits_have_no_test_set():
    with refused("no test set"):
        data.load("digits", train=False)


@needs_mnist
@pytest.mark.parametrize(
    ("train", "counts", "first"),
    [
        (
            True,
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
        ),
        (
            False,
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
            [7, 2, 1, 0, 4, 1, 4, 9, 5, 9],
        ),
    ],
)
def test_mnist_is_that_of_the_literature(train, counts, first):
    found = data.load("mnist", str(MNIST), train)
    assert found.images.shape == (sum(counts), 28, 28, 1)
    assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int64)
    assert (found.num_classes, found.notice) == (10, "")
    assert np.bincount(found.labels).tolist() == counts
    assert found.labels[:10].tolist() == first
    # The mean and deviation of the training set that everyone scales by.
    if train:
        assert found.images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
        assert found.images.std() / 255 == pytest.approx(0.3081, abs=5e-5)


@needs_mnist
def test_mnist_of_another_content_is_refused(tmp_path):
    for path in MNIST.iterdir():
        (tmp_path / path.name).symlink_to(path)
    content = bytearray(gzip.decompress((MNIST / f"{IMAGES_NAME}.gz").read_bytes()))
    content[-1] ^= 1
    path = tmp_path / IMAGES_NAME
    path.write_bytes(content)
    with refused(str(path), "SHA-256", "official"):
        data.load("mnist", str(tmp_path))


@needs_cifar10
def test_re_encoded_cifar10_is_accepted_with_a_notice(tmp_path):
    command = [sys.executable, str(CIFAR10 / "unpack.py"), str(tmp_path)]
    subprocess.run([*command, "--train=500", "--test=50"], check=True, capture_output=True)
    for train, count in ((True, 500), (False, 50)):
        found = data.load("cifar10", str(tmp_path), train)
        assert found.images.shape == (count, 32, 32, 3)
        assert_one_sentence(found.notice)
        assert f"{count} of {50_000 if train else 10_000:,}" in found.notice
        with np.load(CIFAR10 / f"{'train' if train else 'test'}_jpeg.npz") as stored:
            jpeg, offsets, labels = (stored[name] for name in ("data", "offsets", "labels"))
        np.testing.assert_array_equal(found.labels, labels[:count])
        for i in (0, count - 1):
            image = Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()))
            np.testing.assert_array_equal(found.images[i], np.asarray(image.convert("RGB")))


# Files of the same layout, in a folder.


@pytest.mark.parametrize("contents", [IDX, GZ], ids=["plain", "gz"])
def test_mnist_files(tmp_path, small_mnist, contents):
    found = data.load("mnist", write(tmp_path, contents))
    np.testing.assert_array_equal(found.images, PIXELS[..., None])
    np.testing.assert_array_equal(found.labels, DIGITS)


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_cifar10_files(tmp_path, small_cifar10, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    write(tmp_path / folder, BATCHES)
    found = data.load("cifar10", str(tmp_path))
    images, labels = decoded(BATCHES.values())
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.notice == ""


def test_cifar10_of_another_content_is_noticed(tmp_path, small_cifar10):
    other = bytearray(BATCHES[BATCH])
    other[-1] ^= 1
    notice = data.load("cifar10", write(tmp_path, {**BATCHES, BATCH: bytes(other)})).notice
    assert_one_sentence(notice)
    assert [name for name in BATCHES if name in notice] == [BATCH]


def test_unknown_name():
    with refused("imagenet", *data.NAMES):
        data.load("imagenet")


BAD_MNIST = {
    "truncated": (IMAGES_NAME, IDX[IMAGES_NAME][:-1], "truncated"),
    "cut in the header": (IMAGES_NAME, IDX[IMAGES_NAME][:9], "truncated"),
    "empty": (IMAGES_NAME, b"", "truncated"),
    "with more behind": (IMAGES_NAME, IDX[IMAGES_NAME] + b"0", "too much"),
    "labels in place of images": (IMAGES_NAME, IDX[LABELS_NAME].ljust(99), "2049"),
    "other dimensions": (IMAGES_NAME, idx(PIXELS.transpose(0, 2, 1)), "(5, 2, 3)"),
    "fewer labels than images": (LABELS_NAME, idx(DIGITS[:4]), "(4,)"),
    "other content": (LABELS_NAME, idx(DIGITS[::-1]), "SHA-256"),
    "mislabelled": (LABELS_NAME, idx(DIGITS + 8), "label"),
}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    BAD_MNIST.values(),
    ids=[name.replace(" ", "-") for name in BAD_MNIST],
)
def test_bad_mnist_file(tmp_path, monkeypatch, name, content, part):
    # The mislabelled file would be stopped by its checksum too: make it official.
    official_mnist(monkeypatch, {**IDX, name: content} if part == "label" else IDX)
    with refused(str(tmp_path / name), part):
        data.load("mnist", write(tmp_path, {**IDX, name: content}))


def test_bad_gz_file(tmp_path, small_mnist):
    name = f"{LABELS_NAME}.gz"
    content = GZ[name]
    damaged = bytearray(content)
    damaged[-6] ^= 1  # In the check sum.
    for bad in (content[:-9], bytes(damaged), b"", IDX[LABELS_NAME], content + b"more"):
        with refused(str(tmp_path / name)):
            data.load("mnist", write(tmp_path, {**GZ, name: bad}))


BAD_CIFAR10 = {
    "truncated": BATCHES[BATCH][:-1],
    "empty": b"",
    "longer": BATCHES[BATCH] + b"0",
    "mislabelled": b"\x0a" + BATCHES[BATCH][1:],
}


@pytest.mark.parametrize("case", BAD_CIFAR10)
def test_bad_cifar10_file(tmp_path, small_cifar10, case):
    with refused(str(tmp_path / BATCH), "labels" if case == "mislabelled" else "truncated"):
        data.load("cifar10", write(tmp_path, {**BATCHES, BATCH: BAD_CIFAR10[case]}))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing(tmp_path, small_mnist, small_cifar10, name):
    contents, last = (IDX, LABELS_NAME) if name == "mnist" else (BATCHES, "data_batch_5.bin")
    for nowhere in (str(tmp_path / "nowhere"), "~no-such-user/data"):
        with refused(nowhere, "--data_dir"):
            data.load(name, nowhere)
    (tmp_path / "file").touch()
    with refused(str(tmp_path / "file"), "--data_dir"):
        data.load(name, str(tmp_path / "file"))
    with refused(str(tmp_path), next(iter(contents))):
        data.load(name, str(tmp_path))
    write(tmp_path, contents)
    (tmp_path / last).unlink()
    with refused(str(tmp_path), last):
        data.load(name, str(tmp_path))
    (tmp_path / last).mkdir()
    with refused(str(tmp_path / last), "directory"):
        data.load(name, str(tmp_path))


def mutations(content):
    """Some of: a cut at either end, one byte changed, one removed, one put in."""
    place = st.integers(0, len(content) - 1)
    byte = st.binary(min_size=1, max_size=1)
    return st.one_of(
        place.map(lambda at: content[:at]),
        place.map(lambda at: content[at:]),
        place.map(lambda at: content[:at] + content[at + 1 :]),
        st.builds(lambda at, new: content[:at] + new + content[at:], place, byte),
        st.builds(lambda at, new: content[:at] + new + content[at + 1 :], place, byte),
    )


def loaded(name, folder):
    """The data set and "", or None and the error."""
    try:
        return data.load(name, folder), ""
    except ValueError as error:
        return None, str(error)


@settings(max_examples=200, deadline=None)
@given(
    mutated=st.one_of(
        *(st.tuples(st.just(name), mutations(content)) for name, content in (IDX | GZ).items())
    )
)
def test_mutated_mnist_is_refused_or_right(mutated):
    name, content = mutated
    others = GZ if name.endswith(".gz") else IDX
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        official_mnist(patch)
        write(pathlib.Path(folder), {**others, name: content})
        found, message = loaded("mnist", folder)
        if found is None:
            assert_one_sentence(message)
            assert name in message
        else:
            # A change of a time or name in the header of a .gz is none of the content.
            np.testing.assert_array_equal(found.images, PIXELS[..., None])
            np.testing.assert_array_equal(found.labels, DIGITS)


@settings(max_examples=100, deadline=None)
@given(mutated=st.one_of(mutations(BATCHES[BATCH]), st.just(BATCHES[BATCH][:3073])))
def test_mutated_cifar10_is_refused_or_noticed(mutated):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        official_cifar10(patch)
        contents = {**BATCHES, BATCH: mutated}
        write(pathlib.Path(folder), contents)
        found, message = loaded("cifar10", folder)
        if found is None:
            assert_one_sentence(message)
            assert BATCH in message
        else:
            images, labels = decoded(contents.values())
            np.testing.assert_array_equal(found.images, images)
            np.testing.assert_array_equal(found.labels, labels)
            assert (BATCH in found.notice) == (mutated != BATCHES[BATCH])


# Downloads, from a server on this machine.

# pooch leaves failed connections to the garbage collector.
downloads = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder and its URL; what is put there can be downloaded, into the empty folder "cache"."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()
    gc.collect()


DEAD = "http://127.0.0.1:9/"  # The discard port, where nothing listens.


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


@downloads
def test_mnist_is_downloaded_once_from_the_first_mirror_alive(
    tmp_path, small_mnist, server, monkeypatch
):
    folder, url = server
    write(folder, GZ)
    monkeypatch.setattr(mnist, "MIRRORS", (DEAD, f"{url}nothing-here/", url))
    found = data.load("mnist")
    np.testing.assert_array_equal(found.images, PIXELS[..., None])
    np.testing.assert_array_equal(found.labels, DIGITS)
    assert cached(tmp_path) == sorted(GZ)
    monkeypatch.setattr(mnist, "MIRRORS", (DEAD,))
    np.testing.assert_array_equal(data.load("mnist").labels, DIGITS)


@downloads
def test_download_of_another_checksum_is_not_kept(tmp_path, small_mnist, server, monkeypatch):
    folder, url = server
    other = gzip.compress(IDX[IMAGES_NAME], compresslevel=0, mtime=1)
    write(folder, {**GZ, f"{IMAGES_NAME}.gz": other})
    monkeypatch.setattr(mnist, "MIRRORS", (url,))
    with refused(f"{IMAGES_NAME}.gz", "wrong SHA-256", "--data_dir"):
        data.load("mnist")
    assert cached(tmp_path) == []


@downloads
def test_corrupted_download_in_the_cache_is_replaced(tmp_path, small_mnist, server, monkeypatch):
    folder, url = server
    write(folder, GZ)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{IMAGES_NAME}.gz").write_bytes(GZ[f"{IMAGES_NAME}.gz"][:-1])
    monkeypatch.setattr(mnist, "MIRRORS", (url,))
    np.testing.assert_array_equal(data.load("mnist").images, PIXELS[..., None])


@downloads
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_network_out_of_reach(tmp_path, server, monkeypatch, name):
    _, url = server
    for module in (mnist, cifar10):
        monkeypatch.setattr(module, "MIRRORS", (DEAD, url))
    with refused("127.0.0.1:9: ConnectionError", "HTTP status 404", "--data_dir"):
        data.load(name)
    assert cached(tmp_path) == []


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_download_without_pooch(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with refused("pooch", "--data_dir"):
        data.load(name)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with refused("scikit-learn"):
        data.load("digits")


def downloaded_cifar10(monkeypatch, server, content):
    folder, url = server
    write(folder, {"cifar-10-binary.tar.gz": content})
    monkeypatch.setattr(cifar10, "MIRRORS", (DEAD, url))
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", sha256(content))
    return data.load("cifar10")


@downloads
def test_cifar10_is_read_from_the_archive(tmp_path, small_cifar10, server, monkeypatch):
    content = archive(dict(reversed(BATCHES.items())))  # In the archive, they are in any order.
    monkeypatch.setattr(cifar10, "TRAIN", dict.fromkeys(BATCHES, "the archive's decides"))
    found = downloaded_cifar10(monkeypatch, server, content)
    images, labels = decoded(BATCHES.values())
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.notice == ""
    assert cached(tmp_path) == ["cifar-10-binary.tar.gz"]


BAD_ARCHIVES = {
    "a-file-missing": (archive({n: c for n, c in BATCHES.items() if n != BATCH}), BATCH),
    "another-folder": (archive(BATCHES, folder="other"), BATCH),
    "a-folder-outside": (archive(BATCHES, folder="../cifar-10-batches-bin"), BATCH),
    "a-link": (archive(BATCHES, link=BATCH), BATCH),
    "too-large": (archive({**BATCHES, BATCH: 2 * BATCHES[BATCH]}), BATCH),
    "cut": (archive(BATCHES)[:-300], "archive"),
    "no-archive": (b"<html>", "archive"),
}


@downloads
@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_bad_archive(tmp_path, small_cifar10, server, monkeypatch, case):
    content, part = BAD_ARCHIVES[case]
    with refused("cifar-10-binary.tar.gz", part):
        downloaded_cifar10(monkeypatch, server, content)
    assert cached(tmp_path) == ["cifar-10-binary.tar.gz"]


# Subsets and standardisation.

SCATTERED = data.Dataset(
    images=np.arange(300, dtype=np.float32).reshape(300, 1, 1, 1),
    labels=np.random.default_rng(2).permutation(np.repeat([0, 1, 2], [50, 100, 150])),
    num_classes=3,
    notice="Not official.",
)


def test_balanced_subset_is_class_by_class_without_repetition():
    subset = data.balanced_subset(SCATTERED, 20, seed=0)
    np.testing.assert_array_equal(subset.labels, np.repeat([0, 1, 2], 20))
    chosen = subset.images.ravel().astype(int)  # Each image is its own index.
    assert len(set(chosen)) == 60
    np.testing.assert_array_equal(SCATTERED.labels[chosen], subset.labels)
    assert (subset.num_classes, subset.notice) == (3, "Not official.")


def test_balanced_subset_depends_on_its_seed_alone():
    first, again, other = (data.balanced_subset(SCATTERED, 20, seed).images for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    larger = data.balanced_subset(SCATTERED, 50, seed=1).images.reshape(3, 50)
    np.testing.assert_array_equal(larger[:, :20], first.reshape(3, 20))


def test_balanced_subset_draws_every_sample_alike():
    # Class 2 has 150 samples, of which 50 are drawn in each of 300 trials: every sample is in 100
    # of them on average, with a standard deviation of sqrt(300 / 3 * 2 / 3) = 8.2.
    drawn = [data.balanced_subset(SCATTERED, 50, seed).images[100:] for seed in range(300)]
    counts = np.bincount(np.concatenate(drawn).ravel().astype(int), minlength=300)
    counts = counts[SCATTERED.labels == 2]
    assert counts.sum() == 300 * 50
    assert np.abs(counts - 100).max() < 5 * 8.2


def test_balanced_subset_of_too_many():
    with refused("class 0", "50", "51"):
        data.balanced_subset(SCATTERED, 51, seed=0)
    with refused("positive", "0"):
        data.balanced_subset(SCATTERED, 0, seed=0)


def coloured(dtype):
    generator = np.random.default_rng(3)
    images = generator.normal([40, 120, 200], [5, 20, 1], size=(30, 6, 5, 3))
    return images.round().astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_standardise(dtype):
    images = coloured(dtype)
    before = images.copy()
    scaled, scaling = data.standardise(images)
    np.testing.assert_array_equal(images, before)
    assert scaled.dtype == np.float32
    for channel in range(3):
        values = images[..., channel].astype(np.float64)
        np.testing.assert_allclose(scaling.mean[channel], values.mean(), **SINGLE)
        np.testing.assert_allclose(scaling.deviation[channel], values.std(), **SINGLE)
        expected = (values - values.mean()) / values.std()
        np.testing.assert_allclose(scaled[..., channel], expected, rtol=1e-5, atol=1e-5)


def test_standardise_by_the_scaling_of_others():
    images = coloured(np.uint8)
    scaled, scaling = data.standardise(images)
    part, same = data.standardise(images[:7], scaling)
    np.testing.assert_array_equal(part, scaled[:7])
    assert same is scaling


@pytest.mark.parametrize("value", [0, 0.1, 255])
def test_standardise_a_constant_channel(value):
    images = coloured(np.float32)
    images[..., 1] = value
    scaled, scaling = data.standardise(images)
    np.testing.assert_array_equal(scaled[..., 1], 0)
    assert scaling.deviation[1] == 1
    np.testing.assert_allclose(scaled[..., [0, 2]].std((0, 1, 2)), 1, rtol=1e-5)
