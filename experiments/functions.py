"""Losses and nonlinearities by the names that flags give them."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from dufm_jax import losses, nonlinearities

# A name without a parameter stands for the function itself, one with a parameter for its maker.
_PLAIN_LOSSES: Mapping[str, Any] = {
    "squared_error": losses.squared_error,
    "cross_entropy": losses.cross_entropy,
}
_LOSSES_OF: Mapping[str, Callable] = {
    "label_smoothing": losses.label_smoothing,
    "focal": losses.focal,
}
_PLAIN_NONLINEARITIES: Mapping[str, Any] = {
    "relu": nonlinearities.relu,
    "identity": nonlinearities.identity,
    "gelu": nonlinearities.gelu,
}
_NONLINEARITIES_OF: Mapping[str, Callable] = {
    "leaky_relu": nonlinearities.leaky_relu,
    "smoothed_relu": nonlinearities.smoothed_relu,
}


def _forms(plain: Mapping[str, Any], makers: Mapping[str, Callable]) -> str:
    """What a flag may be, for `--help` and errors, as in "a, b, c(x)"."""
    of = [
        f"{name}({next(iter(inspect.signature(make).parameters))})" for name, make in makers.items()
    ]
    return ", ".join([*plain, *of])


LOSS_FORMS = _forms(_PLAIN_LOSSES, _LOSSES_OF)
NONLINEARITY_FORMS = _forms(_PLAIN_NONLINEARITIES, _NONLINEARITIES_OF)


def loss(text: str) -> losses.Loss:
    """Returns the loss of a --loss such as "focal(2)".

    Raises:
      ValueError: if there is none of that name, or its parameter is out of range.
    """
    return _find("loss", text, _PLAIN_LOSSES, _LOSSES_OF)


def nonlinearity(text: str) -> nonlinearities.Nonlinearity:
    """Returns the nonlinearity of a --nonlinearity such as "leaky_relu(0.1)".

    Raises:
      ValueError: if there is none of that name, or its parameter is out of range.
    """
    return _find("nonlinearity", text, _PLAIN_NONLINEARITIES, _NONLINEARITIES_OF)


def _find(flag: str, text: str, plain: Mapping[str, Any], makers: Mapping[str, Callable]) -> Any:
    if text in plain:
        return plain[text]
    parts = re.fullmatch(r"(\w+)\(([^()]+)\)", text)
    if parts and parts[1] in makers:
        try:
            number = float(parts[2])
        except ValueError:
            raise ValueError(f"--{flag}={text}: {parts[2]!r} is no number.") from None
        try:
            return makers[parts[1]](number)
        except ValueError as error:
            raise ValueError(f"--{flag}={text}: {error}") from None
    raise ValueError(f"--{flag} must be one of {_forms(plain, makers)}, got {text!r}.")
