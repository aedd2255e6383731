"""Files of data sets: found in a folder or downloaded once, read whole, errors in one sentence."""

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit


def folder(data_dir: str) -> Path:
    """The folder that `data_dir` names.

    Raises:
      ValueError: if it is none.
    """
    path = Path(data_dir)
    with contextlib.suppress(RuntimeError):  # ~ of no user is a name like others.
        path = path.expanduser()
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; --data_dir must name the one that holds the data.")
    return path


def read(path: Path) -> bytes:
    """The content of a file, decompressed if its name ends in .gz.

    Raises:
      ValueError: if it cannot be read or decompressed.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{path} is truncated or corrupted: it does not decompress.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def sha256(content: bytes) -> str:
    """The SHA-256 of the content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def download(name: str, urls: Sequence[str], checksum: str) -> Path:
    """The path of a file in the user's cache, downloaded if it is not there.

    Args:
      name: Of the file in the cache.
      urls: Its mirrors, tried in turn.
      checksum: The SHA-256 of the file. What has another one is not kept.

    Raises:
      ValueError: if no mirror gives that file, or `pooch` is not installed.
    """
    try:
        import pooch
    except ImportError:
        raise ValueError(
            f"{name} is downloaded by the package pooch, which is missing: install it, or name "
            "the folder that holds the data by --data_dir."
        ) from None
    cache = pooch.os_cache("dufm_jax")
    failures = []
    for url in urls:
        try:
            return Path(pooch.retrieve(url, f"sha256:{checksum}", fname=name, path=cache))
        except ValueError:  # pooch found another checksum.
            failure = "wrong SHA-256"
        except OSError as error:  # That of the file system, or of the network by requests.
            response = getattr(error, "response", None)
            failure = error.strerror or type(error).__name__
            if response is not None:
                failure = f"HTTP status {response.status_code}"
        failures.append(f"{urlsplit(url).netloc}: {failure}")
    raise ValueError(
        f"{name} could not be downloaded to {cache} ({', '.join(failures)}); if you have the data, "
        "name their folder by --data_dir."
    )
