"""Real images as arrays in memory: the digits of scikit-learn, MNIST and CIFAR-10.

`load` reads them, `balanced_subset` puts them in the order of the theory's H_1, class by class with
n samples each, and `standardise` scales them. There is no augmentation: collapse is a statement
about fixed samples.
"""

from dufm_jax.data import cifar10, digits, mnist
from dufm_jax.data.dataset import Dataset, Scaling, balanced_subset, standardise

__all__ = ["NAMES", "Dataset", "Scaling", "balanced_subset", "load", "standardise"]

NAMES = ("digits", "mnist", "cifar10")


def load(name: str, data_dir: str = "", train: bool = True) -> Dataset:
    """The training or test images of a data set.

    Args:
      name: One of `NAMES`.
      data_dir: The folder that holds the files of MNIST or CIFAR-10; if empty, they are downloaded
        once into the user's cache. The digits come with scikit-learn.
      train: Whether the training set or the test set.

    Raises:
      ValueError: if the name is unknown, there is no such set, or a file is missing or not what it
        should be.
    """
    if name == "digits":
        return digits.load(train)
    if name == "mnist":
        return mnist.load(data_dir, train)
    if name == "cifar10":
        return cifar10.load(data_dir, train)
    raise ValueError(f"the data set must be one of {NAMES}, got {name!r}.")
