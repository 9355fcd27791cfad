"""What tests of the tuning commands have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _logs_come_back() -> Iterator[None]:
    """The commands silence the learner's logs for their process, which here is that of other tests too."""
    logger = logging.getLogger("learner")
    level = logger.level
    yield
    logger.setLevel(level)
