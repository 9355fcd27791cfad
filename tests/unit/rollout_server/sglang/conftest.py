"""Fixtures of the tests that run engines on the fake SGLang."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.versions import Version
from rollout_server.engines.base import StagedWeights
from rollout_server.engines.sglang import host, watch
from tests.fake_sglang import driving

MakeWeights = Callable[..., StagedWeights]


@pytest.fixture
def fake_path(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Children of this process that run sglang run the fake; looks at whether it is up are quick.

    Returns:
        Where engines make their directories.
    """
    directory = tmp_path_factory.mktemp("engines")
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.setenv("PYTHONPATH", str(driving.PATH))
    monkeypatch.setattr(host, "RETRY_S", 0.02)
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    return directory


@pytest.fixture
def weights(tiny_model_dir: Path, tmp_path: Path) -> MakeWeights:
    def make(version: Version, *, content: int | None = None, canaries: bool = True) -> StagedWeights:
        return driving.make_weights(tiny_model_dir, tmp_path, version, content=content, canaries=canaries)

    return make
