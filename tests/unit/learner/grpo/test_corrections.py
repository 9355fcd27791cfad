"""Importance weights: of tokens and completions, truncated and masked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.grpo.corrections import importance_ratio, inside, second_moment_inside, truncated

PROXIMAL = torch.tensor([0.5, 0.9, 0.1, 0.4], dtype=torch.float64).log()
BEHAVIOR = torch.tensor([0.5, 0.1, 0.4, 0.1], dtype=torch.float64).log()
COMPLETION = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [1.0, 9.0, 0.25, 4.0]),
        ("sequence", [9.0, 9.0, 1.0, 1.0]),  # 1 x 9; 1/4 x 4
        ("geometric", [3.0, 3.0, 1.0, 1.0]),  # their roots
    ],
)
def test_ratios_by_hand(level, expected):
    assert importance_ratio(PROXIMAL, BEHAVIOR, COMPLETION, level=level).tolist() == pytest.approx(expected)


def test_truncated_and_inside_by_hand():
    ratio = torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0])
    assert truncated(ratio, clip_min=None, clip_max=2.0).tolist() == pytest.approx([0.1, 0.5, 1.0, 2.0, 2.0])
    assert truncated(ratio, clip_min=0.5, clip_max=2.0).tolist() == pytest.approx([0.5, 0.5, 1.0, 2.0, 2.0])
    assert inside(ratio, clip_min=None, clip_max=2.0).tolist() == [True, True, True, True, False]
    assert inside(ratio, clip_min=0.5, clip_max=2.0).tolist() == [False, True, True, True, False]


def test_a_ratio_has_no_gradient():
    assert not importance_ratio(PROXIMAL.clone().requires_grad_(), BEHAVIOR, COMPLETION, level="sequence").requires_grad


def test_an_overflowing_ratio_is_truncated_too():
    ratio = importance_ratio(torch.zeros(1), torch.full((1,), -200.0), torch.tensor([0]), level="token")
    assert truncated(ratio, clip_min=None, clip_max=3.0).tolist() == [3.0]


def test_second_moment_by_hand():
    # squares 0.01, 1, 0.04, 0: ascending means 0, 0.005, 0.0167, 0.2625
    proximal, behavior = torch.tensor([0.1, -1.0, 0.2, 0.0]), torch.zeros(4)
    assert second_moment_inside(proximal, behavior, threshold=0.04).tolist() == [True, False, True, True]
    assert second_moment_inside(proximal, behavior, threshold=0.01).tolist() == [True, False, False, True]
    assert second_moment_inside(proximal, behavior, threshold=1.0).all()
    assert second_moment_inside(behavior, behavior, threshold=1e-9).all(), "on policy nothing is masked"


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=40),
    st.floats(1e-4, 2.0),
)
def test_the_second_moment_is_bounded_by_leaving_out_as_few_as_it_takes(log_ratios, threshold):
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64)
    kept = second_moment_inside(log_ratio, torch.zeros_like(log_ratio), threshold=threshold)
    squares = log_ratio.square()
    if kept.any():
        assert squares[kept].mean() <= threshold
    if not kept.all():
        assert not kept.any() or squares[~kept].min() >= squares[kept].max()
        with_one_more = torch.cat([squares[kept], squares[~kept].min()[None]])
        assert with_one_more.mean() > threshold
