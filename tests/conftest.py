"""Fixtures that every kind of test shares."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.models import build_tiny_model
from tests.sglang_cpu.launch import PYTHON, RunningSGLang


def pytest_configure() -> None:
    """Let SIGINT interrupt: a shell starts jobs in the background with it ignored, and so would all they start.

    And ask of properties whether they hold, not how fast: machines are shared.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if find_spec("hypothesis") is not None:  # the tests that need a GPU run without it
        from hypothesis import settings

        settings.register_profile("headway", deadline=None)
        settings.load_profile("headway")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 Qwen3 (d=32, 2 layers, character vocabulary, tied embeddings). Read only."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="session")
def sglang(tiny_model_dir: Path) -> Iterator[RunningSGLang]:
    """The real SGLang with the tiny model: one for the whole run. Tests attach to it, and leave it idle."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: `make sglang` builds the environment that has SGLang")
    running = RunningSGLang.start(tiny_model_dir)
    yield running
    running.stop()
