"""A program for the tests of launch/: joins the processes that it is told of, and says what it saw.

Takes those flags of the project's commands that a launcher sets, and writes a line to
OUT/process_I.jsonl at each start. With --wait it goes on until the file OUT/go exists; SIGTERM
makes it save a state, OUT/saved_I, and exit with status 143.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    """Joins, gathers, writes and, if asked to, waits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator_address", default="")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--first_seed", type=int)
    parser.add_argument("--num_seeds", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--text", default="")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    if args.coordinator_address == "auto":
        jax.distributed.initialize(shutdown_timeout_seconds=5)
    elif args.coordinator_address:
        jax.distributed.initialize(
            args.coordinator_address,
            args.num_processes,
            args.process_id,
            shutdown_timeout_seconds=5,
        )
    index = jax.process_index()
    saved = args.out / f"saved_{index}"

    def stop(*_: object) -> None:
        saved.touch()
        sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, stop)  # After JAX has set its own, which would swallow it.

    gathered = multihost_utils.process_allgather(np.array([index]))
    line = {
        "process": index,
        "process_count": jax.process_count(),
        "gathered": gathered.ravel().tolist(),
        "found_saved": saved.exists(),
        "arguments": sys.argv[1:],
        "local_devices": os.environ.get("JAX_LOCAL_DEVICE_IDS"),
    }
    with (args.out / f"process_{index}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    while args.wait and not (args.out / "go").exists():
        time.sleep(0.05)


if __name__ == "__main__":
    main()
