"""Sweeps of `experiments.dufm_training` as programs of their own, for what is done to programs."""

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def command(settings: Mapping[str, Any], *flags: str) -> list[str]:
    """The command line of a sweep, from values by the names of flags, and more flags."""
    named = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "experiments.dufm_training", *named, *flags]


def start(command: Sequence[str], **options: Any) -> subprocess.Popen:
    """A program whose stderr can be read."""
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options
    )


def joined(count: int) -> list[list[str]]:
    """The flags of each of so many processes that are one job on this host."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        [f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}"]
        for index in range(count)
    ]
