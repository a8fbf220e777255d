"""The one exception of the package."""

from __future__ import annotations


class GeoError(ValueError):
    """Something a user can mend: its message is one line that says what is wrong and how to mend it.

    The command line prints the message alone and exits with status 1.
    """
