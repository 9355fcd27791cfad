from __future__ import annotations

import pytest

from tests.bench.meter import Meter

MIB = 1 << 20


def test_the_peak_is_what_the_steps_rose_to_not_what_loading_did():
    bytearray(b"x") * (300 * MIB)
    meter = Meter()
    meter.lap()
    kept = bytearray(b"x") * (64 * MIB)
    del kept
    meter.lap()
    assert 60 < meter.figures(1)["peak_mib"] < 200


def test_the_last_step_counts():
    meter = Meter()
    sum(range(3_000_000))
    meter.lap()
    sum(range(1000))
    meter.lap()
    figures = meter.figures(10)
    assert figures["cpu_s"] < 0.02
    assert figures["tokens_per_s"] == pytest.approx(10 / figures["cpu_s"])
