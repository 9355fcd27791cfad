"""Fixtures of the system tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import Lab


@pytest.fixture
def lab(tmp_path: Path, tiny_model_dir: Path) -> Iterator[Lab]:
    """A Lab of one test, with the tiny random model in the learner."""
    with Lab(tmp_path, tiny_model_dir) as lab:
        yield lab


@pytest.fixture(scope="module")
def module_lab(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Lab]:
    """A Lab that the tests of one module share: one run, of which each looks at another side."""
    with Lab(tmp_path_factory.mktemp("lab"), tiny_model_dir) as lab:
        yield lab
