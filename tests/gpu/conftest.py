"""Fixtures of the GPU tests, and the report at the end. See README.md for the variables."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator

import pytest

from tests.gpu.figures import Figures, describe_hardware
from tests.gpu.rig import DEVICE_VARIABLE, Rig, Running, make_rig, missing

FIGURES = Figures()


@pytest.fixture(scope="session")
def device() -> str:
    """The device that may be used; skips where it may not."""
    name = os.environ.get(DEVICE_VARIABLE, "cuda")
    if reason := missing(name):
        pytest.skip(reason)
    return name


@pytest.fixture(scope="session")
def rig(device: str, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return make_rig(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="session")
def running(rig: Rig) -> Iterator[Running]:
    """One SGLang for all tests but the contract's."""
    with Running(rig.config()) as running:
        yield running


@pytest.fixture(scope="session")
def figures() -> Figures:
    return FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not FIGURES.rows:
        return
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    hardware = describe_hardware(os.environ.get(DEVICE_VARIABLE, "cuda"))
    terminalreporter.section("figures")
    terminalreporter.write_line(FIGURES.table())
    terminalreporter.write_line(FIGURES.line(date=date, hardware=hardware))
