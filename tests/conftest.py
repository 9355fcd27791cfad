"""Fixtures that every kind of test shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import build_tiny_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 Qwen3 (d=32, 2 layers, character vocabulary, tied embeddings). Read only."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen3")
