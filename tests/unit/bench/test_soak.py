"""The soak's slope test tells growth from scatter, and its marks are read without reading a whole run back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.bench.soak import LARGEST, Mark, cpu_trend, fit, newest_step, read_mark, rss_trend

GROUPS = range(4000, 10_000, 250)


def marks(*, growth: float = 0.0, slowdown: float = 0.0, scatter: float = 0.0, seed: int = 0) -> list[Mark]:
    """A run whose memory and CPU seconds a group rise by so much from the first mark to the last."""
    random = np.random.default_rng(seed)
    made, cpu_s = [], 5.0
    for groups in GROUPS:
        part = (groups - GROUPS[0]) / (GROUPS[-1] - GROUPS[0])
        cpu_s += 250 * 0.004 * (1 + slowdown * part) * (1 + scatter * random.standard_normal())
        made.append(Mark(groups, cpu_s, round(4e8 * (1 + growth * part) * (1 + scatter * random.standard_normal()))))
    return made


@pytest.mark.parametrize("seed", range(20))
def test_scatter_is_no_trend(seed: int) -> None:
    run = marks(scatter=0.02, seed=seed)
    assert not cpu_trend(run).exceeds(LARGEST["cpu"])
    assert not rss_trend(run).exceeds(LARGEST["rss"])


def test_growth_is_a_trend() -> None:
    assert rss_trend(marks(growth=0.03, scatter=0.002)).exceeds(LARGEST["rss"])
    assert cpu_trend(marks(slowdown=0.2, scatter=0.02)).exceeds(LARGEST["cpu"])


def test_sure_growth_that_comes_to_nothing_is_no_trend() -> None:
    line = rss_trend(marks(growth=0.005, scatter=0.0001))
    assert line.t > 10
    assert not line.exceeds(LARGEST["rss"])


def test_a_line_is_fitted_by_least_squares() -> None:
    line = fit([0, 1, 2, 3], [1.0, 3.0, 5.0, 7.4])
    assert line.total == pytest.approx(3 * 2.12 / 4.1)
    assert line.t == pytest.approx(2.12 / np.sqrt(0.048 / 2 / 5))


def test_the_newest_step_is_read_from_the_last_whole_line(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step":{n},"x":{"1" * 900}}}\n' for n in range(1, 40)) + '{"step":40'
    )
    assert newest_step(tmp_path) == 39


def test_a_mark_is_of_the_process() -> None:
    mark = read_mark(os.getpid(), 7)
    assert mark.groups == 7
    assert mark.rss_bytes > 1 << 20
    assert 0 < mark.cpu_s < 1e4
