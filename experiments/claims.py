"""What a row of the ledger is, and what its answers have in common."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from experiments import readme, records

YES, PARTLY, NO = "reproduced", "in part", "not reproduced"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row: where it is, what the paper says, and how to answer from the records."""

    name: str
    where: str
    command: str
    records: str
    paper: str
    answer: Callable[[], tuple[str, str]]  # What we found, and the verdict.


def table(folder: str, name: str) -> list[dict[str, Any]]:
    """A table of the gallery, numbers as floats."""

    def number(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    rows = records.read_csv(readme.GALLERY / folder / name)
    return [{key: number(value) for key, value in row.items()} for row in rows]


def verdict(checks: Iterable[bool]) -> str:
    """What holds of the checks; of none, nothing."""
    results = list(checks)
    return YES if results and all(results) else PARTLY if any(results) else NO
