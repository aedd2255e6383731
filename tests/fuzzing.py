"""How long the property tests hunt, and the one way in which they accept a refusal.

In the test run examples are few and always the same. For a longer hunt with random ones

  FUZZ=50 python -m pytest tests/test_fuzz*.py --hypothesis-show-statistics

makes 50 times as many.
"""

import os
from collections.abc import Callable
from typing import Any

import cases
from hypothesis import HealthCheck, settings

_TIMES = int(os.environ.get("FUZZ", "1"))


def examples(number: int) -> settings:
    """Settings of a test of so many examples."""
    return settings(
        max_examples=number * _TIMES,
        deadline=None,
        derandomize=_TIMES == 1,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def attempt(function: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, str]:
    """The result and "", or None and the one sentence of the ValueError that refused.

    Any other exception goes through and fails the test.
    """
    try:
        return function(*arguments, **named), ""
    except ValueError as error:
        message = str(error)
        assert message, "an error without a sentence"
        cases.assert_one_sentence(message)
        return None, message
