"""This module holds the one exception of the package."""

from __future__ import annotations


class GeoError(ValueError):
    """This error is one that a user can fix: its message is one line that says what is wrong and how to fix it.

    The command line prints the message alone and exits with status 1.
    """
