"""Images with their labels, balanced subsets of them, and standardisation."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

Images = (
    UInt8[np.ndarray, "N height width channels"] | Float32[np.ndarray, "N height width channels"]
)


class Dataset(NamedTuple):
    """Images with their labels.

    Attributes:
      images: [N, height, width, channels].
      labels: [N], from 0 to K - 1.
      num_classes: K.
      notice: How the images deviate from the official ones, in one sentence to be recorded with
        every result, or "" where they do not.
    """

    images: Images
    labels: Int64[np.ndarray, " N"]
    num_classes: int
    notice: str


class Scaling(NamedTuple):
    """What `standardise` subtracts from each channel and then divides it by.

    Attributes:
      mean: [channels].
      deviation: [channels]; 1 for a constant channel.
    """

    mean: Float32[np.ndarray, " channels"]
    deviation: Float32[np.ndarray, " channels"]


def check_labels(labels: UInt8[np.ndarray, " N"], num_classes: int, source: str) -> None:
    """Raises ValueError, which names the `source`, unless all labels are below `num_classes`."""
    wrong = np.flatnonzero(labels >= num_classes)
    if wrong.size:
        raise ValueError(
            f"{source} is mislabelled: sample {wrong[0]} has the label {labels[wrong[0]]}, "
            f"labels are from 0 to {num_classes - 1}."
        )


def balanced_subset(dataset: Dataset, samples_per_class: int, seed: int) -> Dataset:
    """n samples of each class, class by class in the order of the labels, as in `Params.features`.

    They are drawn without replacement. With the same seed, a smaller subset is part of a larger.

    Args:
      dataset: The samples to draw from, in any order.
      samples_per_class: n.
      seed: Of NumPy's default generator.

    Returns:
      N = K n samples.

    Raises:
      ValueError: if n is not positive or a class has fewer samples.
    """
    if samples_per_class < 1:
        raise ValueError(f"the samples per class must be positive, got {samples_per_class}.")
    generator = np.random.default_rng(seed)
    chosen = []
    for label in range(dataset.num_classes):
        members = np.flatnonzero(dataset.labels == label)
        if members.size < samples_per_class:
            raise ValueError(
                f"class {label} has {members.size} samples, {samples_per_class} are asked for."
            )
        chosen.append(generator.permutation(members)[:samples_per_class])
    indices = np.concatenate(chosen)
    return dataset._replace(images=dataset.images[indices], labels=dataset.labels[indices])


def standardise(
    images: Images, scaling: Scaling | None = None
) -> tuple[Float32[np.ndarray, "N height width channels"], Scaling]:
    """Images of mean 0 and standard deviation 1 in each channel, over all pixels of all images.

    Args:
      images: [N, height, width, channels].
      scaling: That of the training set, to scale test images alike; by default, that of `images`.

    Returns:
      The scaled images and the scaling. A constant channel becomes 0.
    """
    scaled = images.astype(np.float32)
    mean = _channel_means(scaled) if scaling is None else scaling.mean
    scaled -= mean[None, None, None]
    if scaling is None:
        # After the mean is subtracted, since E x^2 - (E x)^2 cancels.
        deviation = np.sqrt(_channel_means(np.square(scaled)))
        scaling = Scaling(mean, np.where(deviation > 0, deviation, np.float32(1)))
    scaled /= scaling.deviation[None, None, None]
    return scaled, scaling


def _channel_means(images: Images) -> Float32[np.ndarray, " channels"]:
    """Summed in float64, over the images first, which is the fast way through memory."""
    return images.mean(axis=0, dtype=np.float64).mean(axis=(0, 1)).astype(np.float32)
