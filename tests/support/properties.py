"""How many examples property tests try: few and always the same ones, or many new ones in a night."""

from __future__ import annotations

import os

from hypothesis import settings

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def examples(count: int) -> settings:
    """Settings of a test with so many examples, fifty times as many in ``make test-nightly``."""
    return settings(derandomize=not NIGHTLY, deadline=None, max_examples=count * (50 if NIGHTLY else 1), database=None)


repeatable = examples(200)
