"""The 1,797 handwritten digits of 8x8 pixels, of values 0 to 16, that come with scikit-learn.

They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).
"""

import numpy as np

from dufm_jax.data.dataset import Dataset


def load(train: bool) -> Dataset:
    """All digits, as the training set.

    Raises:
      ValueError: if the test set is asked for, which does not exist, or scikit-learn is missing.
    """
    if not train:
        raise ValueError("digits has no test set; all its 1,797 images are the training set.")
    try:
        import sklearn.datasets
    except ImportError:
        raise ValueError(
            "digits comes with the package scikit-learn, which is missing: install it."
        ) from None
    values, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = values.astype(np.uint8).reshape(-1, 8, 8, 1)
    return Dataset(images, labels.astype(np.int64), num_classes=10, notice="")
