"""
How the commands of this package read numbers.
"""

import argparse
import contextlib


def number(text: str) -> float:
    """
    :param text: A number
    :return: The same
    :raises argparse.ArgumentTypeError: if it is none
    """
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number such as 3e-4, got {text!r}") from None


def whole_number(text: str) -> int:
    """
    :param text: A whole number, which may be written as 1e6
    :return: The same
    :raises argparse.ArgumentTypeError: if it is none
    """
    with contextlib.suppress(ValueError):
        # Not by way of a float, which may be another one
        return int(text)
    with contextlib.suppress(ValueError):
        if float(text).is_integer():
            return int(float(text))
    raise argparse.ArgumentTypeError(f"expected a whole number such as 4 or 1e6, got {text!r}")
