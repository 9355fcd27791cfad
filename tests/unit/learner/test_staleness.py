"""What follows from the staleness dial: the table of max_staleness, window and weight_sync_steps, refusals included."""

from __future__ import annotations

import pytest

from learner.staleness import Bounds, derive_bounds
from protocol.errors import ConfigError


def derive(m: int, p: int = 8, w: int | None = None, k: int = 1) -> Bounds:
    return derive_bounds(max_staleness=m, prompts_per_step=p, reorder_window=w, weight_sync_steps=k)


@pytest.mark.parametrize(
    ("m", "k", "window", "steps_ahead"),
    [
        (0, 1, 1, 0),  # synchronous
        (1, 1, 1, 1),
        (3, 1, 1, 3),
        (4, 1, 9, 3),  # from here on W = P + 1
        (8, 1, 9, 7),
        (1, 2, 1, 1),
        (4, 3, 9, 3),
        (4, 4, 1, 4),  # W > 1 would buy nothing: S must be k or more
        (4, 5, 1, 4),
        (5, 5, 1, 5),
        (6, 5, 9, 5),
    ],
)
def test_the_default_window(m, k, window, steps_ahead):
    bounds = derive(m, 8, None, k)
    assert (bounds.reorder_window, bounds.steps_ahead, bounds.weight_sync_steps) == (window, steps_ahead, k)
    assert bounds.slots_total == (steps_ahead + 1) * 8
    assert bounds.steps_ahead + bounds.window_steps == m


@pytest.mark.parametrize(
    ("m", "p", "w", "steps_ahead", "window_steps"),
    [
        (4, 8, 1, 4, 0),
        (4, 8, 2, 3, 1),  # any part of a step costs a whole one
        (4, 8, 9, 3, 1),  # jP + 1 is the most a step buys
        (4, 8, 10, 2, 2),
        (4, 8, 17, 2, 2),
        (4, 8, 25, 1, 3),
        (2, 1, 2, 1, 1),
        (9, 1, 1, 9, 0),
        (5, 3, 7, 3, 2),
    ],
)
def test_a_window_costs_steps_ahead(m, p, w, steps_ahead, window_steps):
    bounds = derive(m, p, w)
    assert (bounds.steps_ahead, bounds.window_steps) == (steps_ahead, window_steps)


@pytest.mark.parametrize(
    ("m", "w", "k", "says"),
    [
        (0, 2, 1, r"reorder_window 2 alone allows a staleness of 1, above max_staleness 0: .* at most 1$"),
        (1, 18, 1, r"reorder_window 18 alone allows a staleness of 3, above max_staleness 1: .* at most 9$"),
        (0, 1, 2, r"weight_sync_steps 2 with S = 0 .* deadlock: .* S >= 1; raise max_staleness to at least 1 or"),
        (3, None, 5, r"weight_sync_steps 5 with S = 3 .* S >= 4; raise max_staleness to at least 4 or publish"),
        (2, 17, 2, r"weight_sync_steps 2 with S = 0 .* raise max_staleness to at least 3 or publish more often"),
        (1, 9, 1, r"reorder_window 9 buys nothing with weight_sync_steps 1 and S = 0: .* or max_staleness >= 2$"),
        (4, 9, 4, r"reorder_window 9 buys nothing with weight_sync_steps 4 and S = 3: .* or max_staleness >= 5$"),
    ],
)
def test_refused_pairs_say_what_would_do(m, w, k, says):
    with pytest.raises(ConfigError, match=says):
        derive(m, 8, w, k)


@pytest.mark.parametrize(("m", "w", "k"), [(0, 1, 1), (1, 1, 2), (4, None, 5), (3, 17, 1), (2, 9, 1), (5, 9, 4)])
def test_what_a_refusal_recommends_is_accepted(m, w, k):
    assert derive(m, 8, w, k).max_staleness == m


def test_every_accepted_pair_has_the_bound_it_was_asked_for():
    """Exhaustively over small numbers: S + ceil((W - 1) / P) = m, and the pair can progress (S >= k - 1)."""
    accepted = 0
    for m in range(7):
        for p in range(1, 5):
            for w in [None, *range(1, 14)]:
                for k in range(1, 5):
                    try:
                        bounds = derive(m, p, w, k)
                    except ConfigError:
                        continue
                    accepted += 1
                    assert bounds.steps_ahead + bounds.window_steps == m
                    assert bounds.steps_ahead >= (k if bounds.reorder_window > 1 else k - 1)
    assert accepted > 300
