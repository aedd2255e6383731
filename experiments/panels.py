"""What several figures share: their files, and pictures of matrices."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import records


def save(figure: Figure, path: Path, dpi: int = 110) -> Path:
    """Writes a PNG, whole or not at all, closes the figure and returns the path."""
    with records.replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    plt.close(figure)
    return path


def active(means: np.ndarray) -> np.ndarray:
    """The rows (units) that are not off, in the order of the first class they are active on."""
    norms = np.linalg.norm(means, axis=1)
    if not norms.max() > 0:  # All are off, or not numbers.
        return means
    shown = means[norms > 1e-2 * norms.max()]
    return shown[np.lexsort(np.round(-shown / np.abs(shown).max(), 1).T[::-1])]


def show(axis: plt.Axes, values: np.ndarray, title: str, columns: str, rows: str) -> None:
    """A matrix with its colour bar; white is zero where entries have both signs."""
    limit = np.abs(values).max()
    signed = values.min() < -1e-2 * limit
    image = axis.imshow(
        values,
        cmap="RdBu_r" if signed else "viridis",
        vmin=-limit if signed else 0,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
    )
    axis.set(title=title, xlabel=columns, ylabel=rows)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    plt.colorbar(image, ax=axis, fraction=0.05)
