from __future__ import annotations

import math

import pytest

from learner.dashboard.text import duration, histogram, percent, printable, quantity, score, sparkline


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (-0.2, "0.0 s"),
        (3.24, "3.2 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "1:40"),
        (438, "7:18"),
        (3599.6, "1:00:00"),
        (7630, "2:07:10"),
        (1e6, "11 d"),
        (1e12, "11,574,074 d"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.534, "0.53"), (-1.0, "-1.00"), (0.0, "0.00"), (9999.0, "9999.00"), (12345.0, "1.2e+04"), (math.nan, "-")],
)
def test_score(value, text):
    assert score(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.44, "0.4"),
        (87, "87"),
        (1240.4, "1,240"),
        (56_100, "56.1k"),
        (999_960, "1.0M"),
        (2e9, "2.0G"),
        (3e13, "3.0e+13"),
        (-math.inf, "-"),
    ],
)
def test_quantity(value, text):
    assert quantity(value) == text


def test_percent():
    assert [percent(x) for x in (0.0, 0.814, 1.0, math.nan)] == ["0 %", "81 %", "100 %", "-"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("gpu-a", "gpu-a"),
        ("réseau 网络", "réseau 网络"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("two\nlines\tand\r", "two\\nlines\\tand\\r"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("\x9b31m", "\\x9b31m"),
        ("\ud800", "\\ud800"),
        ("", ""),
    ],
)
def test_printable_escapes_what_a_terminal_could_act_on(text, shown):
    assert printable(text) == shown


def test_printable_cuts_what_is_long_before_and_after_escaping():
    assert printable("a" * 30, 10) == "aaaaaaa..."
    assert printable("\x00" * 5, 10) == "\\x00\\x0..."
    assert printable("a" * 10, 10) == "a" * 10


def test_sparkline_rises_from_the_lowest_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 0], 8) == "█▁"


def test_sparkline_keeps_the_whole_history_in_its_width():
    assert sparkline([float(i) for i in range(1000)], 4) == "▁▃▆█"
    assert len(sparkline([0.5, 0.7] * 501, 40)) == 40


def test_sparkline_of_equal_or_missing_values():
    assert sparkline([0.5, 0.5], 8) == "▄▄"
    assert sparkline([], 8) == ""
    assert sparkline([math.nan], 8) == ""
    assert sparkline([0.0, math.nan, 1.0], 8) == "▁ █"
    assert sparkline([1.0, math.inf], 8) == "▄ "
    assert sparkline([-1e308, 1e308], 8) == "▄▄"


def test_histogram_shows_every_count_that_is_not_zero():
    assert histogram([100_000, 0, 1]) == "█ ▁"
    assert histogram([]) == ""
    assert histogram([0, 0]) == ""
